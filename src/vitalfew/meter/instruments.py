"""The clocks and counters of the process, read together at both ends of a scope."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vitalfew.core.errors import need
from vitalfew.meter.energy import Energy, Sample
from vitalfew.meter.memory import PROCESS, PeakRss
from vitalfew.meter.sources import sources

__all__ = ["Instruments", "Reading", "default"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What all instruments showed at one moment: seconds, bytes and joules since some moment in the past.

    Examples
    --------
    >>> Reading(wall=2.5, cpu=1.0, cpu_children=0.0, asleep=0.0, disk=None, energy=()).wall
    2.5
    """

    wall: float
    cpu: float
    cpu_children: float
    asleep: float
    disk: tuple[int, int] | None
    energy: tuple[Sample, ...]


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _asleep() -> float:
    """Return the seconds that the machine was suspended, which ``perf_counter`` leaves out."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def _disk() -> Callable[[], tuple[int, int] | None]:
    """Return a reader of the bytes that the process moved to and from storage."""
    psutil = need("psutil")
    process = psutil.Process()

    def read() -> tuple[int, int] | None:
        counters: Any = process.io_counters()
        return counters.read_bytes, counters.write_bytes

    try:
        read()
    except (AttributeError, NotImplementedError, OSError, psutil.Error):
        # Some systems have no such counter, and some containers hide it.
        return lambda: None
    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """Where the readings of a scope come from; each can be replaced by another function.

    Parameters
    ----------
    clock, cpu, cpu_children, asleep
        Seconds: passing, of CPU time of the process, of CPU time of its children that were waited for, suspended.
    disk
        Bytes read from and written to storage, or None where the system does not tell.
    energy
        The sources of joules.
    peaks
        The high-water mark of memory.

    Examples
    --------
    >>> instruments = Instruments(clock=lambda: 7.0, energy=Energy([]))
    >>> instruments.begin().wall
    7.0
    """

    clock: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    cpu_children: Callable[[], float] = _children
    asleep: Callable[[], float] = _asleep
    disk: Callable[[], tuple[int, int] | None] = field(default_factory=_disk)
    energy: Energy = field(default_factory=lambda: Energy(sources()))
    peaks: PeakRss = PROCESS

    # The clocks are read innermost, so that a scope does not count the time that the other readings take. Arguments
    # are evaluated in the order in which they are written.

    def begin(self) -> Reading:
        """Return a reading whose clocks come last."""
        return Reading(
            energy=self.energy.read(),
            disk=self.disk(),
            asleep=self.asleep(),
            cpu_children=self.cpu_children(),
            cpu=self.cpu(),
            wall=self.clock(),
        )

    def end(self) -> Reading:
        """Return a reading whose clocks come first."""
        return Reading(
            wall=self.clock(),
            cpu=self.cpu(),
            cpu_children=self.cpu_children(),
            asleep=self.asleep(),
            disk=self.disk(),
            energy=self.energy.read(),
        )


_lock = threading.Lock()
_default: Instruments | None = None


def default() -> Instruments:
    """Return the instruments of this process, found once.

    Examples
    --------
    >>> default() is default()
    True
    """
    global _default
    if _default is None:
        with _lock:
            if _default is None:
                made = Instruments()
                _keep_turning(made.energy)
                _default = made
    return _default


def _keep_turning(energy: Energy) -> threading.Event:
    """Read a counter that wraps often enough to see every turn, also inside a scope of hours; the event ends it."""
    stop = threading.Event()
    if energy.max_gap == math.inf:
        return stop

    def read() -> None:
        while not stop.wait(energy.max_gap / 2):
            energy.read()

    threading.Thread(target=read, name="vitalfew-energy", daemon=True).start()
    return stop


def _forget() -> None:
    """Start over in a forked child: it has other counters, and another thread may have held the lock."""
    global _default, _lock
    _default, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
