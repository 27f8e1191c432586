"""Counters of a server, in the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["Histogram", "Metrics"]

_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Histogram:
    """Seconds, counted by size."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """Return the lines of a histogram with this name."""
        out, seen = [f"# TYPE {name} histogram"], 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self.counts, strict=True):
            seen += count
            out.append(f'{name}_bucket{{le="{bound}"}} {seen}')
        return [*out, f"{name}_sum {self.total:.6f}", f"{name}_count {seen}"]


class Metrics:
    """What a server has done, and how it stands; each figure is written by one thread, or under a lock.

    Attributes
    ----------
    requests
        Prompts by outcome; one that was found wrong before it could be queued is none.
    tokens
        Read (``prompt``) and written (``answer``).
    gauges
        What is so now, by name.
    step, chunk
        Seconds of a step of the batch, and of reading a chunk of a prompt.

    Examples
    --------
    >>> metrics = Metrics()
    >>> metrics.requests["done"] += 1
    >>> print(metrics.text().splitlines()[1])
    vitalfew_requests_total{outcome="cancelled"} 0
    """

    def __init__(self) -> None:
        # From 0, so that the first of a kind is seen as a rise.
        self.requests = dict.fromkeys(("cancelled", "done", "error", "refused", "timeout"), 0)
        self.tokens = dict.fromkeys(("answer", "prompt"), 0)
        self.gauges: dict[str, int] = {}
        self.step, self.chunk = Histogram(), Histogram()

    def text(self) -> str:
        """Return all, one figure a line."""
        out = []
        for name, label, counts in (("requests", "outcome", self.requests), ("tokens", "kind", self.tokens)):
            out.append(f"# TYPE vitalfew_{name}_total counter")
            out += [f'vitalfew_{name}_total{{{label}="{key}"}} {count}' for key, count in counts.items()]
        for name, value in sorted(self.gauges.copy().items()):
            out += [f"# TYPE vitalfew_{name} gauge", f"vitalfew_{name} {value}"]
        for name, histogram in (("step", self.step), ("chunk", self.chunk)):
            out += histogram.lines(f"vitalfew_{name}_seconds")
        return "\n".join(out) + "\n"
