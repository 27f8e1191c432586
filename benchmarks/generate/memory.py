"""A long stream of tokens through a cache of constant size: bytes as counted by the formula, tensors that stay put.

SmolLM2-135M reads 12,000 tokens of essays, far past its prompt, with a share of the prompt's slots. After each call
the bytes held must equal the formula, no slot may have moved, and the process must not grow; the exit status is 1
where one of them fails.

    python benchmarks/generate/memory.py --out benchmarks/results/generate_memory.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from sample import command, essay_tokens, sample_model

from vitalfew.core.files import write_document
from vitalfew.generate.budgets import slot_bytes, uniform
from vitalfew.generate.ceiling import KVShape
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.meter import machine

MARK = 8
"""Bytes per row and head that name the slot which goes next."""
GROWTH = 16 << 20
"""How much the process may grow after its first fifth: what allocators keep, not what tokens take."""


def stream(model: Any, ids: torch.Tensor, prompt: int, share: float, chunk: int) -> dict[str, Any]:
    shape = KVShape.of(model.config, model.dtype.itemsize)
    slots = uniform(share, prompt, 1)[0]
    one = slot_bytes(shape.head_dim, shape.head_dim, shape.element_size)
    formula = shape.layers * shape.heads * (slots * one + MARK)
    process, total, samples, places = psutil.Process(), ids.shape[1], [], set()
    start = time.perf_counter()
    with KeyTokens(model, budget=share, min_length=0) as few, torch.inference_mode():
        cache = few.cache(prompt=prompt, max_new_tokens=total - prompt)
        seen = 0
        while seen < total:
            size = prompt if not seen else min(chunk, total - seen)
            model(ids[:, seen : seen + size], past_key_values=cache, logits_to_keep=1)
            seen += size
            assert cache.get_seq_length() == seen, "the logical length is the number of tokens seen"
            assert cache.nbytes == formula, f"{cache.nbytes} bytes held after {seen} tokens, the formula says {formula}"
            places.add(tuple(layer.evicting.slots.keys.data_ptr() for layer in cache.slot_layers))
            assert len(places) == 1, f"slots were allocated again after {seen} tokens"
            samples.append((seen, process.memory_info().rss))
    early = max(rss for tokens, rss in samples if tokens <= max(total // 5, prompt + chunk))
    late = max(rss for _, rss in samples)
    return {
        "tokens": total, "prompt": prompt, "slots": slots, "bytes held": cache.nbytes, "formula": formula,
        "full cache": shape.full_bytes(1, total), "grown after a fifth": late - early,
        "seconds": time.perf_counter() - start, "rss": samples[:: max(1, len(samples) // 50)],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twelfth of the tokens: shows that it runs")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--chunk", type=int, default=1, help="tokens per call; each is a step of its own in the cache")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.prompt, args.chunk = 1_000, 256, 8
    model, tokenizer = sample_model()
    ids = essay_tokens(tokenizer)[None, : args.tokens]
    assert ids.shape[1] == args.tokens, "the essays are too short"
    found = stream(model, ids, args.prompt, args.budget, args.chunk)
    print({name: value for name, value in found.items() if name != "rss"})
    if args.out:
        about = {"command": command(), "machine": machine(), "quick": args.quick}
        write_document(args.out, "benchmark", 1, {**about, "results": found})
    return int(found["grown after a fifth"] > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
