"""How much worse a model foretells real text with each policy and budget: NLL, KL to the full cache, top-1 agreement.

SmolLM2-135M in float32. Each text is read up to the prompt's length; the tokens after it are fed one by one (teacher
forcing), and before each of them the model's distribution is compared with the one it has with the full cache. Texts
are essays, meetings (from a whole turn on) and long news articles, of equal length. Intervals are Student's t over
texts, of paired differences. Nothing in here depends on speed, so it may run beside other work.

    python benchmarks/generate/quality.py --out benchmarks/results/generate_quality.json

Each finished arm is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from corpora import articles, essays, lambada, meetings
from prompts_once import WINDOW, Beginnings
from sample import command, sample_model

from vitalfew.core.files import read_document, write_document
from vitalfew.core.intervals import mean_interval
from vitalfew.generate import H2O, TOVA, Keyformer, KeyTokens, Policy, Random, Recent, SnapKV, Streaming, then
from vitalfew.meter import machine

PROMPT, LATER, EACH = 800, 200, 9
POLICIES: dict[str, Policy] = {
    "keyformer": Keyformer(),
    "keyformer-dynamic": Keyformer.dynamic(),
    "keyformer-frozen": Keyformer.frozen(),
    "h2o": H2O(),
    "h2o recent 30%": H2O(recent=0.3),
    "snapkv": SnapKV(),
    "snapkv then h2o": then(SnapKV(64), H2O()),
    "tova": TOVA(),
    "streaming": Streaming(),
    "recent": Recent(),
    "random": Random(),
}
ARMS = [
    *((name, budget) for budget in (0.5, 0.2) for name in POLICIES),
    *((name, 0.7) for name in ("keyformer", "h2o", "snapkv", "snapkv then h2o", "streaming")),
]
CONTROLS = ("recent", "random")
PAIRS = [
    ("keyformer-dynamic", "keyformer-frozen"),
    *(("keyformer", name) for name in POLICIES if name != "keyformer"),
]
"""Policies that are compared text by text at the same budget."""
FIGURES = ("nll", "kl", "agreement")


def label(name: str, share: float) -> str:
    return f"{name} {share:.0%}"


def corpus(tokenizer: Any, length: int) -> list[tuple[str, list[int]]]:
    """Return as many texts of each kind, kinds in turn, cut to one length."""
    essay, meeting = list(essays().items()), meetings()
    kinds = [
        [(f"essay {name}", text) for name, text in essay],
        [(f"meeting {k}", text) for k, text in enumerate(meeting)],
        [(f"article {k}", each["text"]) for k, each in enumerate(articles()) if len(each["text"]) > 4 * length],
    ]
    found = []
    for texts in kinds:
        ids = ((name, tokenizer(text, verbose=False).input_ids[:length]) for name, text in texts)
        found.append([(name, tokens) for name, tokens in ids if len(tokens) == length][:EACH])
    return [text for three in zip(*found, strict=True) for text in three]


def follow(model: Any, ids: torch.Tensor, prompt: int, cache: Any = None, read: int = 0) -> Iterator[torch.Tensor]:
    """Yield, before each token after the prompt, the log-probabilities ``(rows, vocabulary)``."""
    for end in range(prompt, ids.shape[1]):
        out = model(ids[:, read:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, read = out.past_key_values, end
        yield out.logits[:, -1].log_softmax(-1)


def figures(ours: Iterator[torch.Tensor], full: Sequence[torch.Tensor], ids: torch.Tensor) -> list[dict[str, float]]:
    """Return, for each row, the means over the tokens after the prompt."""
    rows, prompt = ids.shape[0], ids.shape[1] - len(full)
    sums = torch.zeros(3, rows, dtype=torch.float64)
    for k, (q, p) in enumerate(zip(ours, full, strict=True)):
        sums[0] -= q.gather(1, ids[:, prompt + k, None])[:, 0]
        sums[1] += (p.exp() * (p - q)).sum(1)
        sums[2] += p.argmax(1) == q.argmax(1)
    return [dict(zip(FIGURES, row, strict=True)) for row in (sums / len(full)).T.tolist()]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over texts with its interval, at 95 %."""
    found = mean_interval(values, 0.95)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return each arm's figures, and what it adds to the full cache's."""
    return {
        arm: {name: spread([row[name] for row in rows]) for name in FIGURES}
        | {"added nll": spread([ours["nll"] - full["nll"] for ours, full in zip(rows, runs["full"], strict=True)])}
        for arm, rows in runs.items()
    }


def duels(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return paired differences, text by text, between two policies at the same budget."""
    found = []
    for budget in sorted({share for _, share in ARMS}, reverse=True):
        for one, other in PAIRS:
            a, b = runs.get(label(one, budget)), runs.get(label(other, budget))
            if a and b:
                gap = {name: spread([x[name] - y[name] for x, y in zip(a, b, strict=True)]) for name in FIGURES}
                found.append({"budget": budget, "one": one, "other": other, "one less other": gap})
    return found


def missed(results: Mapping[str, Any]) -> list[str]:
    """Return what the figures at 50 % do not hold."""
    kl = {arm: row["kl"]["mean"] for arm, row in results.items()}
    bar = min(kl.get(f"{name} 50%", math.inf) for name in CONTROLS) / 5
    found = [
        f"{name}: KL {kl[f'{name} 50%']:.3f} is more than a fifth of a control's ({bar:.3f})"
        for name in POLICIES
        if name not in (*CONTROLS, "streaming") and kl.get(f"{name} 50%", 0.0) > bar
    ]
    if kl.get("keyformer-dynamic 50%", 0.0) > kl.get("keyformer-frozen 50%", math.inf):
        found.append("the dynamic choice is worse than the frozen one")
    return found


def short_texts(model: Any, tokenizer: Any, count: int, new: int = 8) -> int:
    """Return how many of some LAMBADA passages, all below `min_length`, go on as with the full cache."""
    same = 0
    for text in lambada()[:count]:
        prompt = tokenizer(text.rpartition(" ")[0], return_tensors="pt")
        plain = model.generate(**prompt, max_new_tokens=new, do_sample=False)
        with KeyTokens(model, 0.5):
            same += int(plain.equal(model.generate(**prompt, max_new_tokens=new, do_sample=False)))
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short texts and few arms: shows that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    prompt, later, arms = (200, 20, ARMS[:4]) if args.quick else (PROMPT, LATER, ARMS)
    texts = corpus(tokenizer, prompt + later)[: 3 if args.quick else None]
    about = {
        "command": command(), "machine": machine(), "model": "SmolLM2-135M-Instruct, float32",
        "prompt": prompt, "later": later, "texts": [name for name, _ in texts],
        "tokens": hashlib.sha256(repr(texts).encode()).hexdigest()[:16],
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {}
    short: dict[str, int] = {}
    if args.out and args.out.exists():
        before = read_document(args.out, "benchmark", 1)
        if any(before[name] != about[name] for name in ("prompt", "later", "tokens")):
            parser.error(f"{args.out} is of other texts: choose another --out")
        runs, short = before["runs"], before["short texts"]

    def keep() -> None:
        if args.out:
            results = table(runs)
            body = {"results": results, "pairs": duels(runs), "missed": missed(results), "short texts": short}
            write_document(args.out, "benchmark", 1, {**about, **body, "runs": runs})

    ids = torch.tensor([tokens for _, tokens in texts])
    cut = prompt - WINDOW
    begun = Beginnings(model, ids, cut)
    missing = [arm for arm in arms if label(*arm) not in runs]
    with torch.inference_mode():
        if missing:
            full = list(follow(model, ids, prompt))
            runs["full"] = figures(iter(full), full, ids)
        for name, share in missing:
            start = time.time()
            with begun.resumed(POLICIES[name], share, prompt, later) as cache:
                mine = figures(follow(model, ids, prompt, cache, cut), full, ids)
            runs[label(name, share)] = mine
            keep()
            kl, agree = (sum(row[what] for row in mine) / len(mine) for what in ("kl", "agreement"))
            print(f"{label(name, share)}: KL {kl:.4f}, top-1 {agree:.3f} ({time.time() - start:.0f} s)", flush=True)
        if not short:
            count = 2 if args.quick else 50
            short = {"passages": count, "same tokens": short_texts(model, tokenizer, count)}
            print(f"LAMBADA, below min_length: {short['same tokens']} of {count} the same as full", flush=True)
            keep()
    results = table(runs)
    for arm, row in sorted(results.items(), key=lambda item: item[1]["kl"]["mean"]):
        kl, added, agreement = (row[what]["mean"] for what in ("kl", "added nll", "agreement"))
        print(f"{arm:24} KL {kl:.4f}, added NLL {added:+.4f}, top-1 {agreement:.3f}")
    wrong = missed(results)
    print(*wrong, sep="\n")
    return int(bool(wrong) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
