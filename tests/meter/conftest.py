"""Instruments that show what a test tells them to."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from vitalfew.meter.energy import Energy
from vitalfew.meter.instruments import Instruments
from vitalfew.meter.memory import PeakRss
from vitalfew.meter.model import BUSY_CORE, IDLE_CORE, Power
from vitalfew.meter.sources import Absent, SourceLost

POWER = Power(IDLE_CORE, BUSY_CORE, "nominal")


@dataclass
class FakeCounter:
    """A counter of joules that a test moves, breaks and mends."""

    name: str = "package0"
    scope: str = "package"
    how: str = "measured"
    reason: str = ""
    detail: str = "a scripted counter"
    error: float = 0.0
    max_gap: float = float("inf")
    power: Power | None = POWER
    joules: float = 0.0
    broken: str = ""
    reads: int = 0

    def read(self) -> float:
        self.reads += 1
        if self.broken:
            raise SourceLost(self.broken)
        return self.joules


@dataclass
class Bench:
    """The state of a pretended machine, moved by `work`."""

    wall: float = 100.0
    cpu: float = 50.0
    cpu_children: float = 0.0
    asleep: float = 0.0
    disk: tuple[int, int] | None = (0, 0)
    counter: FakeCounter = field(default_factory=FakeCounter)
    rss: int = 1000
    mark: int = 1000

    def work(self, seconds: float) -> None:
        self.wall += seconds
        self.cpu += seconds / 2
        self.counter.joules += 3 * seconds

    def touch(self, amount: int) -> None:
        self.rss += amount
        self.mark = max(self.mark, self.rss)

    def _reset(self) -> bool:
        self.mark = self.rss
        return True

    def instruments(self) -> Instruments:
        model = Absent("process", "process model", "no counter", Power(busy=BUSY_CORE))
        return Instruments(
            clock=lambda: self.wall,
            cpu=lambda: self.cpu,
            cpu_children=lambda: self.cpu_children,
            asleep=lambda: self.asleep,
            disk=lambda: self.disk,
            energy=Energy([self.counter, model]),
            peaks=PeakRss(lambda: (self.rss, self.mark), self._reset),
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()
