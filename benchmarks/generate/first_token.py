"""Time to the first token, times the full cache's: what voting on a prompt and choosing from it costs.

SmolLM2-135M in float32 on one thread reads real prompts, essays of $VITALFEW_DATA, with a dynamic full cache and with
each policy, in turns. A figure is the least process time over rounds; the exit status is 1 where the ratio of a policy
without noise is above 1.15.

    python benchmarks/generate/first_token.py --out benchmarks/results/first_token.json
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sample import command, essay_tokens, sample_model

from vitalfew.core.files import write_document
from vitalfew.generate import KeyTokens
from vitalfew.meter import machine

MOST = 1.15
POLICIES = ("keyformer", "keyformer-dynamic", "h2o", "snapkv", "tova", "streaming")


def read(model: Any, ids: torch.Tensor, policy: str | None) -> float:
    """Return the seconds until the first token is known."""
    few = KeyTokens(model, 0.5, policy=policy, min_length=0) if policy else None
    cache = few.cache(ids.shape[1], 100) if few else None
    start = time.process_time()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax()
    seconds = time.process_time() - start
    if few:
        few.undo()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short prompt: shows that it runs")
    parser.add_argument("--tokens", default="1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    text = essay_tokens(tokenizer)
    lengths = [300] if args.quick else [int(length) for length in args.tokens.split(",")]
    results, arms = [], [None, *POLICIES]
    with torch.inference_mode():
        for arm in arms:
            read(model, text[None, :300], arm)  # kernels compile
        for length in lengths:
            took: dict[str | None, list[float]] = {arm: [] for arm in arms}
            for turn in range(1 if args.quick else args.rounds):
                for arm in arms[:: 1 if turn % 2 else -1]:
                    took[arm].append(read(model, text[None, :length], arm))
            full = min(took[None])
            for policy in POLICIES:
                ratio = min(took[policy]) / full
                late = "dynamic" not in policy and ratio > MOST and not args.quick
                results.append(
                    {"tokens": length, "policy": policy, "full s": full, "s": min(took[policy]), "ratio": ratio,
                     "missed": [f"{ratio:.2f} > {MOST}"] if late else []}
                )  # fmt: skip
                print(results[-1], flush=True)
    if args.out:
        about = {"command": command(), "machine": machine(), "quick": args.quick}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    return int(any(row["missed"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
