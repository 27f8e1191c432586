"""Seven real logs, each written as one Parquet click log with the options and settings to train on it.

Logs of positives alone get four negatives behind each. The parts that are held back: later rows where the file has an
order in time, else rows drawn by a seed.

    python benchmarks/embeddings/logs.py                    # AUC of a plain DLRM after one epoch on each log
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitalfew.data import Batches
from vitalfew.data.implicit import Bags, Pairs, read_adjacency, read_bags, read_libfm, read_pairs
from vitalfew.data.negatives import Samples, negatives
from vitalfew.data.sample import FLIGHTS_CROSSES, flights
from vitalfew.embeddings.fitting import evaluate, train_step
from vitalfew.embeddings.options import LogOptions, silent
from vitalfew.embeddings.preparing import prepare
from vitalfew.embeddings.settings import Settings, build_arm

FOLDER = Path(os.environ.get("VITALFEW_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "recsys"
MOST = 1_000_000
HISTORY, BASKET = 10, 50  # ids in a list, at most
PER_POSITIVE = 4
SETTINGS = Settings(dim=32, bottom=(64,), top=(512, 256), lr=0.02, batch_size=512)
"""Layers of about the published Kaggle DLRM; widths and rate gave the highest AUC of a few on most of these logs."""

Ids = NDArray[np.int64]


class Log(NamedTuple):
    """A log in a file, what its columns are for, and how to train on it."""

    path: Path
    options: LogOptions
    settings: Settings


def frappe_log(folder: Path, *, most: int = MOST) -> Log:
    """Contexts of app usage, ten fields, two negatives per positive in the file; rows held back at random."""
    parts = [read_libfm(FOLDER / "frappe" / f"{part}.libfm.gz") for part in ("validation", "test")]
    ids = np.concatenate([part.fields() for part in parts])[:most]
    names = tuple(f"field{i}" for i in range(ids.shape[1]))
    label = np.concatenate([part.labels for part in parts])[:most] > 0
    path = _write(folder, "frappe", {"label": label.astype(np.int8), **dict(zip(names, ids.T, strict=True))})
    return Log(path, LogOptions("label", categorical=names), SETTINGS)


def amazon_book_log(folder: Path, *, most: int = MOST) -> Log:
    """Books that some users reviewed, against books drawn uniformly; rows held back at random."""
    return _pairs_log(folder, "amazon-book", most)


def gowalla_log(folder: Path, *, most: int = MOST) -> Log:
    """Places that some users checked in at, against places drawn uniformly; rows held back at random."""
    return _pairs_log(folder, "gowalla", most)


def video_games_log(folder: Path, *, most: int = MOST) -> Log:
    """Games that some users reviewed, with the ten reviewed before; the last fifth of each user's is held back."""
    pairs = _some_users(read_pairs(FOLDER / "video-games" / "Video.txt.gz"), most // (1 + PER_POSITIVE))
    samples = negatives(pairs, pairs.num_items, per_positive=PER_POSITIVE)
    event = np.repeat(np.arange(len(pairs.users)), 1 + PER_POSITIVE)
    first = np.searchsorted(pairs.users, pairs.users)  # the file is sorted by user
    number = np.arange(len(first)) - first
    last = np.searchsorted(pairs.users, pairs.users, "right") - first - 1
    columns = {
        "label": samples.label,
        "time": (1000 * number // np.maximum(last, 1))[event],  # thousandths of the user's own history
        "user": samples.user,
        "item": samples.item,
        "history": _lists(pairs.items, event, np.minimum(number, HISTORY)[event]),
        **_bias(samples.label),
    }
    path = _write(folder, "video-games", columns)
    options = LogOptions("label", "time", categorical=("user", "item"), lists=("history",), numeric=("bias",))
    return Log(path, options, SETTINGS)


def retail_log(folder: Path, *, most: int = MOST) -> Log:
    """Baskets of a shop and one item of each, drawn by a seed as ids lie sorted; later baskets are held back."""
    return _bags_log(folder, "retail", "retail.dat.gz", most, target="any", split="time")


def kosarak_log(folder: Path, *, most: int = MOST) -> Log:
    """Clicks of readers of a news portal and the last click; readers have no order in time."""
    return _bags_log(folder, "kosarak", "kosarak_part.dat.gz", most, target="last", split=None)


def flights_log(folder: Path, *, most: int = MOST) -> Log:
    """Flights that were late or not, with crosses of their columns; later ones are held back."""
    path = folder / "flights.parquet"
    pq.write_table(pq.read_table(flights()).slice(0, most), path)
    return Log(path, LogOptions("late", "time", crosses=FLIGHTS_CROSSES), SETTINGS)


LOGS: dict[str, Callable[..., Log]] = {
    "frappe": frappe_log,
    "amazon-book": amazon_book_log,
    "gowalla": gowalla_log,
    "video-games": video_games_log,
    "retail": retail_log,
    "kosarak": kosarak_log,
    "flights": flights_log,
}


def _pairs_log(folder: Path, name: str, most: int) -> Log:
    pairs = _some_users(read_adjacency(FOLDER / name / "test.txt.gz"), most // (1 + PER_POSITIVE))
    samples = negatives(pairs, pairs.num_items, per_positive=PER_POSITIVE)
    path = _write(folder, name, samples._asdict() | _bias(samples.label))
    return Log(path, LogOptions("label", categorical=("user", "item"), numeric=("bias",)), SETTINGS)


def _bags_log(
    folder: Path, name: str, file: str, most: int, *, target: Literal["any", "last"], split: Literal["time"] | None
) -> Log:
    bags = _longer_than_one(read_bags(FOLDER / name / file), most // (1 + PER_POSITIVE))
    lengths = np.diff(bags.offsets)
    bag = np.repeat(np.arange(len(lengths)), lengths)
    drawn = np.random.default_rng(0).integers(0, lengths) if target == "any" else lengths - 1
    positives = bags.ids[bags.offsets[:-1] + drawn]
    samples = _by_popularity(positives, bag, bags.ids, parts=20 if split == "time" else 1)
    other = bags.ids != positives[bag]
    others = np.bincount(bag, other, len(lengths)).astype(np.int64)
    columns = {
        "label": samples.label,
        "time": samples.user,
        "item": samples.item,
        "others": _lists(bags.ids[other], np.cumsum(others)[samples.user], np.minimum(others, BASKET)[samples.user]),
        **_bias(samples.label),
    }
    path = _write(folder, name, columns)
    options = LogOptions(
        "label", split, categorical=("item",), lists=("others",), numeric=("bias",),
        ignore=() if split == "time" else ("time",),
    )  # fmt: skip
    return Log(path, options, SETTINGS)


def _by_popularity(positives: Ids, bag: Ids, ids: Ids, parts: int) -> Samples:
    """Draw negatives of each part of the log by what is popular there: an item not yet on sale gives itself away."""
    found = []
    for seed, mine in enumerate(np.array_split(np.arange(len(positives)), parts)):
        known = slice(*np.searchsorted(bag, [mine[0], mine[-1] + 1]))
        found.append(
            negatives(
                (mine, positives[mine]), int(ids.max()) + 1, per_positive=PER_POSITIVE, seed=seed, by="popularity",
                known=(bag[known], ids[known]),
            )
        )  # fmt: skip
    return Samples(*map(np.concatenate, zip(*found, strict=True)))


def _bias(label: NDArray[np.int8]) -> dict[str, NDArray[np.float32]]:
    """Return a number that is always one: its products with the rows are what each id brings along by itself."""
    return {"bias": np.ones(len(label), np.float32)}


def _some_users(pairs: Pairs, most: int, seed: int = 0) -> Pairs:
    """Return all pairs of users drawn by a seed: as many users as stay below so many pairs, in file order."""
    counts = np.bincount(pairs.users, minlength=pairs.num_users)
    drawn = np.random.default_rng(seed).permutation(pairs.num_users)
    kept = np.zeros(pairs.num_users, np.bool_)
    kept[drawn[np.cumsum(counts[drawn]) <= most]] = True
    mine = kept[pairs.users]
    return pairs._replace(users=pairs.users[mine], items=pairs.items[mine])


def _longer_than_one(bags: Bags, most: int) -> Bags:
    """Return the first bags that have an item to predict and another to do so from."""
    lengths = np.diff(bags.offsets)
    kept = (lengths > 1) & (np.cumsum(lengths > 1) <= most)
    return Bags(bags.ids[np.repeat(kept, lengths)], np.append(0, np.cumsum(lengths[kept])))


def _lists(values: Ids, ends: Ids, lengths: Ids) -> pa.ListArray:
    """Return a list for each row: so many values before its end."""
    offsets = np.append(0, np.cumsum(lengths))
    at = np.arange(offsets[-1]) + np.repeat(ends - lengths - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[at]))


def _write(folder: Path, name: str, columns: dict[str, Any]) -> Path:
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", default=",".join(LOGS))
    parser.add_argument("--most", type=int, default=MOST, help="samples of each log")
    parser.add_argument("--lr", type=float, default=SETTINGS.lr)
    args = parser.parse_args()
    for name in args.logs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            log = LOGS[name](Path(folder), most=args.most)
            settings = dataclasses.replace(log.settings, lr=args.lr)
            job = prepare(str(log.path), log.options, settings, Path(folder) / "work", silent)
            model, optimizers = build_arm(job.num_rows, job.train.num_dense, settings, plain=False)
            start = time.perf_counter()
            for batch in Batches(job.train, settings.batch_size).epoch(0):
                train_step(model, optimizers, batch)
            seconds = time.perf_counter() - start
            print(
                f"{name}: {len(job.train):,} + {len(job.test):,} rows, {sum(job.num_rows.values()):,} table rows, "
                f"{seconds:.1f} s, {evaluate(model, job.test)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
