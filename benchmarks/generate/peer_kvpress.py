"""The other side of `peers.py`: kvpress in an environment of its own, without vitalfew, on the same tokens and weights.

python benchmarks/generate/peer_kvpress.py job.json result.json
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES: dict[str, Callable[..., Any]] = {
    "snapkv": kvpress.SnapKVPress,
    "tova": kvpress.TOVAPress,
    "streaming": kvpress.StreamingLLMPress,
    "h2o": kvpress.ObservedAttentionPress,
}
EAGER = ("h2o",)
"""Those that want whole attention matrices."""


def press_of(name: str, keep: int, tokens: int) -> Any:
    """Return a press that keeps exactly so many of a prompt's tokens; half a token saves it from rounding."""
    if name != "tova each step":
        return PRESSES[name](compression_ratio=1 - (keep + 0.5) / tokens)
    # It compresses after attention, so that the next token sees one more than is left.
    later = kvpress.DecodingPress(kvpress.TOVAPress(), compression_interval=1, target_size=keep - 1)
    return kvpress.PrefillDecodingPress(press_of("tova", keep - 1, tokens), later)


@contextlib.contextmanager
def pressed(model: Any, arm: dict[str, Any] | None, tokens: int) -> Iterator[None]:
    """Let a press compress what the model reads; None for the full cache."""
    if arm is None:
        yield
        return
    model.set_attn_implementation("eager" if arm["name"] in EAGER else "sdpa")
    try:
        with press_of(arm["name"], arm["keep"], tokens)(model):
            yield
    finally:
        model.set_attn_implementation("sdpa")


def follow(
    model: Any, ids: torch.Tensor, prompt: int, arm: dict[str, Any] | None = None, mask: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Yield, before each token after the prompt, the log-probabilities ``(rows, vocabulary)``."""
    cache = DynamicCache()
    at = torch.arange(ids.shape[1]).expand_as(ids) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with pressed(model, arm, prompt):
        for end in range(prompt, ids.shape[1]):
            start = 0 if end == prompt else end - 1
            seen = None if mask is None else mask[:, :end]
            out = model(
                ids[:, start:end], past_key_values=cache, position_ids=at[:, start:end], attention_mask=seen,
                logits_to_keep=1,
            )  # fmt: skip
            yield out.logits[:, -1].log_softmax(-1)
        if arm is not None:
            arm["slots at the end"] = cache.layers[0].keys.shape[2]


def figures(ours: Iterator[torch.Tensor], full: list[torch.Tensor], ids: torch.Tensor) -> list[dict[str, float]]:
    """Return, for each row, the means over the tokens after the prompt."""
    rows, prompt = ids.shape[0], ids.shape[1] - len(full)
    sums = torch.zeros(3, rows, dtype=torch.float64)
    for k, (q, p) in enumerate(zip(ours, full, strict=True)):
        sums[0] -= q.gather(1, ids[:, prompt + k, None])[:, 0]
        sums[1] += (p.exp() * (p - q)).sum(1)
        sums[2] += p.argmax(1) == q.argmax(1)
    return [dict(zip(("nll", "kl", "agreement"), row, strict=True)) for row in (sums / len(full)).T.tolist()]


def quality(model: Any, job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    ids, prompt = torch.tensor(job["texts"]), job["prompt"]
    full = list(follow(model, ids, prompt))
    found = {"full": figures(iter(full), full, ids)}
    for arm in job["arms"]:
        found[arm["label"]] = figures(follow(model, ids, prompt, arm), full, ids)
        say(f"kvpress {arm['label']}: KL {sum(row['kl'] for row in found[arm['label']]) / len(ids):.4f}")
    return {"rows": found, "slots at the end": {arm["label"]: arm["slots at the end"] for arm in job["arms"]}}


def padded(model: Any, job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Follow a short text beside a long one, and alone, both compressed; against the full cache alone."""
    ids, mask, prompt, pad = torch.tensor(job["texts"]), torch.tensor(job["mask"]), job["prompt"], job["pad"]
    alone, short = ids[:1, pad:], prompt - pad
    full = list(follow(model, alone, short))
    arm = {"name": "snapkv", "keep": job["keep alone"]}
    one = figures(follow(model, alone, short, arm), full, alone)[0]
    arm = {"name": "snapkv", "keep": job["keep"]}
    batch = (row[:1] for row in follow(model, ids, prompt, arm, mask))
    both = figures(batch, full, alone)[0]
    say(f"kvpress, a text alone: KL {one['kl']:.4f}; padded in a batch: {both['kl']:.4f}")
    return {"alone": one, "in a batch": both}


def needles(model: Any, job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cell in job:
        ids = torch.tensor(cell["prompts"])
        for arm in cell["arms"]:
            cache, new, answers = DynamicCache(), ids, []
            with pressed(model, arm, ids.shape[1]):
                for step in range(cell["new"]):
                    at = torch.arange(ids.shape[1]) if not step else torch.tensor([ids.shape[1] + step - 1])
                    at = at.expand(ids.shape[0], -1)
                    out = model(new, past_key_values=cache, position_ids=at, logits_to_keep=1)
                    new = out.logits[:, -1].argmax(1, keepdim=True)
                    answers.append(new)
            found.setdefault(cell["label"], {})[arm["label"]] = torch.cat(answers, 1).tolist()
            say(f"kvpress needles, {cell['label']}: {arm['label']} done")
    return found


def speed(model: Any, job: dict[str, Any], say: Callable[[str], None]) -> dict[str, float]:
    """Return seconds of process time per decode step: the least over rounds, arms in turns."""
    ids, prompt = torch.tensor(job["texts"]), job["prompt"]
    caches: dict[str, Any] = {}
    for arm in (None, *job["arms"]):
        cache = DynamicCache()
        with pressed(model, arm, prompt):
            model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        caches["full" if arm is None else arm["label"]] = cache
    least = dict.fromkeys(caches, float("inf"))
    at = prompt
    for turn in range(job["rounds"]):
        for name in list(caches)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            for k in range(at, at + job["steps"]):
                here = torch.full((ids.shape[0], 1), k)
                model(ids[:, k : k + 1], past_key_values=caches[name], position_ids=here, logits_to_keep=1)
            least[name] = min(least[name], (time.process_time() - start) / job["steps"])
        at += job["steps"]
    say(f"kvpress, seconds per step: {least}")
    return least


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    result: dict[str, Any] = {
        "versions": {
            "kvpress": version("kvpress"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
    }
    parts = {"quality": quality, "padded": padded, "needles": needles, "speed": speed}
    with torch.inference_mode():
        for name, part in parts.items():
            if name in job:
                result[name] = part(model, job[name], lambda line: print(line, flush=True))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
