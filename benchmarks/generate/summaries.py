"""Summaries of news articles with a part of the cache: ROUGE against the gold ones, relative to the full cache's.

SmolLM2-135M-Instruct in float32 writes one sentence about XSum articles of 300 to 900 tokens, greedily, in left-padded
batches. `told` arms say by `question=` that the instruction at the end of the prompt is the question.

    python benchmarks/generate/summaries.py --out benchmarks/results/summaries.json

Each finished arm is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from corpora import articles
from quality import POLICIES, spread
from rouge_score.rouge_scorer import RougeScorer
from sample import command, sample_model

from vitalfew.core.files import read_document, write_document
from vitalfew.generate import KeyTokens
from vitalfew.meter import machine

SHORTEST, LONGEST, ARTICLES, BATCH, NEW = 300, 900, 32, 8, 48
QUESTION = 18
"""Tokens of the instruction with the end of the turn and the beginning of the answer."""
ARMS = [
    ("full", 1.0, False),
    *(
        (name, share, told)
        for share in (0.7, 0.5)
        for name in ("keyformer", "h2o", "snapkv", "snapkv then h2o", "streaming", "random")
        for told in (False, True)
        if not told or name in ("keyformer", "snapkv")
    ),
]
BAR = 0.99
"""Of the full cache's ROUGE-2, at 70 %."""
MEASURES = ("rouge1", "rouge2", "rougeL")


def label(name: str, share: float, told: bool) -> str:
    return "full" if name == "full" else f"{name} {share:.0%}" + ", told" * told


def chosen(tokenizer: Any, count: int) -> list[tuple[str, str]]:
    """Return prompts in the model's own layout, alike in length, and the gold summaries."""
    found = []
    for article in articles():
        turn = [{"role": "user", "content": article["prompt"]}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        if SHORTEST <= len(tokenizer(article["text"], verbose=False).input_ids) <= LONGEST:
            found.append((prompt, article["summary"]))
    return sorted(found[:count], key=lambda each: len(each[0]))


def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    texts: list[str] = []
    for first in range(0, len(prompts), BATCH):
        inputs = tokenizer(list(prompts[first : first + BATCH]), return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        texts += tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def table(runs: Mapping[str, Sequence[str]], gold: Sequence[str]) -> dict[str, Any]:
    """Return each arm's mean scores, what they lack to the full cache's, and how near its texts are to those."""
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    scores = {
        arm: [{name: s.fmeasure for name, s in scorer.score(*pair).items()} for pair in zip(gold, texts, strict=True)]
        for arm, texts in runs.items()
    }
    found: dict[str, Any] = {}
    for arm, rows in scores.items():
        full = scores["full"]
        near = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(runs["full"], runs[arm], strict=True)]
        found[arm] = {name: sum(row[name] for row in rows) / len(rows) for name in MEASURES}
        found[arm] |= {
            "rouge2 of full": found[arm]["rouge2"] / found["full"]["rouge2"],
            "rouge2 less full": spread([a["rouge2"] - b["rouge2"] for a, b in zip(rows, full, strict=True)]),
            "rougeL to full's text": sum(near) / len(near),
        }
    return found


def missed(results: Mapping[str, Any]) -> list[str]:
    """Return the default's shortfall at 70 %, with the smallest budget of any arm that reaches the bar."""
    mine = results.get("keyformer 70%")
    if mine is None or mine["rouge2 of full"] >= BAR:
        return []
    enough = [arm for arm, row in results.items() if arm != "full" and row["rouge2 of full"] >= BAR]
    return [f"keyformer 70%: {mine['rouge2 of full']:.3f} of full's ROUGE-2; reached by: {', '.join(enough) or 'none'}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two articles and few arms: shows that it runs")
    parser.add_argument("--articles", type=int, default=ARTICLES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    tokenizer.padding_side = "left"
    pairs = chosen(tokenizer, 2 if args.quick else args.articles)
    prompts, gold = [prompt for prompt, _ in pairs], [summary for _, summary in pairs]
    about = {
        "command": command(), "machine": machine(), "model": "SmolLM2-135M-Instruct, float32",
        "articles": len(pairs), "tokens": NEW,
    }  # fmt: skip
    runs: dict[str, list[str]] = {}
    if args.out and args.out.exists():
        before = read_document(args.out, "benchmark", 1)
        if before["articles"] != len(pairs):
            parser.error(f"{args.out} is of {before['articles']} articles: choose another --out")
        runs = before["runs"]
    for name, share, told in ARMS[:3] if args.quick else ARMS:
        arm, start = label(name, share, told), time.time()
        if arm in runs:
            continue
        if name == "full":
            runs[arm] = generate(model, tokenizer, prompts)
        else:
            question = QUESTION if told else None
            with KeyTokens(model, share, policy=POLICIES[name], min_length=0, question=question):
                runs[arm] = generate(model, tokenizer, prompts)
        results = table(runs, gold)
        print(f"{arm}: ROUGE-2 {results[arm]['rouge2']:.4f} ({time.time() - start:.0f} s)", flush=True)
        if args.out:
            body = {"results": results, "missed": missed(results), "runs": runs}
            write_document(args.out, "benchmark", 1, {**about, **body})
    wrong = missed(table(runs, gold))
    print(*wrong, sep="\n")
    return int(bool(wrong) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
