"""RAPL: the energy counter of each CPU package, read from the powercap files of Linux."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from vitalfew.meter._source import Absent, Covers, Source, SourceLost
from vitalfew.meter.figure import How
from vitalfew.meter.model import BUSY_CORE, IDLE_CORE, Power

__all__ = ["ROOT", "Rapl", "packages"]

ROOT = Path("/sys/class/powercap")
# No package draws more. The limit tells a wrap of the counter from a reset, and how long a wrap takes at least.
_MAX_WATTS = 1000.0
# The counter moves about once a millisecond, and both ends of a scope may fall between two of its steps.
_STEP_SECONDS = 0.002
_SLACK_JOULES = 10.0


class Rapl:
    """The counter of one package, unwrapped.

    Parameters
    ----------
    folder
        The powercap folder of the package, with ``energy_uj`` and ``max_energy_range_uj``.
    name
        Such as ``package0``.
    cores
        Logical cores of the package, for the model that stands in when the counter is lost.
    clock
        Seconds, never falling.

    Notes
    -----
    The files tell one turn of the counter from two by nothing. A counter that was not read for as long as a turn takes
    at the highest power may have turned unseen: it counts as lost until the next reading. ``max_gap`` is that time.
    """

    scope: Covers = "package"
    how: How = "measured"
    reason = ""

    def __init__(self, folder: Path, name: str, cores: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.detail = f"RAPL counter {folder.name}, whole package, every process on it"
        self.error = _STEP_SECONDS * _MAX_WATTS
        self.power = Power(IDLE_CORE * cores, BUSY_CORE, f"nominal for {cores} cores at rest and per busy core")
        self._file = folder / "energy_uj"
        self._range = _microjoules(folder / "max_energy_range_uj")
        self.max_gap = self._range / _MAX_WATTS
        self._clock = clock
        self._lock = threading.Lock()
        self._total = 0.0
        self._time, self._last = clock(), _microjoules(self._file)

    def read(self) -> float:
        """Return the joules since the source was made."""
        with self._lock:
            # The clock is read on both sides, so that the time between two readings is never taken for too short.
            before, joules, after = self._clock(), _microjoules(self._file), self._clock()
            seconds, step = after - self._time, joules - self._last
            self._time, self._last = before, joules
            if seconds > self.max_gap:
                raise SourceLost(f"{self._file} was not read for {seconds:.0f} s and may have wrapped unseen")
            if step < 0:
                step += self._range
            if not 0 <= step <= seconds * _MAX_WATTS + _SLACK_JOULES:
                raise SourceLost(f"{self._file} was reset")
            self._total += step
            return self._total


def _microjoules(file: Path) -> float:
    """Return the joules in a file of microjoules."""
    try:
        with open(file, "rb") as handle:
            return int(handle.read()) / 1e6
    except PermissionError:
        raise SourceLost(f"{file} may not be read", hint=f"let an administrator run: chmod a+r {file}") from None
    except OSError as error:
        raise SourceLost(f"{file} cannot be read ({error.strerror})") from None
    except ValueError:
        raise SourceLost(f"{file} holds no number") from None


def packages(root: Path, cores: int, clock: Callable[[], float] = time.monotonic) -> list[Source]:
    """Return the package counters below a powercap folder, or null sources with the reason."""
    # AMD shows its packages under the same names. Core, memory and platform counters are parts or supersets of these.
    found = [
        (label.removeprefix("package-"), zone)
        for zone in sorted(root.glob("intel-rapl:*"))
        if zone.name.count(":") == 1 and (label := _label(zone)).startswith("package-")
    ]
    if not found:
        return [Absent("package", "package", f"no package counter in {root}: usual in virtual machines and containers")]
    sources: list[Source] = []
    for number, zone in found:
        name = f"package{number}"
        try:
            sources.append(Rapl(zone, name, max(1, cores // len(found)), clock))
        except SourceLost as lost:
            sources.append(Absent(name, "package", str(lost)))
    return sources


def _label(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""
