"""The plain caches agree with hand-worked cases, with exhaustive search, and with the stand-alone bound."""

from __future__ import annotations

import random
import runpy
from pathlib import Path

import numpy as np
import pytest

from tests.tiers.naive import brute_bound, greedy_bound, naive_counts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "tiers"
LFU = {"policy": "lfu"}
LOOK = {"policy": "lookahead", "depth": 2}


def random_trace(rng: random.Random, num_rows: int, num_batches: int, largest: int) -> list[list[int]]:
    rows = range(num_rows)
    return [rng.sample(rows, rng.randint(0, min(largest, num_rows))) for _ in range(num_batches)]


def some_policy(rng: random.Random, num_rows: int) -> dict[str, object]:
    policy = rng.choice(["lru", "lfu", "static", "lookahead", "belady"])
    options: dict[str, object] = {"policy": policy, "decay_every": rng.choice([None, 1, 2, 3])}
    if policy == "lookahead":
        options["depth"] = rng.randint(0, 4)
    if policy == "static":
        options["hot"] = rng.sample(range(num_rows), rng.randint(0, num_rows))
    return options


def test_greedy_is_the_optimum_of_all_retained_sets():
    rng = random.Random(0)
    for _ in range(400):
        trace = random_trace(rng, rng.randint(1, 5), rng.randint(0, 6), 3)
        capacity = rng.randint(0, 4)
        assert greedy_bound(trace, capacity) == brute_bound(trace, capacity), (trace, capacity)


def test_no_policy_reads_less_than_the_bound_and_belady_reads_just_that():
    rng = random.Random(1)
    for _ in range(400):
        num_rows = rng.randint(1, 20)
        trace = random_trace(rng, num_rows, rng.randint(0, 15), 6)
        capacity = rng.randint(0, num_rows)
        fewest = greedy_bound(trace, capacity)
        assert naive_counts(trace, capacity, "belady").misses == fewest
        assert naive_counts(trace, capacity, **some_policy(rng, num_rows)).misses >= fewest


def test_every_row_that_is_read_leaves_again():
    rng = random.Random(2)
    for _ in range(400):
        num_rows = rng.randint(1, 20)
        trace = random_trace(rng, num_rows, rng.randint(0, 15), 6)
        capacity = rng.randint(0, num_rows)
        found = naive_counts(trace, capacity, ahead=rng.randint(0, 4), **some_policy(rng, num_rows))
        assert found.misses == found.evicted + found.drained
        assert found.drained <= capacity
        assert len(found.misses_by_batch) == len(trace)
        # All is retained where there is room for all.
        distinct = len(set().union(*trace)) if trace else 0
        assert naive_counts(trace, distinct, ahead=2, **some_policy(rng, num_rows)).misses == distinct


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_more_capacity_never_reads_more(policy: str):
    rng = random.Random(3)
    for _ in range(100):
        trace = random_trace(rng, 12, rng.randint(0, 15), 5)
        misses = [naive_counts(trace, capacity, policy).misses for capacity in range(14)]
        assert misses == sorted(misses, reverse=True)


def test_to_know_the_whole_trace_is_belady():
    rng = random.Random(4)
    for _ in range(100):
        trace = random_trace(rng, 12, rng.randint(0, 15), 5)
        ahead, capacity = rng.randint(0, 3), rng.randint(0, 12)
        known = naive_counts(trace, capacity, "lookahead", depth=100, ahead=ahead)
        assert known == naive_counts(trace, capacity, "belady", ahead=ahead)


@pytest.mark.parametrize(
    ("trace", "capacity", "options", "misses", "evicted", "drained"),
    [
        # After [1, 2] only 2 is retained: it joined last.
        ([[1, 2], [1], [2]], 1, {"policy": "lru"}, [2, 1, 1], 3, 1),
        ([[2, 1], [1], [2]], 1, {"policy": "lru"}, [2, 0, 1], 2, 1),
        # Nothing is retained, but 1 is held from its first batch on, as batch 2 is loaded before batch 1 is finished.
        ([[1], [1], [2], [1]], 0, {"policy": "lru"}, [1, 1, 1, 1], 4, 0),
        ([[1], [1], [2], [1]], 0, {"policy": "lru", "ahead": 1}, [1, 0, 1, 1], 3, 0),
        ([[1], [1], [2], [1]], 0, {"policy": "lru", "ahead": 2}, [1, 0, 1, 0], 2, 0),
        # Row 1, visited twice, outlives 2 and 3; 1, 2 and 3 stay in the order of their visits.
        ([[1], [1], [2], [3], [1]], 1, LFU, [1, 0, 1, 1, 0], 2, 1),
        # Halved after batches 2 and 4: then 1 has one visit, as 3 has, and stands before it, so it goes.
        ([[1], [1], [2], [3], [1]], 1, LFU | {"decay_every": 2}, [1, 0, 1, 1, 1], 3, 1),
        # After batch 4, row 1 counts 3 and row 2, used last, 2: halved, the lower bucket is first, so 2 goes.
        ([[1], [1], [1, 2], [2], [3], [1]], 2, LFU | {"decay_every": 4}, [1, 0, 1, 0, 1, 0], 1, 2),
        ([[1], [2], [1], [2]], 1, {"policy": "static", "hot": [1]}, [1, 1, 0, 1], 2, 1),
        # Two batches in sight: after batch 1 the next use of row 1 (batch 4) is unknown, that of 2 (batch 3) known.
        ([[1, 2], [3], [2], [1]], 1, LOOK, [2, 1, 0, 1], 3, 1),
        # Batch 4 comes into sight before batch 2 is finished and saves row 1 from row 3, which was visited as often.
        ([[1], [3], [4], [1]], 1, LOOK, [1, 1, 1, 0], 2, 1),
        ([[1], [3], [4], [1]], 1, LOOK | {"depth": 1}, [1, 1, 1, 1], 3, 1),
        # All known: of 1 (batch 3) and 2 (batch 4), the later one goes.
        ([[1, 2], [3], [1], [2]], 1, {"policy": "belady"}, [2, 1, 0, 1], 3, 1),
    ],
)
def test_worked_by_hand(trace, capacity, options, misses, evicted, drained):
    found = naive_counts(trace, capacity, **options)
    assert (found.misses_by_batch, found.evicted, found.drained) == (misses, evicted, drained)


def test_visits_stop_at_255():
    # The last use of 2 puts it into the last bucket, behind 1, although 1 was visited more often.
    trace = [[1]] * 300 + [[2]] * 255 + [[2], [1]]
    misses = naive_counts(trace, 1, "lfu").misses_by_batch
    assert misses == [1] + [0] * 299 + [1] * 255 + [0, 1]


def test_the_stand_alone_bound_is_the_greedy_one():
    bounds = runpy.run_path(str(BENCHMARKS / "bound.py"))["bounds"]
    rng = random.Random(5)
    for _ in range(300):
        num_rows = rng.randint(1, 30)
        trace = random_trace(rng, num_rows, rng.randint(1, 25), 8)
        # The script takes ids as a log has them: with repetitions inside a batch.
        raw = [[*batch, *rng.choices(batch, k=rng.randint(0, 4))] if batch else [] for batch in trace]
        ids = np.array([row for batch in raw for row in batch], np.int64) * 2**35
        offsets = np.concatenate([[0], np.cumsum([len(batch) for batch in raw])])
        capacities = sorted(rng.sample(range(num_rows + 2), 2))
        assert bounds(ids, offsets, capacities) == [greedy_bound(trace, c) for c in capacities]
