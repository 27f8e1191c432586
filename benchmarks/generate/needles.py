"""Needles in a haystack: how often a number hidden in essays is found again with a part of the cache.

SmolLM2-135M in float32. It mirrors RULER's `niah` tasks (single and multi-key): sentences with seven-digit numbers are
hidden in essays, and the prompt ends with the question for one of them. A sample is right when the answer holds the
number exactly. Three cases differ in what a policy knows when it chooses from the prompt:

    unknown     the question comes after the choice
    seen        the question is the end of the prompt
    told        it is, and `question=` says so: it alone votes

    python benchmarks/generate/needles.py --out benchmarks/results/needles.json

All arms go on from the same keys and values of the haystack: which of its tokens stay is decided later. Each finished
arm is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from corpora import essays
from prompts_once import WINDOW, Beginnings
from sample import command, sample_model

from vitalfew.core.files import read_document, write_document
from vitalfew.generate import H2O, TOVA, Keyformer, Policy, SnapKV, Streaming, then
from vitalfew.meter import machine

LENGTHS, NEEDLES, BUDGETS = (700, 1400, 2800), (1, 3), (0.5, 0.2)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NEW = 10
POLICIES: dict[str, Policy] = {
    "keyformer": Keyformer(),
    "h2o": H2O(),
    "snapkv": SnapKV(),
    "snapkv then h2o": then(SnapKV(64), H2O()),
    "tova": TOVA(),
    "streaming": Streaming(),
}
CASES = ("unknown", "seen", "told")
KEYS = [
    "anchor", "basket", "candle", "desert", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orange", "pencil", "quartz", "ribbon", "saddle", "temple",
]  # fmt: skip
HEAD = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nSome special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n"
)
TAIL = (
    "\nWhat is the special magic number for {key} mentioned in the provided text?<|im_end|>\n<|im_start|>assistant\n"
    "The special magic number for {key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class Sample:
    """A prompt of which the last `question` tokens are the question, and what the answer has to hold."""

    tokens: list[int]
    question: int
    number: str
    depth: float


def samples(tokenizer: Any, length: int, needles: int, each: int) -> list[Sample]:
    """Return so many samples for each depth, all of one length in tokens; the needle asked for lies at the depth."""
    text = [tokenizer(text, verbose=False).input_ids for text in essays().values()]
    hay = [token for tokens in text if len(tokens) > 1000 for token in tokens]
    stops = {token for token in set(hay) if tokenizer.decode([token]).strip() == "."}
    rng, found = random.Random(f"{length} {needles}"), []
    for depth in DEPTHS * each:
        keys = rng.sample(KEYS, needles)
        numbers = [str(rng.randrange(10**6, 10**7)) for _ in keys]
        tail = tokenizer(TAIL.format(key=keys[0])).input_ids
        hidden = [
            tokenizer(f" One of the special magic numbers for {key} is: {number}.").input_ids
            for key, number in zip(keys, numbers, strict=True)
        ]
        head = tokenizer(HEAD).input_ids
        room = length - len(head) - len(tail) - sum(map(len, hidden))
        start = rng.randrange(len(hay) - room)
        body = hay[start : start + room]
        ends = [k + 1 for k, token in enumerate(body) if token in stops]
        places = [depth, *(rng.random() for _ in keys[1:])]
        for place, needle in sorted(zip(places, hidden, strict=True), reverse=True):
            at = min(ends, key=lambda end: abs(end - place * room))
            body[at:at] = needle
        found.append(Sample(head + body + tail, len(tail), numbers[0], depth))
    width = max(sample.question for sample in found)
    return [Sample(s.tokens, width, s.number, s.depth) for s in found]


def answer(begun: Beginnings, policy: Policy, share: float, case: str, question: int) -> list[list[int]]:
    """Return the tokens that follow the prompts, greedily."""
    late = question if case == "unknown" else 0
    told = question if case == "told" else None
    new, found = begun.ids[:, begun.cut :], []
    with begun.resumed(policy, share, begun.ids.shape[1] - late, late + NEW, told) as cache:
        for _ in range(NEW):
            new = begun.model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(1, keepdim=True)
            found.append(new)
    return torch.cat(found, 1).tolist()


def arms() -> list[tuple[str, float, str]]:
    """Return policy, budget and case; the full cache knows no cases, nor has a question an effect on `streaming`."""
    few = [
        (name, share, case) for share in BUDGETS for case in CASES for name in POLICIES
        if (name, case) != ("streaming", "told")
    ]  # fmt: skip
    return [("full", 1.0, "seen"), *few]


def label(name: str, share: float, case: str) -> str:
    return "full" if name == "full" else f"{name} {share:.0%}, {case}"


def table(runs: Mapping[str, Mapping[str, Sequence[bool]]]) -> list[dict[str, Any]]:
    """Return the recall of each arm: in all, by length, by number of needles, by depth; with Wilson's interval."""
    found = []
    for arm in dict.fromkeys(arm for cell in runs.values() for arm in cell):
        cells = {key: cell[arm] for key, cell in runs.items() if arm in cell}
        right = [ok for cell in cells.values() for ok in cell]
        by_depth = {
            f"{d}": [ok for cell in cells.values() for ok in cell[k :: len(DEPTHS)]] for k, d in enumerate(DEPTHS)
        }
        low, high = wilson(sum(right), len(right))
        found.append(
            {
                "arm": arm, "samples": len(right), "recall": sum(right) / len(right), "low": low, "high": high,
                "by cell": {key: sum(cell) / len(cell) for key, cell in cells.items()},
                "by depth": {key: sum(each) / len(each) for key, each in by_depth.items()},
            }
        )  # fmt: skip
    return found


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a share, at 95 %."""
    share, room = right / count, z * z / count
    middle, half = share + room / 2, z * math.sqrt(share * (1 - share) / count + room / (4 * count))
    return (middle - half) / (1 + room), (middle + half) / (1 + room)


def missed(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the policies that find fewer needles when they are told the question than when they only saw it."""
    recall = {row["arm"]: row["recall"] for row in results}
    return [
        f"{name} {share:.0%}: {recall[told]:.2f} told, {recall[other]:.2f} {case}"
        for name in POLICIES
        for share in BUDGETS
        for case in ("unknown", "seen")
        if (told := label(name, share, "told")) in recall
        and recall.get(other := label(name, share, case), 0.0) > recall[told]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short cell and few arms: shows that it runs")
    parser.add_argument("--each", type=int, default=2, help="samples for each depth in a cell")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    about = {
        "command": command(), "machine": machine(), "model": "SmolLM2-135M-Instruct, float32",
        "each": args.each, "depths": list(DEPTHS),
    }  # fmt: skip
    runs: dict[str, dict[str, list[bool]]] = {}
    if args.out and args.out.exists():
        before = read_document(args.out, "benchmark", 1)
        if before["each"] != args.each:
            parser.error(f"{args.out} has {before['each']} samples for each depth: choose another --out")
        runs = before["runs"]
    cells = [(700, 1)] if args.quick else [(length, count) for length in LENGTHS for count in NEEDLES]
    asked = arms()[:4] if args.quick else arms()
    with torch.inference_mode():
        for length, count in cells:
            cell = runs.setdefault(f"{length} tokens, {count} needle{'s' * (count > 1)}", {})
            missing = [arm for arm in asked if label(*arm) not in cell]
            if not missing:
                continue
            of = samples(tokenizer, length, count, args.each)
            ids, question = torch.tensor([sample.tokens for sample in of]), of[0].question
            cut = length - question - WINDOW
            begun = Beginnings(model, ids, cut)
            for name, share, case in missing:
                start, policy = time.time(), POLICIES.get(name, Streaming())
                new = answer(begun, policy, share, case, question)
                right = [s.number in tokenizer.decode(tokens) for s, tokens in zip(of, new, strict=True)]
                cell[label(name, share, case)] = right
                print(
                    f"{length} tokens, {count} needles: {label(name, share, case)}: {sum(right)} of {len(right)} "
                    f"({time.time() - start:.0f} s)", flush=True,
                )  # fmt: skip
                if args.out:
                    results = table(runs)
                    body = {"results": results, "missed": missed(results), "runs": runs}
                    write_document(args.out, "benchmark", 1, {**about, **body})
    results = table(runs)
    for row in sorted(results, key=lambda row: -row["recall"]):
        print(f"{row['arm']:32} recall {row['recall']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    wrong = missed(results)
    print(*wrong, sep="\n")
    return int(bool(wrong) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
