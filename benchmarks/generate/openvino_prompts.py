"""The prompts and the arena that OpenVINO GenAI tests its cache eviction with, in slots.

Its arena has 32 tokens of the start, 32 latest ones and 96 in all. It asks for a cache use so many times smaller than
without eviction, in the maximum and in the mean over time, and for answers similar to the full cache's:

    long prompts, 128 tokens     similarity .80, 2.0 and 1.7 times
    short prompts, 32 tokens     similarity .98
    short prompts, 160 tokens    similarity .94, 1.4 and 1.1 times

Cache use is counted in tokens held after each call of the model, over all prompts, without padding. Its similarity is
of sentence embeddings; ours is ROUGE-L (F1) of the text to the full cache's, which is stricter: equal meaning in other
words does not count. SmolLM2-135M in float32, greedy.

    python benchmarks/generate/openvino_prompts.py --out benchmarks/results/openvino_prompts.json
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from corpora import prompts
from rouge_score.rouge_scorer import RougeScorer
from sample import command, sample_model

from vitalfew.core.files import write_document
from vitalfew.generate import H2O, Keyformer, KeyTokens, Policy, SnapKV, Streaming, then
from vitalfew.meter import machine

START, RECENT, MOST = 32, 32, 96
POLICIES: dict[str, Policy] = {
    "keyformer": Keyformer(sinks=START, recent=RECENT),
    "h2o": H2O(sinks=START, recent=RECENT),
    "snapkv then h2o": then(SnapKV(RECENT, sinks=START), H2O(sinks=START, recent=RECENT)),
    "streaming": Streaming(START),
}


@dataclass(frozen=True)
class Case:
    """Prompts, tokens to follow, and what is asked for."""

    kind: str
    new: int
    similarity: float
    most: float = 1.0
    mean: float = 1.0


CASES = [Case("long", 128, 0.8, 2.0, 1.7), Case("short", 32, 0.98), Case("short", 160, 0.94, 1.4, 1.1)]


def answers(model: Any, inputs: Any, new: int, cache: Any = None) -> tuple[torch.Tensor, list[int]]:
    """Return the tokens that follow, greedily, and the tokens held after each call of the model."""
    ids, mask = inputs.input_ids, inputs.attention_mask
    held, found = [], []
    for _ in range(new):
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        held.append(tokens_held(cache, mask))
        ids = out.logits[:, -1].argmax(1, keepdim=True)
        found.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.cat(found, 1), held


def tokens_held(cache: Any, mask: torch.Tensor) -> int:
    """Return what a layer's heads hold, over all rows; a full cache holds all but padding."""
    layers = getattr(cache, "slot_layers", None)
    if layers is None:
        return int(mask.sum())
    pos = layers[0].evicting.slots.pos[:, 0]
    return int((pos >= 0).sum())


def run(model: Any, tokenizer: Any, case: Case, texts: list[str]) -> list[dict[str, Any]]:
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    tokens, full = answers(model, inputs, case.new)
    wanted, scorer, found = tokenizer.batch_decode(tokens), RougeScorer(["rougeL"]), []
    for name, policy in POLICIES.items():
        with KeyTokens(model, MOST, policy=policy, min_length=0) as few:
            tokens, held = answers(model, inputs, case.new, few.cache(inputs.input_ids.shape[1], case.new))
        near = [
            scorer.score(*pair)["rougeL"].fmeasure for pair in zip(wanted, tokenizer.batch_decode(tokens), strict=True)
        ]
        row = {
            "prompts": case.kind, "new": case.new, "policy": name, "similarity": sum(near) / len(near),
            "similarity asked": case.similarity, "same texts": sum(score == 1.0 for score in near), "texts": len(near),
            "use max": max(full) / max(held), "use max asked": case.most,
            "use mean": sum(full) / sum(held), "use mean asked": case.mean,
        }  # fmt: skip
        row["missed"] = [what for what in ("similarity", "use max", "use mean") if row[what] < row[f"{what} asked"]]
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short prompts: shows that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    tokenizer.padding_side = "left"
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for case in CASES[1:2] if args.quick else CASES:
            results += run(model, tokenizer, case, prompts(case.kind)[: 2 if args.quick else None])
    if args.out:
        about = {"command": command(), "machine": machine(), "quick": args.quick}
        body = {"model": "SmolLM2-135M-Instruct, float32", "arena": [START, RECENT, MOST], "results": results}
        write_document(args.out, "benchmark", 1, {**about, **body})
    return int(any(row["missed"] for row in results) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
