"""Traces of row ids from real logs, and one in the shape of Criteo Kaggle: flat ids and where each batch begins.

A row id is global: the id in its table plus the rows of all tables before. Samples come one after the other, each
with its fields in order. Pairs are shuffled with a seed; bags and contexts stay in the order of their file.

    python benchmarks/tiers/traces.py amazon-book trace.npz
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitalfew.data.implicit import Pairs, read_adjacency, read_bags, read_libfm, read_pairs
from vitalfew.data.synthetic import CriteoLike

FOLDER = Path(os.environ.get("VITALFEW_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "recsys"


class Trace(NamedTuple):
    """Row ids of all batches, and offsets: batch b uses ``ids[batch_offsets[b] : batch_offsets[b + 1]]``."""

    ids: np.ndarray
    batch_offsets: np.ndarray
    num_rows: int
    """Rows of all tables; not every one need occur."""

    @property
    def distinct(self) -> int:
        return len(np.unique(self.ids))

    def batches(self) -> list[list[int]]:
        """Return the distinct ids of each batch in order of first occurrence."""
        cut = self.batch_offsets.tolist()
        ids = self.ids.tolist()
        return [list(dict.fromkeys(ids[a:b])) for a, b in itertools.pairwise(cut)]


def _fields(columns: np.ndarray, batch_size: int, num_rows: int) -> Trace:
    """Return a trace of samples that have one id for each field, (samples, fields)."""
    samples, fields = columns.shape
    starts = np.append(np.arange(0, samples, batch_size), samples)
    return Trace(np.ascontiguousarray(columns, np.int64).ravel(), starts * fields, num_rows)


def _pairs(pairs: Pairs, batch_size: int, seed: int) -> Trace:
    columns = np.stack([pairs.users, pairs.items + pairs.num_users], axis=1)
    shuffled = columns[np.random.default_rng(seed).permutation(len(columns))]
    return _fields(shuffled, batch_size, pairs.num_users + pairs.num_items)


def _bags(name: str, batch_size: int) -> Trace:
    ids, offsets = read_bags(FOLDER / name)
    return Trace(ids, np.append(offsets[:-1:batch_size], offsets[-1]), int(ids.max()) + 1)


def amazon_book(batch_size: int = 512, seed: int = 0) -> Trace:
    """Return (user, item) pairs of Amazon Books, shuffled."""
    return _pairs(read_adjacency(FOLDER / "amazon-book" / "test.txt.gz"), batch_size, seed)


def gowalla(batch_size: int = 512, seed: int = 0) -> Trace:
    """Return (user, place) pairs of Gowalla, shuffled."""
    return _pairs(read_adjacency(FOLDER / "gowalla" / "test.txt.gz"), batch_size, seed)


def video_games(batch_size: int = 512, seed: int = 0) -> Trace:
    """Return (user, item) events of Amazon Video Games, shuffled."""
    return _pairs(read_pairs(FOLDER / "video-games" / "Video.txt.gz"), batch_size, seed)


def retail(batch_size: int = 512) -> Trace:
    """Return the baskets of a shop, in file order."""
    return _bags("retail/retail.dat.gz", batch_size)


def kosarak(batch_size: int = 512) -> Trace:
    """Return bags of clicks on a news portal, in file order."""
    return _bags("kosarak/kosarak_part.dat.gz", batch_size)


def frappe(batch_size: int = 512) -> Trace:
    """Return the ten context ids of each row of Frappe, validation part then test part, in file order."""
    parts = [read_libfm(FOLDER / "frappe" / f"{part}.libfm.gz").fields() for part in ("validation", "test")]
    return _fields(np.concatenate(parts), batch_size, 5382)


def criteo_like(num_batches: int = 200, batch_size: int = 2048, seed: int = 0) -> Trace:
    """Return generated ids over 26 tables with the cardinalities of Criteo Kaggle, 33.8 M rows."""
    log = CriteoLike(num_batches * batch_size, seed=seed)
    starts = np.concatenate([[0], np.cumsum(log.cardinalities)])
    return _fields(np.concatenate([b.ids for b in log.batches(65_536)]) + starts[:-1], batch_size, int(starts[-1]))


TRACES: dict[str, Callable[[], Trace]] = {
    "amazon-book": amazon_book,
    "gowalla": gowalla,
    "video-games": video_games,
    "retail": retail,
    "kosarak": kosarak,
    "frappe": frappe,
    "criteo-like": criteo_like,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TRACES)
    parser.add_argument("file", help="an .npz file to write")
    args = parser.parse_args()
    trace = TRACES[args.name]()
    np.savez(args.file, ids=trace.ids, batch_offsets=trace.batch_offsets)


if __name__ == "__main__":
    main()
