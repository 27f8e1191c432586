"""Compare caches: the same texts with the full cache and with each policy at each budget.

Every finished run is a file, so a job that was stopped goes on, and one more policy costs only its own runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitalfew.core.budget import Budget
from vitalfew.core.errors import InputError
from vitalfew.core.files import read_document, write_document
from vitalfew.generate.following import Followed, Run, follow, measure
from vitalfew.generate.policies import policy_named

__all__ = ["Arm", "Compared", "Course", "arms_of", "budget_of", "compare_caches", "long_enough"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy at a budget; the full cache has none."""

    policy: str
    budget: str = ""

    @property
    def full(self) -> bool:
        return self.policy == "full"

    @property
    def name(self) -> str:
        return f"{self.policy} {self.budget}".strip()

    @property
    def file(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Course:
    """What every arm has to do.

    Attributes
    ----------
    prompt, continued
        Tokens that are read at once, and tokens that follow one by one.
    recent
        Share of the kept tokens that are the latest; None for each policy's own.
    seed
        Of noise and random choices.
    """

    prompt: int = 512
    continued: int = 128
    recent: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt < 1:
            raise InputError(f"the prompt must have at least 1 token, got {self.prompt}", hint="512 is the default")
        if self.continued < 2:
            raise InputError(f"at least 2 tokens must follow, got {self.continued}", hint="128 is the default")


@dataclass(frozen=True, slots=True)
class Compared:
    """All runs: by arm, one per text. The first arm is the full cache."""

    course: Course
    runs: dict[Arm, tuple[Run, ...]]
    weight_bytes: int

    @property
    def full(self) -> tuple[Run, ...]:
        return self.runs[Arm("full")]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, numbers and texts."""
        arms = [
            {"policy": arm.policy, "budget": arm.budget, "runs": [dataclasses.asdict(run) for run in runs]}
            for arm, runs in self.runs.items()
        ]
        return {"course": dataclasses.asdict(self.course), "weight_bytes": self.weight_bytes, "arms": arms}


def arms_of(policies: Sequence[str], budgets: Sequence[str]) -> list[Arm]:
    """Return the full cache and each policy at each budget.

    Examples
    --------
    >>> [arm.name for arm in arms_of(["full", "h2o"], ["20%", "50%"])]
    ['full', 'h2o 20%', 'h2o 50%']
    """
    few = [name for name in dict.fromkeys(policies) if name != "full"]
    sizes = list(dict.fromkeys(budget.replace(" ", "") for budget in budgets))
    for name in few:
        policy_named(name)
    for size in sizes:
        if budget_of(size).value == 0:
            raise InputError(f"a budget of {size} keeps nothing", hint="such as 20%,50%")
    if not few or not sizes:
        raise InputError("there is nothing to compare the full cache with", hint="--policies snapkv --budgets 20%,50%")
    return [Arm("full"), *(Arm(name, size) for name in few for size in sizes)]


def budget_of(text: str) -> Budget:
    """Return a budget from what people type.

    Examples
    --------
    >>> budget_of("50%") == budget_of("0.5"), budget_of("512").kind, budget_of("64MiB").kind
    (True, 'count', 'bytes')
    """
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return Budget.of(number)
    return Budget.of(text)


def long_enough(texts: Sequence[Sequence[int]], course: Course, most: int | None = None) -> list[list[int]]:
    """Return the beginnings of the texts that have enough tokens, at most so many.

    Examples
    --------
    >>> long_enough([[1] * 9, [2] * 4], Course(prompt=4, continued=2))
    [[1, 1, 1, 1, 1, 1]]
    """
    needed = course.prompt + course.continued
    found = [list(text[:needed]) for text in texts if len(text) >= needed][:most]
    if not found:
        longest = max(map(len, texts), default=0)
        raise InputError(
            f"no text has the {course.prompt} + {course.continued} tokens that are asked for (the longest has "
            f"{longest:,})",
            hint="use a smaller --prompt-tokens or --continue-tokens",
        )
    return found


def compare_caches(
    model: Any,
    texts: Sequence[Sequence[int]],
    arms: Sequence[Arm],
    course: Course,
    out: str | Path,
    progress: Progress = lambda stage, share: None,
) -> Compared:
    """Run every arm on every text and return all figures; finished runs in `out` are not repeated.

    Parameters
    ----------
    model
        A causal language model of transformers.
    texts
        As tokens, each as long as the course; `long_enough` makes them.
    arms
        As `arms_of` returns them.
    out
        A folder for the finished runs. It belongs to this model, these texts and this course; arms may be added.
    progress
        Called with the name of an arm and the share of it that is done.

    Raises
    ------
    InputError
        If the folder holds a comparison of something else.
    """
    folder = Path(out)
    _claim(folder, model, texts, course)
    done = {(i, arm): found for i in range(len(texts)) for arm in arms if (found := _load(folder, i, arm))}
    steps = dict.fromkeys(arms, 0)
    warm: set[str] = set()
    for i, tokens in enumerate(texts):
        missing = [arm for arm in arms[1:] if (i, arm) not in done]
        full: Followed | None = None
        if missing or (i, arms[0]) not in done:
            # What later arms differ from; nothing that takes memory is kept from text to text.
            full = _one(model, tokens, arms[0], course, warm)
        # A machine that slows down must not always meet the same arm: the order turns from text to text.
        turn = i % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            if (i, arm) not in done and full is not None:
                ours = full if arm.full else _one(model, tokens, arm, course, warm)
                done[i, arm] = measure(ours, full, tokens[course.prompt :])
                _save(folder, i, arm, done[i, arm])
            steps[arm] += 1
            progress(arm.name, steps[arm] / len(texts))
    runs = {arm: tuple(done[i, arm] for i in range(len(texts))) for arm in arms}
    return Compared(course, runs, sum(p.nbytes for p in model.parameters()))


def _one(model: Any, tokens: Sequence[int], arm: Arm, course: Course, warm: set[str]) -> Followed:
    """Run one arm; before its policy's first, a run of two steps, which loads and compiles what it needs."""
    lengths = [len(tokens)] if arm.policy in warm else [course.prompt + 2, len(tokens)]
    warm.add(arm.policy)
    found = None
    for length in lengths:
        found = _follow(model, tokens[:length], arm, course)
    assert found is not None
    return found


def _follow(model: Any, tokens: Sequence[int], arm: Arm, course: Course) -> Followed:
    if arm.full:
        return follow(model, tokens, course.prompt)
    from vitalfew.generate.key_tokens import KeyTokens

    few = KeyTokens(
        model, budget_of(arm.budget), policy=arm.policy, recent=course.recent, min_length=0, seed=course.seed
    )
    with few:
        cache = few.cache(prompt=course.prompt, max_new_tokens=course.continued)
        return follow(model, tokens, course.prompt, cache)


def _identity(model: Any, texts: Sequence[Sequence[int]], course: Course) -> dict[str, Any]:
    """Return what makes runs comparable; of the weights, the beginning of each tensor has to do."""
    weights = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in model.state_dict().items():
        weights.update(f"{name} {tuple(value.shape)} {value.dtype} {value.flatten()[:32].tolist()}".encode())
    read = hashlib.sha256("\n".join(" ".join(map(str, tokens)) for tokens in texts).encode())
    return {"model": weights.hexdigest(), "texts": read.hexdigest(), **dataclasses.asdict(course)}


def _claim(folder: Path, model: Any, texts: Sequence[Sequence[int]], course: Course) -> None:
    """See to it that a folder's runs are all of one kind."""
    file, asked = folder / "course.json", _identity(model, texts, course)
    if not file.exists():
        write_document(file, "cache-comparison", 1, asked)
        return
    found = read_document(file, "cache-comparison", 1)
    for name in asked:
        if found.get(name) != asked[name]:
            what = name if name in ("model", "texts") else f"--{_FLAGS[name]} {found.get(name)}"
            raise InputError(f"{folder} holds a comparison with another {what}", hint="choose another --out")


_FLAGS = {"prompt": "prompt-tokens", "continued": "continue-tokens", "recent": "recent", "seed": "seed"}


def _file(folder: Path, text: int, arm: Arm) -> Path:
    return folder / "runs" / f"{text:04}-{arm.file}.json"


def _save(folder: Path, text: int, arm: Arm, run: Run) -> None:
    write_document(_file(folder, text, arm), "cache-run", 1, dataclasses.asdict(run))


def _load(folder: Path, text: int, arm: Arm) -> Run | None:
    file = _file(folder, text, arm)
    if not file.exists():
        return None
    try:
        body = read_document(file, "cache-run", 1)
        return Run(**{**body, "mass": tuple(body["mass"])})
    except (KeyError, TypeError):
        raise InputError(f"{file} is no finished run", hint="remove it and run again") from None
