"""The real texts of $VITALFEW_DATA/generate, as the benchmarks of this folder read them; see the README there."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "generate"
_WRAPPED = re.compile(r"###\nArticle: (.*)\n\n(Summarize the above article in 1 sentence\.)\n", re.DOTALL)


def lines(name: str) -> list[Any]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def essays() -> dict[str, str]:
    return {
        path.name.split(".")[0]: gzip.decompress(path.read_bytes()).decode()
        for path in sorted((DATA / "essays").glob("*.txt.gz"))
    }


def meetings() -> list[str]:
    """Return the second half of each meeting, from a whole turn on: openings are all alike."""
    found = []
    for meeting in lines("qmsum/val.jsonl.gz"):
        turns = [f"{turn['speaker']}: {turn['content']}" for turn in meeting["meeting_transcripts"]]
        found.append("\n".join(turns[len(turns) // 2 :]))
    return found


def articles() -> list[dict[str, str]]:
    """Return each article's `prompt`, which ends with the instruction, its `text` alone, and the gold `summary`."""
    found = []
    for line in lines("xsum/xsum_0shot_first500.jsonl.gz"):
        match = _WRAPPED.fullmatch(line["article"])
        assert match is not None, "the file is not the known one"
        found.append({"prompt": f"{match[1]}\n\n{match[2]}", "text": match[1], "summary": line["summary_gt"].strip()})
    return found


def lambada() -> list[str]:
    return [line["text"] for line in lines("lambada/lambada_test.jsonl.gz")]


def prompts(kind: str) -> list[str]:
    """Return the ``"long"`` or ``"short"`` prompts that OpenVINO GenAI tests its cache eviction with."""
    text = gzip.decompress((DATA / "prompts" / f"{kind}_prompts.txt.gz").read_bytes()).decode()
    return [line for line in text.split("\n") if line.strip()]
