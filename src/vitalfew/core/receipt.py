"""The account of what was saved, what it cost in quality, and how sure we are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vitalfew.core.errors import InputError
from vitalfew.core.files import read_document, write_document

__all__ = ["Curve", "Declined", "How", "Line", "Pair", "Prediction", "Quality", "Receipt", "Verdict"]

How = Literal["measured", "counted", "modelled"]
Verdict = Literal["saved", "no saving", "quality lost", "undecided"]

SCHEMA_VERSION = 1
_HOWS = ("measured", "counted", "modelled")
_VERDICTS = ("saved", "no saving", "quality lost", "undecided")


def _plain(value: Any) -> Any:
    """Turn a scalar of NumPy or PyTorch into a number of Python."""
    if not hasattr(value, "item"):
        raise InputError(f"a receipt cannot hold {value!r}", hint="pass numbers, texts, lists and dicts")
    return value.item()


@dataclass(frozen=True, slots=True)
class Line:
    """One thing before and after.

    Attributes
    ----------
    what, unit
        Such as ``"time per epoch"`` and ``"s"``.
    before, after
        The baseline's figure and ours; None where there is none.
    how
        ``"measured"`` (a clock or counter saw it), ``"counted"`` (exact arithmetic) or ``"modelled"`` (a formula).
    low, high
        The interval of `after`, where there is one.
    note
        The source, the coefficients, or what to know when reading it.
    """

    what: str
    unit: str
    before: float | None
    after: float | None
    how: How
    low: float | None = None
    high: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.how not in _HOWS:
            raise InputError(f"how must be one of {', '.join(_HOWS)}, got {self.how!r}", hint="say where it comes from")
        for value in (self.before, self.after, self.low, self.high):
            if value is not None and not math.isfinite(value):
                raise InputError(f"the line {self.what!r} holds {value}", hint="use None where there is no figure")

    @property
    def ratio(self) -> float | None:
        """How many times less than before, where both are known and positive."""
        if self.before is None or self.after is None or self.before <= 0 or self.after <= 0:
            return None
        return self.before / self.after


@dataclass(frozen=True, slots=True)
class Quality:
    """The paired quality difference, ours minus the baseline, with its interval and the tolerance it is held to."""

    metric: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    tolerance: float
    finding: Literal["equivalent", "better", "worse", "unclear"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One paired run: both arms with the same seed and the same data in the same order."""

    seed: int
    first: Literal["base", "few"]
    base_cost: float
    few_cost: float
    base_quality: float
    few_quality: float
    base_work: float = 1.0
    few_work: float = 1.0

    def __post_init__(self) -> None:
        for value in (self.base_cost, self.few_cost, self.base_work, self.few_work):
            if not 0 < value < math.inf:
                raise InputError(f"the pair of seed {self.seed} holds the cost or work {value}", hint="measure it")
        for value in (self.base_quality, self.few_quality):
            if not math.isfinite(value):
                raise InputError(f"the pair of seed {self.seed} holds the quality {value}", hint="drop that pair")


@dataclass(frozen=True, slots=True)
class Declined:
    """A method that was looked at and left, with the figures that say why."""

    method: str
    reason: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was foretold, and what came."""

    what: str
    unit: str
    predicted: float
    measured: float
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """A coverage curve: (share of the items, share of the work), both rising."""

    name: str
    points: tuple[tuple[float, float], ...]
    num_items: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """The account. It prints itself, and saves itself with a digest that a later edit breaks.

    Examples
    --------
    >>> r = Receipt("demo", "fused rows", (Line("time", "s", 10.0, 2.0, "measured"),), "undecided", "one pair only")
    >>> r.lines[0].ratio, r.verdict
    (5.0, 'undecided')
    """

    title: str
    method: str
    lines: tuple[Line, ...]
    verdict: Verdict
    why: str
    rule: str = ""
    quality: tuple[Quality, ...] = ()
    pairs: tuple[Pair, ...] = ()
    pairs_needed: int | None = None
    overhead: tuple[Line, ...] = ()
    declined: tuple[Declined, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    made: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in _VERDICTS:
            raise InputError(f"a verdict is one of {', '.join(_VERDICTS)}, got {self.verdict!r}", hint="compute it")

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, numbers and texts."""
        text = json.dumps(dataclasses.asdict(self), allow_nan=False, default=_plain)
        plain: dict[str, Any] = json.loads(text)
        return plain

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Receipt:
        """Build a receipt from `to_dict`'s output; keys this version does not know are an error."""
        parts: dict[str, type] = {
            "lines": Line,
            "overhead": Line,
            "quality": Quality,
            "pairs": Pair,
            "declined": Declined,
            "predictions": Prediction,
        }
        values = dict(body)
        try:
            for name, kind in parts.items():
                values[name] = tuple(kind(**item) for item in values.get(name, ()))
            values["curves"] = tuple(
                Curve(**{**curve, "points": tuple((x, y) for x, y in curve["points"])})
                for curve in values.get("curves", ())
            )
            values["notes"] = tuple(values.get("notes", ()))
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"this is not a receipt: {error}", hint="make it again") from None

    def digest(self) -> str:
        """Return the SHA-256 over the content in canonical JSON."""
        return _digest(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the receipt with its digest, in one step."""
        write_document(path, "receipt", SCHEMA_VERSION, {"digest": self.digest(), **self.to_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Receipt:
        """Read a receipt.

        Raises
        ------
        InputError
            If it is no receipt, or (with `verify`) its content no longer has the digest it was saved with.
        """

        def as_written(body: dict[str, Any]) -> None:
            said, found = body.get("digest"), _digest({k: v for k, v in body.items() if k != "digest"})
            if said != found:
                raise InputError(
                    f"{path} was changed after it was written: it says {str(said)[:19]}..., "
                    f"its content has {found[:19]}...",
                    hint="ask for the original, or make it again",
                )

        body = read_document(path, "receipt", SCHEMA_VERSION, check=as_written if verify else None)
        body.pop("digest", None)
        return cls.from_dict(body)


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
