"""The energy of a span of time: every source is read at both ends, and what was lost in between is modelled."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from vitalfew.meter.figure import Figure
from vitalfew.meter.sources import Source, SourceLost

__all__ = ["Energy", "Sample"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one source: joules if it had any, and how often it was lost so far.

    Examples
    --------
    >>> Sample(joules=12.5, losses=0).joules
    12.5
    """

    joules: float | None
    losses: int


class Energy:
    """Read a set of sources, and turn two readings into figures.

    Parameters
    ----------
    sources
        Those with neither a counter nor a model to fall back on give no figure.

    Examples
    --------
    >>> from vitalfew.meter.model import Power, Watts
    >>> from vitalfew.meter.sources import Absent
    >>> energy = Energy([Absent("process", "process model", "no counter", Power(busy=Watts(2, 5, 12)))])
    >>> print(*energy.figures(energy.read(), energy.read(), wall=10, cpu=4))
    20 J (8-48 J), modelled: busy 5 W (2-12 W); no counter
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = [source for source in sources if not source.reason or source.power]
        self._losses = [0] * len(self._sources)
        self._why = [source.reason for source in self._sources]
        self._lock = threading.Lock()
        self.max_gap = min((source.max_gap for source in self._sources), default=math.inf)

    def read(self) -> tuple[Sample, ...]:
        """Return one sample per source."""
        return tuple(self._sample(index, source) for index, source in enumerate(self._sources))

    def _sample(self, index: int, source: Source) -> Sample:
        if source.reason:
            return Sample(None, 0)
        try:
            joules = source.read()
        except SourceLost as lost:
            # The count, not the sample, tells a scope that lost its source in between and found it again at its end.
            with self._lock:
                self._losses[index] += 1
                self._why[index] = str(lost)
                return Sample(None, self._losses[index])
        return Sample(joules, self._losses[index])

    def figures(
        self, start: Sequence[Sample], end: Sequence[Sample], *, wall: float | None, cpu: float | None
    ) -> list[Figure]:
        """Return the joules of each source between two readings.

        Parameters
        ----------
        start, end
            What `read` returned.
        wall, cpu
            Seconds between them, for the models; None where the clock failed, and then no model gives a figure.
        """
        figures = []
        for source, first, last, why in zip(self._sources, start, end, self._why, strict=True):
            name = f"energy_{source.name}"
            if first.joules is not None and last.joules is not None and first.losses == last.losses:
                joules = last.joules - first.joules
                low, high = max(0.0, joules - source.error), joules + source.error
                figures.append(Figure(name, joules, "J", source.how, low, high, source.detail))
            elif source.power and wall is not None and cpu is not None:
                figures.append(source.power.energy(name, wall=wall, cpu=cpu, why=why))
        return figures
