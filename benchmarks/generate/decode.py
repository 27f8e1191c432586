"""Time of a decode step with evicted slots beside a dynamic and a static full cache, and beside the ceiling by bytes.

SmolLM2-135M in float32. Each shape has one real prompt per arm: essays of $VITALFEW_DATA, whose next tokens are then
fed to all arms in turns. A figure is the minimum over rounds of the time of a step: of the process on one thread, of
the clock on several. A shape whose ceiling is below 1.1 is declined beforehand and has no target.

    python benchmarks/generate/decode.py --out benchmarks/results/decode.json
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sample import command, essay_tokens, sample_model
from transformers import DynamicCache, StaticCache

from vitalfew.core.files import write_document
from vitalfew.generate.ceiling import KVShape, foretell, weight_bytes
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.meter import machine

STATIC = {(4, 4096, 0.5): 1.3, (4, 4096, 0.2): 1.7, (1, 7168, 0.5): 1.12, (1, 7168, 0.2): 1.3}
DYNAMIC = {0.5: 1.6, 0.2: 2.1}
"""Speed over a static cache by rows, tokens and budget, and over a dynamic one with 4 rows, that is asked for."""
NOISE = 1.1
"""How much longer than without noise a step with noise may take."""


def twin(model: Any) -> Any:
    """Return a model of its own over the same weights, so that arms can be enabled side by side."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@dataclass
class Arm:
    """One cache at the end of the prompt, fed some tokens at a time."""

    name: str
    model: Any
    cache: Any
    undo: Callable[[], None] = lambda: None
    done: int = 0
    seconds: list[float] = field(default_factory=list)

    def turn(self, tokens: torch.Tensor, steps: int) -> None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        for k in range(self.done, self.done + steps):
            self.model(tokens[:, k : k + 1], past_key_values=self.cache, logits_to_keep=1)
        self.seconds.append((clock() - start) / steps)
        self.done += steps


def full_arms(model: Any, prompt: torch.Tensor, later: int) -> list[Arm]:
    dynamic = DynamicCache(config=model.config)
    model(prompt, past_key_values=dynamic, logits_to_keep=1)
    static = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + later)
    for index, layer in enumerate(dynamic.layers):
        static.update(layer.keys, layer.values, index)
    return [Arm("dynamic", twin(model), dynamic), Arm("static", twin(model), static)]


def slot_arms(model: Any, prompt: torch.Tensor, later: int, share: float) -> list[Arm]:
    """Return the arms without and with noise; the latter goes on from the slots that the former kept."""
    arms: list[Arm] = []
    for policy in ("keyformer", "keyformer-dynamic"):
        mine = twin(model)
        few = KeyTokens(mine, budget=share, policy=policy, min_length=0)
        cache = few.cache(prompt=prompt.shape[1], max_new_tokens=later)
        if arms:
            cache.load_state_dict(arms[0].cache.state_dict())
        else:
            mine(prompt, past_key_values=cache, logits_to_keep=1)
        arms.append(Arm(f"{policy} {share:.0%}", mine, cache, few.undo))
    return arms


def compare(
    model: Any, text: torch.Tensor, rows: int, length: int, shares: list[float], rounds: int, steps: int, threads: int
) -> list[dict[str, Any]]:
    later = (rounds + 1) * steps
    each = text[: len(text) // rows * rows].view(rows, -1)[:, : length + later]
    assert each.shape[1] == length + later, "the essays are too short"
    torch.set_num_threads(os.cpu_count() or 1)  # reading the prompts is not measured
    arms = full_arms(model, each[:, :length], later)
    for share in shares:
        arms += slot_arms(model, each[:, :length], later, share)
    torch.set_num_threads(threads)
    for turn in range(rounds + 1):
        for arm in arms[:: 1 if turn % 2 else -1]:
            arm.turn(each[:, length:], steps)
    took = {arm.name: min(arm.seconds[1:]) for arm in arms}  # in the first turn kernels compile
    shape, table = KVShape.of(model.config, model.dtype.itemsize), []
    for share in shares:
        ceiling = foretell(shape, weight_bytes(model), rows, length, int(length * share))
        plain, noisy = took[f"keyformer {share:.0%}"], took[f"keyformer-dynamic {share:.0%}"]
        table.append(
            {
                "rows": rows, "tokens": length, "share": share, "ceiling": ceiling.ratio,
                "declined": ceiling.declined.reason if ceiling.declined else "",
                "dynamic ms": 1e3 * took["dynamic"], "static ms": 1e3 * took["static"],
                "slots ms": 1e3 * plain, "slots with noise ms": 1e3 * noisy,
                "over static": took["static"] / plain, "over static, noise": took["static"] / noisy,
                "over dynamic": took["dynamic"] / plain, "over dynamic, noise": took["dynamic"] / noisy,
                "noise": noisy / plain,
            }
        )  # fmt: skip
    for arm in arms:
        arm.undo()
    return table


def missed(row: dict[str, Any]) -> list[str]:
    """Return the targets that a row misses."""
    if row["declined"]:
        return []
    asked = STATIC.get((row["rows"], row["tokens"], row["share"]))
    found = []
    if asked and row["over static, noise"] < asked:
        found.append(f"over static {row['over static, noise']:.2f} < {asked}")
    if asked and row["rows"] == 4 and row["over dynamic, noise"] < DYNAMIC[row["share"]]:
        found.append(f"over dynamic {row['over dynamic, noise']:.2f} < {DYNAMIC[row['share']]}")
    if row["noise"] > NOISE:
        found.append(f"noise {row['noise']:.2f} > {NOISE}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short shape and few rounds: shows that it runs")
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--tokens", default="2048,4096,7168")
    parser.add_argument("--budgets", default="0.5,0.2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = sample_model()
    text = essay_tokens(tokenizer)
    shares = [float(share) for share in args.budgets.split(",")]
    shapes = [(int(r), int(n)) for r in args.rows.split(",") for n in args.tokens.split(",")]
    if args.quick:
        shapes, args.rounds = [(1, 1024)], 4
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for rows, length in shapes:
            for row in compare(model, text, rows, length, shares, args.rounds, args.steps, args.threads):
                row["missed"] = [] if args.quick else missed(row)
                results.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if args.out:
        about = {"command": command(), "machine": machine(), "threads": args.threads, "quick": args.quick}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    return int(any(row["missed"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
