"""What a source of energy figures is, and the null source that stands for one that is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from vitalfew.core.errors import VitalfewError
from vitalfew.meter.figure import How
from vitalfew.meter.model import Power

__all__ = ["Absent", "Covers", "Source", "SourceLost"]

Covers = Literal["package", "gpu", "process model"]


class SourceLost(VitalfewError):
    """A source has no joules to tell, with the reason.

    Examples
    --------
    >>> print(SourceLost("the counter of gpu0 was reset"))
    the counter of gpu0 was reset
    """


class Source(Protocol):
    """Something that tells joules.

    Attributes
    ----------
    name
        The figure is named after it: ``gpu0`` gives ``energy_gpu0``.
    scope
        What the joules cover; a package or a GPU is never the whole machine.
    how
        The origin of its figures.
    reason
        Empty where the source can be read, else why not and what to do.
    error
        Joules by which the difference of two readings may be off.
    max_gap
        Seconds after which it must be read again, or it may miss a turn of its counter.
    power
        The model to fall back on; without one a missing source gives no figure.

    Examples
    --------
    >>> source: Source = Absent("gpu", "gpu", "NVML finds no GPU")
    >>> source.name, source.how, source.reason
    ('gpu', 'modelled', 'NVML finds no GPU')
    """

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Covers: ...
    @property
    def how(self) -> How: ...
    @property
    def reason(self) -> str: ...
    @property
    def error(self) -> float: ...
    @property
    def max_gap(self) -> float: ...
    @property
    def power(self) -> Power | None: ...
    @property
    def detail(self) -> str:
        """Return which counter or formula it is."""

    def read(self) -> float:
        """Return joules since some moment in the past, never falling; raise `SourceLost` where it cannot."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A source that cannot be read, and why: a null object, so that nothing is left out in silence.

    Examples
    --------
    >>> Absent("package0", "package", "energy_uj cannot be read; fix: chmod a+r").read()
    Traceback (most recent call last):
    vitalfew.meter._source.SourceLost: energy_uj cannot be read; fix: chmod a+r
    """

    name: str
    scope: Covers
    reason: str
    power: Power | None = None
    how: How = "modelled"
    error: float = 0.0
    max_gap: float = math.inf

    @property
    def detail(self) -> str:
        """Return what is known of it."""
        return self.reason

    def read(self) -> float:
        """Raise `SourceLost`."""
        raise SourceLost(self.reason)
