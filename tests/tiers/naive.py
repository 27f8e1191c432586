"""Caches of rows in plain Python, slow and obvious: what the simulator and the store are compared with.

A trace is a list of batches, a batch a list of distinct row ids. `capacity` rows are retained between batches; the
rows of batches in flight are held beside them.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

Trace = Sequence[Sequence[int]]
MAX_VISITS = 255


@dataclass
class Counts:
    """Rows that a cache has moved."""

    misses_by_batch: list[int] = field(default_factory=list)
    evicted: int = 0
    drained: int = 0  # rows retained at the end, which are written back then

    @property
    def misses(self) -> int:
        return sum(self.misses_by_batch)


@dataclass
class Naive:
    """The state of a cache; `retained` says in which order its rows would be evicted: lowest value first."""

    batches: Trace
    policy: str
    ahead: int
    depth: float
    hot: frozenset[int]
    retained: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    visits: Counter[int] = field(default_factory=Counter)
    counts: Counts = field(default_factory=Counts)
    clock: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.uses: dict[int, list[int]] = {}
        for b, batch in enumerate(self.batches):
            assert len(set(batch)) == len(batch)
            for row in batch:
                self.uses.setdefault(row, []).append(b)

    def load(self, n: int) -> None:
        misses = 0
        for row in self.batches[n]:
            self.visits[row] = min(self.visits[row] + 1, MAX_VISITS)
            if row in self.retained:
                del self.retained[row]
            elif row not in self.held:
                misses += 1
            self.held.add(row)
        self.counts.misses_by_batch.append(misses)

    def next_use(self, row: int, m: int) -> int | None:
        """Return the next batch after m that uses the row, where it is near enough to be known."""
        uses = self.uses[row]
        at = bisect.bisect_right(uses, m)
        return uses[at] if at < len(uses) and uses[at] <= m + self.depth else None

    def place(self, row: int, m: int) -> tuple[int, int, int]:
        """Return where a row stands that joins the retained ones after batch m: (class, bucket, time)."""
        now = next(self.clock)
        if self.policy == "lru":
            return 0, 0, now
        if self.policy == "static":
            return 0, int(row in self.hot), now
        if self.policy in ("lookahead", "belady"):
            use = self.next_use(row, m)
            if use is not None:
                return 1, -use, now
        return 0, self.visits[row], now

    def see(self, m: int) -> None:
        """Make the batch known that comes into sight before batch m is finished."""
        if self.policy != "lookahead" or m + self.depth >= len(self.batches):
            return
        n = m + int(self.depth)
        for row in self.batches[n]:
            if row in self.retained and self.retained[row][0] == 0:
                self.retained[row] = (1, -n, next(self.clock))

    def finish(self, m: int, capacity: int) -> None:
        self.see(m)
        in_flight = set(itertools.chain(*self.batches[m + 1 : m + 1 + self.ahead]))
        for row in self.batches[m]:
            if row not in in_flight:
                self.held.remove(row)
                self.retained[row] = self.place(row, m)
        if len(self.retained) > capacity:
            for row in sorted(self.retained, key=self.retained.__getitem__)[: len(self.retained) - capacity]:
                del self.retained[row]
                self.counts.evicted += 1

    def decay(self) -> None:
        """Halve all visits; where two buckets become one, the rows of the lower one come first."""
        for row in self.visits:
            self.visits[row] //= 2
        if self.policy in ("lru", "static"):
            return
        for row, (known, bucket, _) in sorted(self.retained.items(), key=lambda item: item[1]):
            if not known:
                self.retained[row] = (0, bucket // 2, next(self.clock))


def naive_counts(
    batches: Trace,
    capacity: int,
    policy: str,
    *,
    ahead: int = 0,
    depth: int | None = None,
    hot: Collection[int] | None = None,
    decay_every: int | None = None,
) -> Counts:
    """Return what a policy moves: "lru", "lfu", "static" (with `hot`), "lookahead" (with `depth`) or "belady"."""
    assert policy in ("lru", "lfu", "static", "lookahead", "belady")
    assert (policy == "lookahead") == (depth is not None)
    assert (policy == "static") == (hot is not None)
    cache = Naive(batches, policy, ahead, float("inf") if depth is None else depth, frozenset(hot or ()))
    for n in range(min(1 + ahead, len(batches))):
        cache.load(n)
    for m in range(len(batches)):
        cache.finish(m, capacity)
        if decay_every and (m + 1) % decay_every == 0:
            cache.decay()
        if m + 1 + ahead < len(batches):
            cache.load(m + 1 + ahead)
    assert not cache.held
    cache.counts.drained = len(cache.retained)
    return cache.counts


def greedy_bound(batches: Trace, capacity: int) -> int:
    """Return the fewest rows to read: after each batch the rows with the nearest next use are retained."""
    uses: dict[int, list[int]] = {}
    for b in reversed(range(len(batches))):
        for row in batches[b]:
            uses.setdefault(row, []).append(b)  # the next use comes last
    retained: set[int] = set()
    reads = 0
    for batch in batches:
        reads += len(set(batch) - retained)
        for row in batch:
            uses[row].pop()
        useful = [row for row in retained | set(batch) if uses[row]]
        retained = set(sorted(useful, key=lambda row: uses[row][-1])[:capacity])
    return reads


def brute_bound(batches: Trace, capacity: int) -> int:
    """Return the fewest rows to read: every retained set that the rules allow is tried after every batch."""
    fewest: dict[frozenset[int], int] = {frozenset(): 0}
    for batch in batches:
        after: dict[frozenset[int], int] = {}
        for retained, reads in fewest.items():
            total = reads + len(set(batch) - retained)
            present = retained | set(batch)
            for size in range(min(capacity, len(present)) + 1):
                for choice in map(frozenset, itertools.combinations(present, size)):
                    after[choice] = min(total, after.get(choice, total))
        fewest = after
    return min(fewest.values())
