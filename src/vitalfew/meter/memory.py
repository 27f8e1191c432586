"""Peak memory of the process, also over parts of its life, without a sampler."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from vitalfew.core.errors import need
from vitalfew.meter.figure import Figure

__all__ = ["PROCESS", "PeakRss", "Watch", "peak_rss"]

_RSS = re.compile(rb"^VmRSS:\s+(\d+) kB", re.MULTILINE)
_MARK = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def _read() -> tuple[int, int]:
    """Return the resident bytes of the process, and the high-water mark that the system keeps."""
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        status = file.read()
        rss, mark = _RSS.search(status), _MARK.search(status)
        if rss and mark:
            return int(rss[1]) * 1024, int(mark[1]) * 1024
    info = need("psutil").Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.rss), int(info.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return int(info.rss), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset() -> bool:
    """Lower the mark to what is resident now; only Linux can."""
    try:
        with open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")
    except OSError:
        return False
    return True


@dataclass(slots=True, eq=False)
class Watch:
    """The highest resident bytes seen since it was opened.

    Examples
    --------
    >>> print(Watch(start=2**20, mark=2**30, exact=False, peak=2**30).figure())
    1 GiB (1 MiB-1 GiB), measured: process peak so far: no mark of the scope
    """

    start: int
    mark: int
    exact: bool
    peak: int

    def figure(self) -> Figure:
        """Return the peak; where the mark could not be lowered, an interval up to the peak of the process."""
        if self.exact or self.peak > self.mark:
            return Figure("peak_rss", self.peak, "B", "measured", source="high-water mark of the process, in the scope")
        return Figure(
            "peak_rss", self.peak, "B", "measured", self.start, self.peak, "process peak so far: no mark of the scope"
        )


class PeakRss:
    """Share the one high-water mark of the process among any number of open watches.

    Opening a watch first hands the mark to every open watch and then lowers it, so none of them loses its peak. The
    mark belongs to the process: other readers of ``VmHWM`` or ``ru_maxrss`` see it lowered, `peak_rss` does not.

    Parameters
    ----------
    read
        Gives the resident bytes and the mark.
    reset
        Lowers the mark and says whether it could.

    Examples
    --------
    >>> marks = iter([(10, 90), (20, 50), (20, 60)])
    >>> peaks = PeakRss(read=lambda: next(marks), reset=lambda: True)
    >>> outer = peaks.open()
    >>> inner = peaks.open()
    >>> peaks.close(inner)
    >>> outer.peak, inner.peak
    (60, 60)
    """

    def __init__(self, read: Callable[[], tuple[int, int]] = _read, reset: Callable[[], bool] = _reset) -> None:
        self._read, self._reset = read, reset
        self._open: set[Watch] = set()
        self._highest = 0
        self._lock = threading.Lock()

    def _tell(self) -> tuple[int, int]:
        rss, mark = self._read()
        self._highest = max(self._highest, mark)
        for watch in self._open:
            watch.peak = max(watch.peak, mark)
        return rss, mark

    def open(self) -> Watch:
        """Start a watch."""
        with self._lock:
            rss, mark = self._tell()
            exact = self._reset()
            watch = Watch(rss, mark, exact, rss)
            self._open.add(watch)
            return watch

    def close(self, watch: Watch) -> None:
        """End a watch; its peak is final."""
        with self._lock:
            self._tell()
            self._open.discard(watch)

    def forget(self) -> None:
        """Start over in a forked child: the watches are those of the parent."""
        self._lock = threading.Lock()
        self._open.clear()
        self._highest = 0

    def highest(self) -> int:
        """Return the peak of the process in bytes, whatever was lowered since."""
        with self._lock:
            self._tell()
            return self._highest


PROCESS = PeakRss()
if hasattr(os, "register_at_fork"):
    # The child shares no mark with its parent, and another thread may have held the lock.
    os.register_at_fork(after_in_child=PROCESS.forget)


def peak_rss() -> Figure:
    """Return the most memory that the process held at once.

    Examples
    --------
    >>> peak_rss().unit
    'B'
    """
    return Figure("peak_rss", PROCESS.highest(), "B", "measured", source="high-water mark of the process")
