"""Time to the first token of questions behind a prefix that was read once, beside reading the text again.

SmolLM2-135M in float32 on one thread; the text is an essay of $VITALFEW_DATA. Times are process time: of a fork and its
first token the minimum over rounds, of reading the text and the question the minimum over two. A fork must take at most
a tenth.

    python benchmarks/generate/prefix.py --out benchmarks/results/prefix.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sample import command, essay_tokens, sample_model

from vitalfew.core.files import write_document
from vitalfew.generate.prefix import CompressedPrefix, compress
from vitalfew.meter import machine

LIMIT = 0.1


def seconds(work: Callable[[], Any], rounds: int) -> float:
    took = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def compare(model: Any, text: torch.Tensor, length: int, asked: int, rows: int, codec: str | None) -> dict[str, Any]:
    questions = text[length : length + rows * asked].view(rows, asked)
    start = time.process_time()
    prefix = compress(model, text[:length], budget=0.5, policy="snapkv", codec=codec)
    made = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefix.safetensors"
        saved = seconds(lambda: prefix.save(file), 1)
        loaded = seconds(lambda: CompressedPrefix.load(file, model), 2)
        size = file.stat().st_size
        prefix = CompressedPrefix.load(file, model)
    whole = torch.cat((text[None, :length].expand(rows, -1), questions), 1)
    with prefix.serve(model) as few:
        first = {"max_new_tokens": 1, "do_sample": False}
        forked = seconds(lambda: model.generate(**prefix.followed_by(questions), **first), 5)
        again = seconds(lambda: model.generate(whole[:1], **first), 2)
        counted = few.generations[0]
    return {
        "tokens": length, "question": asked, "rows": rows, "codec": codec or "none",
        "tokens read": asked / (length + asked), "fork s": forked / rows, "again s": again,
        "ratio": forked / rows / again, "prefix bytes": prefix.nbytes, "file bytes": size,
        "bytes of full / held": counted.full_nbytes / counted.nbytes, "compress s": made, "save s": saved,
        "load s": loaded,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short text: shows that it runs")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--question", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    text = essay_tokens(tokenizer)
    length = 512 if args.quick else args.tokens
    results = []
    for rows, codec in ((1, None), (8, None), (1, "int8")):
        row = compare(model, text, length, args.question, rows, codec)
        row["missed"] = row["ratio"] > LIMIT
        results.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if args.out:
        about = {"command": command(), "machine": machine(), "quick": args.quick}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    return int(any(row["missed"] for row in results) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
