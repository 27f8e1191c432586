"""What coded slots cost and save: divergence from the full cache, bytes and step time, beside the same policy uncoded.

SmolLM2-135M in float32 reads essays of $VITALFEW_DATA, rows side by side, and then their next tokens one by one; every
cache is fed the same. int8 must add at most .003 nats to its policy; another codec that adds more than .02 is declined.

    python benchmarks/generate/quant.py --out benchmarks/results/quant.json
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
from decode import twin
from sample import command, essay_tokens, sample_model
from transformers import DynamicCache

from vitalfew.core.files import write_document
from vitalfew.generate.budgets import slot_bytes
from vitalfew.generate.ceiling import KVShape
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.quant import CODECS
from vitalfew.meter import machine

INT8, OTHERS = 0.003, 0.02


def compare(model: Any, ids: torch.Tensor, prompt: int, share: float, policy: str) -> list[dict[str, Any]]:
    rows, total = ids.shape
    full = DynamicCache(config=model.config)
    arms: dict[str, tuple[Any, Any, KeyTokens]] = {}
    for name in ("none", *CODECS):
        mine = twin(model)
        few = KeyTokens(mine, share, policy=policy, min_length=0, codec=None if name == "none" else name)
        arms[name] = mine, few.cache(prompt=prompt, max_new_tokens=total - prompt), few
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in arms}
    took: dict[str, list[float]] = {name: [] for name in arms}
    for at in range(prompt, total):
        new = slice(0, prompt) if at == prompt else slice(at - 1, at)
        p = model(ids[:, new], past_key_values=full, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        truth = ids[:, at : at + 1]
        for name, (mine, cache, _) in arms.items():
            start = time.process_time()
            q = mine(ids[:, new], past_key_values=cache, logits_to_keep=1).logits[:, -1].log_softmax(-1)
            took[name].append(time.process_time() - start)
            kl = (p.exp() * (p - q)).sum(-1).double().sum()
            loss = (p.gather(1, truth) - q.gather(1, truth)).double().sum()
            sums[name] += torch.stack([kl, loss, (p.argmax(-1) == q.argmax(-1)).double().sum()])
    count, shape, table = rows * (total - prompt), KVShape.of(model.config, model.dtype.itemsize), []
    half = rows * shape.full_bytes(1, total - 1) // shape.element_size * 2  # as a model in bfloat16 would hold it
    for name, (_, cache, few) in arms.items():
        kl, loss, agree = (float(x) / count for x in sums[name])
        one = slot_bytes(shape.head_dim, shape.head_dim, shape.element_size, few.codec)
        counted = rows * shape.layers * shape.heads * (int(prompt * share) * one + 8)
        assert cache.nbytes == counted, f"{cache.nbytes} bytes held, the formula says {counted}"
        steps = sorted(took[name][2:])  # the prompt, and the step in which kernels compile, aside
        table.append(
            {
                "policy": policy, "share": share, "codec": name, "tokens": count, "kl": kl, "nll more": loss,
                "top-1": agree, "bytes": cache.nbytes, "full bf16 / bytes": half / cache.nbytes,
                "step ms": 1e3 * steps[len(steps) // 4], "prompt s": took[name][0],
            }
        )  # fmt: skip
        few.undo()
    for row in table:
        row["kl added"] = row["kl"] - table[0]["kl"]
        row["missed"] = row["codec"] == "int8" and row["kl added"] > INT8
        row["declined"] = row["codec"] not in ("none", "int8") and row["kl added"] > OTHERS
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens: shows that it runs")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--policies", default="keyformer,snapkv")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.prompt, args.new = 2, 256, 8
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    text = essay_tokens(tokenizer)
    ids = text[: len(text) // args.rows * args.rows].view(args.rows, -1)[:, : args.prompt + args.new]
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for policy in args.policies.split(","):
            for row in compare(model, ids, args.prompt, args.budget, policy):
                results.append(row)
                print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if args.out:
        about = {"command": command(), "machine": machine(), "quick": args.quick}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    return int(any(row["missed"] for row in results) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
