"""Side by side with kvpress: same weights, same tokens, same bytes; each in an environment of its own.

SmolLM2-135M in float32. kvpress needs transformers below 5.3, so its side runs in another Python (`peer_kvpress.py`).
Every figure is relative to the full cache of the same environment:

    quality   KL to the full cache over teacher-forced tokens, of policies that have the same name
    padded    the same for a short text, alone and left-padded in a batch
    needles   numbers found in `needles.py`'s haystacks, with SnapKV
    speed     process time per decode step against a dynamic full cache, in turns, on one thread

A press of kvpress compresses the prompt and lets the cache grow afterwards, where our slots stay as many. Equal bytes
are equal means over the tokens that follow, and what we hold beside keys and values (8 bytes a slot) counts.

    python benchmarks/generate/peers.py --peer PYTHON --out benchmarks/results/peers.json

PYTHON is that of an environment with kvpress 0.5.5, transformers 5.2.0 and torch; `nox -s kvpress` makes one. Finished
parts are in --out; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from decode import Arm, full_arms, twin
from needles import NEW, samples
from prompts_once import WINDOW, Beginnings
from quality import corpus, figures, follow, spread
from sample import command, essay_tokens, sample_model

from vitalfew.core.files import read_document, write_document
from vitalfew.generate import H2O, TOVA, KeyTokens, Policy, SnapKV, Streaming
from vitalfew.generate.weights import smollm2
from vitalfew.meter import machine

PARTS = ("quality", "padded", "needles", "speed")
PROMPT, LATER, TEXTS = 800, 64, 12
SHARES = (0.5, 0.2)
POLICIES: dict[str, Policy] = {"snapkv": SnapKV(), "tova": TOVA(), "streaming": Streaming(), "h2o": H2O()}
SLOT, MORE = 512, 8
"""Bytes of one slot's key and value (64 numbers each, float32), and of what we keep beside them."""
SLACK = 1.05
"""How much larger than kvpress' KL ours may be."""


def theirs(kept: int, later: int) -> int:
    """Return what kvpress keeps of a prompt to hold, in the mean over the later tokens, the bytes of our slots."""
    return kept * (SLOT + MORE) // SLOT - later // 2


def arms(prompt: int, later: int) -> list[dict[str, Any]]:
    """Return kvpress' arms; TOVA also chooses anew at each step, and then holds as many slots as we do."""
    found = []
    for share in SHARES:
        kept = int(Fraction(str(share)) * prompt)
        found += [{"name": name, "label": f"{name} {share:.0%}", "keep": theirs(kept, later)} for name in POLICIES] + [
            {"name": "tova each step", "label": f"tova each step {share:.0%}", "keep": theirs(kept, 0)}
        ]
    return found


# Our side of each part


def quality(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    full = list(follow(model, ids, PROMPT))
    found = {"full": figures(iter(full), full, ids)}
    begun = Beginnings(model, ids, PROMPT - WINDOW)
    for share in SHARES:
        for name, policy in POLICIES.items():
            with begun.resumed(policy, share, PROMPT, LATER) as cache:
                found[f"{name} {share:.0%}"] = figures(follow(model, ids, PROMPT, cache, begun.cut), full, ids)
            kl = sum(row["kl"] for row in found[f"{name} {share:.0%}"]) / len(ids)
            print(f"ours {name} {share:.0%}: KL {kl:.4f}", flush=True)
    return found


def with_mask(model: Any, ids: torch.Tensor, mask: torch.Tensor, prompt: int, cache: Any) -> Iterator[torch.Tensor]:
    at, start = (mask.cumsum(1) - 1).clamp(min=0), 0
    for end in range(prompt, ids.shape[1]):
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=at[:, start:end], past_key_values=cache,
            logits_to_keep=1,
        )  # fmt: skip
        start = end
        yield out.logits[:1, -1].log_softmax(-1)


def padded(model: Any, ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> dict[str, Any]:
    pad, later = int((mask[0] == 0).sum()), ids.shape[1] - prompt
    alone = ids[:1, pad:]
    full, found = list(follow(model, alone, prompt - pad)), {}
    with KeyTokens(model, 0.5, policy="snapkv", min_length=0) as few:
        one = follow(model, alone, prompt - pad, few.cache(prompt - pad, later))
        found["alone"] = figures(one, full, alone)[0]
        both = with_mask(model, ids, mask, prompt, few.cache(prompt, later))
        found["in a batch"] = figures(both, full, alone)[0]
    return found


def needles(model: Any, tokenizer: Any, cells: list[tuple[int, int]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return kvpress' job, and how many needles we find with SnapKV, told the question or not."""
    jobs, found = [], {}
    for length, count in cells:
        of, label = samples(tokenizer, length, count, 2), f"{length} tokens, {count}"
        kept = {share: int(Fraction(str(share)) * length) for share in SHARES}
        few = [{"name": "snapkv", "label": f"snapkv {s:.0%}", "keep": theirs(kept[s], NEW)} for s in SHARES]
        ids = torch.tensor([sample.tokens for sample in of])
        jobs.append(
            {"label": label, "prompts": ids.tolist(), "new": NEW, "arms": few, "numbers": [s.number for s in of]}
        )
        begun = Beginnings(model, ids, length - of[0].question - WINDOW)
        for share in SHARES:
            for told in (None, of[0].question):
                new, answers = ids[:, begun.cut :], []
                with begun.resumed(SnapKV(), share, length, NEW, told) as cache:
                    for _ in range(NEW):
                        new = model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(1, keepdim=True)
                        answers.append(new)
                key = f"snapkv {share:.0%}" + (", told the question" if told else "")
                found.setdefault(label, {})[key] = torch.cat(answers, 1).tolist()
    return jobs, found


def speed(model: Any, ids: torch.Tensor, prompt: int, rounds: int, steps: int) -> dict[str, float]:
    """Return seconds of process time per decode step: the least over rounds, arms in turns."""
    run = [arm for arm in full_arms(model, ids[:, :prompt], ids.shape[1] - prompt) if arm.name == "dynamic"]
    run[0].name = "full"
    for share in SHARES:
        mine = twin(model)
        few = KeyTokens(mine, share, policy="snapkv", min_length=0)
        cache = few.cache(prompt, ids.shape[1] - prompt)
        mine(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        run.append(Arm(f"snapkv {share:.0%}", mine, cache, few.undo))
    for turn in range(rounds):
        for arm in run[:: 1 if turn % 2 else -1]:
            arm.turn(ids[:, prompt:], steps)
    for arm in run:
        arm.undo()
    return {arm.name: min(arm.seconds[1:]) for arm in run}


# Both sides together


def their_side(python: str, model: Path, job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ask, reply = Path(folder) / "job.json", Path(folder) / "result.json"
        ask.write_text(json.dumps({"model": str(model), **job}))
        script = Path(__file__).with_name("peer_kvpress.py")
        subprocess.run([python, str(script), str(ask), str(reply)], check=True)
        found: dict[str, Any] = json.loads(reply.read_text())
    return found


@dataclass
class Sides:
    """What a part needs: our model, and kvpress' Python with a folder of the same weights."""

    model: Any
    tokenizer: Any
    folder: Path
    python: str
    quick: bool
    versions: dict[str, str] = field(default_factory=dict)

    def ask(self, part: str, job: Any) -> Any:
        found = their_side(self.python, self.folder, {part: job})
        self.versions = found["versions"]
        return found[part]

    def quality(self) -> dict[str, Any]:
        texts = corpus(self.tokenizer, PROMPT + LATER)[: 2 if self.quick else TEXTS]
        ids = torch.tensor([tokens for _, tokens in texts])
        job = {"texts": ids.tolist(), "prompt": PROMPT, "arms": arms(PROMPT, LATER)}
        reply = self.ask("quality", job)
        mine, rows, table = quality(self.model, ids), reply["rows"], []
        for arm in job["arms"]:
            label = arm["label"].replace(" each step", "")
            pairs = list(zip(mine[label], rows[arm["label"]], strict=True))
            ours, other = (sum(row["kl"] for row in side) / len(side) for side in zip(*pairs, strict=True))
            kept = PROMPT * int(label.split()[-1][:-1]) // 100
            table.append(
                {
                    "ours": label, "kvpress": arm["label"], "slots": kept,
                    "kvpress slots": [arm["keep"], reply["slots at the end"][arm["label"]]],
                    "kl": ours, "kvpress kl": other, "ratio": ours / other,
                    "kl less theirs": spread([a["kl"] - b["kl"] for a, b in pairs]),
                    "agreement": sum(a["agreement"] for a, _ in pairs) / len(pairs),
                    "kvpress agreement": sum(b["agreement"] for _, b in pairs) / len(pairs),
                }
            )  # fmt: skip
        worse = [f"{row['ours']}: KL {row['ratio']:.2f} of {row['kvpress']}" for row in table if row["ratio"] > SLACK]
        nll = max(abs(a["nll"] - b["nll"]) for a, b in zip(mine["full"], rows["full"], strict=True))
        return {
            "texts": [name for name, _ in texts], "full caches differ in nll by at most": nll, "table": table,
            "missed": worse,
        }  # fmt: skip

    def padded(self) -> dict[str, Any]:
        """Let a text of 300 tokens stand beside one of 600; 32 tokens follow."""
        (_, long), (_, short) = corpus(self.tokenizer, 632)[:2]
        prompt, pad = 600, 300
        ids = torch.tensor([[0] * pad + short[: 632 - pad], long])
        mask = torch.ones_like(ids)
        mask[0, :pad] = 0
        keep = {"keep": theirs(prompt // 2, 32), "keep alone": theirs((prompt - pad) // 2, 32)}
        job = {"texts": ids.tolist(), "mask": mask.tolist(), "prompt": prompt, "pad": pad, **keep}
        found = {"kvpress": self.ask("padded", job), "ours": padded(self.model, ids, mask, prompt)}
        wrong = (
            [] if found["ours"]["in a batch"]["kl"] < found["ours"]["alone"]["kl"] + 1e-4 else ["padding changes ours"]
        )
        return {**found, "missed": wrong}

    def needles(self) -> dict[str, Any]:
        cells = [(700, 1)] if self.quick else [(700, 1), (700, 3), (1400, 1), (1400, 3)]
        job, mine = needles(self.model, self.tokenizer, cells)
        reply, right = self.ask("needles", job), {}
        for cell in job:
            for side, answers in (("ours", mine[cell["label"]]), ("kvpress", reply[cell["label"]])):
                for arm, tokens in answers.items():
                    decoded = zip(cell["numbers"], self.tokenizer.batch_decode(tokens), strict=True)
                    right.setdefault(f"{side}, {arm}", []).extend(number in text for number, text in decoded)
        recall = {arm: sum(found) / len(found) for arm, found in right.items()}
        wrong = [
            f"needles, {share:.0%}: fewer than kvpress" for share in SHARES
            if recall[f"ours, snapkv {share:.0%}, told the question"] < recall[f"kvpress, snapkv {share:.0%}"]
        ]  # fmt: skip
        return {"samples": len(next(iter(right.values()))), "recall": recall, "missed": wrong}

    def speed(self) -> dict[str, Any]:
        """Decode with 4 rows of 4096 tokens."""
        prompt, rounds, steps = (256, 2, 2) if self.quick else (4096, 7, 4)
        ids = essay_tokens(self.tokenizer)
        ids = ids[: len(ids) // 4 * 4].view(4, -1)[:, : prompt + rounds * steps]
        few = [
            {
                "name": "snapkv",
                "label": f"snapkv {s:.0%}",
                "keep": theirs(int(Fraction(str(s)) * prompt), rounds * steps),
            }
            for s in SHARES
        ]
        job = {"texts": ids.tolist(), "prompt": prompt, "arms": few, "rounds": rounds, "steps": steps}
        found = {"ours": speed(self.model, ids, prompt, rounds, steps), "kvpress": self.ask("speed", job)}
        over = {side: {arm: took["full"] / took[arm] for arm in took} for side, took in found.items()}
        wrong = [
            f"speed, {arm}: less over full than kvpress"
            for arm in over["ours"]
            if over["ours"][arm] < over["kvpress"][arm]
        ]
        return {"rows": 4, "tokens": prompt, "seconds per step": found, "over its full cache": over, "missed": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="of an environment with kvpress")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few short texts: shows that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sample_model()
    sides = Sides(model, tokenizer, smollm2(), args.peer, args.quick)
    parts: dict[str, Any] = read_document(args.out, "benchmark", 1)["parts"] if args.out and args.out.exists() else {}
    for name in args.parts.split(","):
        if name not in PARTS:
            parser.error(f"there is no {name!r}; parts: {', '.join(PARTS)}")
        if name in parts:
            continue
        with torch.inference_mode():
            parts[name] = getattr(sides, name)()
        print(json.dumps(parts[name], indent=1), flush=True)
        if args.out:
            about = {
                "command": command(), "machine": machine(), "quick": args.quick,
                "model": "SmolLM2-135M-Instruct, float32", "peer": sides.versions, "parts": parts,
            }  # fmt: skip
            write_document(args.out, "benchmark", 1, about)
    wrong = [line for part in parts.values() for line in part["missed"]]
    print(*wrong, sep="\n")
    return int(bool(wrong) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
