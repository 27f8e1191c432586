"""The fewest rows that any cache can move: an exact count from a log of row ids, with numpy alone.

Batch b uses the distinct rows U_b. After it, a cache retains R_b, a part of R_(b-1) and U_b together, of at most C
rows; before it, the rows of U_b outside R_(b-1) are read. The fewest reads come from retaining the rows that are used
again soonest (interval packing on C slots, all rows of one size). Two rows whose next use is the same batch can stand
in for each other, so it is enough to count, for each coming batch, how many of its rows are retained. In training,
every row that was read is written back, once evicted or at the end: as many rows are written as read.

    python benchmarks/tiers/bound.py trace.npz --share 0.05 0.1 --rows 100000

The file holds `ids` (int64, one after the other) and `batch_offsets` (int64: batch b is ids[offsets[b]:offsets[b+1]]).
"""

from __future__ import annotations

import argparse
import heapq
import json

import numpy as np


def next_uses(ids: np.ndarray, batch_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return, batch by batch, the next batch that uses each distinct row (-1: none), offsets, and the distinct rows."""
    num_batches = len(batch_offsets) - 1
    batch = np.repeat(np.arange(num_batches), np.diff(batch_offsets))
    order = np.argsort(ids, kind="stable")  # of one row, uses stay in the order of time
    ids, batch = ids[order], batch[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (ids[1:] != ids[:-1]) | (batch[1:] != batch[:-1])
    ids, batch = ids[is_first], batch[is_first]
    following = np.full(len(ids), -1)
    same_row = ids[1:] == ids[:-1]
    following[:-1][same_row] = batch[1:][same_row]
    by_batch = np.argsort(batch, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(batch, minlength=num_batches))])
    return following[by_batch], offsets, len(ids) - int(same_row.sum())


def fewest_reads(following: np.ndarray, offsets: np.ndarray, capacity: int) -> int:
    """Return the exact minimum of rows read when `capacity` rows are retained between batches."""
    num_batches = len(offsets) - 1
    waiting = np.zeros(num_batches, np.int64)  # retained rows by the batch of their next use
    farthest: list[int] = []  # heap of -batch; a batch that has passed is nearer than any other, so it stays below
    retained = reads = 0
    for b in range(num_batches):
        used_again = following[offsets[b] : offsets[b + 1]]
        reads += len(used_again) - int(waiting[b])
        retained -= int(waiting[b])
        coming, count = np.unique(used_again[used_again >= 0], return_counts=True)
        for q in coming[waiting[coming] == 0].tolist():
            heapq.heappush(farthest, -q)
        waiting[coming] += count
        retained += int(count.sum())
        while retained > capacity:
            q = -farthest[0]
            dropped = min(int(waiting[q]), retained - capacity)
            waiting[q] -= dropped
            retained -= dropped
            if waiting[q] == 0:
                heapq.heappop(farthest)
    return reads


def bounds(ids: np.ndarray, batch_offsets: np.ndarray, capacities: list[int]) -> list[int]:
    """Return the fewest rows read for each capacity."""
    following, offsets, _ = next_uses(ids, batch_offsets)
    return [fewest_reads(following, offsets, capacity) for capacity in capacities]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="capacities in rows")
    parser.add_argument("--share", type=float, nargs="*", default=[], help="capacities as shares of the distinct rows")
    args = parser.parse_args()
    with np.load(args.trace) as trace:
        following, offsets, distinct = next_uses(trace["ids"], trace["batch_offsets"])
    for capacity in [*args.rows, *(round(share * distinct) for share in args.share)]:
        reads = fewest_reads(following, offsets, capacity)
        line = {"capacity": capacity, "distinct": distinct, "uses": len(following), "reads": reads, "moved": 2 * reads}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
