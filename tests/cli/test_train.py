"""Train and predict through the command, on every kind of log."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from vitalfew.core import Receipt
from vitalfew.data import open_log
from vitalfew.embeddings.fitting import predict
from vitalfew.embeddings.jobs import load_model

from .conftest import SMALL, TRAIN, Cli, clicks, listing, write_clicks


def scores(path: Path) -> np.ndarray[Any, Any]:
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path)
    assert table.column_names == ["score"]
    return np.asarray(table["score"])


def own_scores(run: Path, log: Path) -> np.ndarray[Any, Any]:
    model, encoder, _ = load_model(run)
    batch = next(encoder.batches(open_log(log), labels=False))
    return torch.sigmoid(torch.from_numpy(predict(model, [encoder.encode(batch, labels=False)]))).numpy()


def check_run(cli: Cli, folder: Path, log: Path, rows: int, *flags: object) -> None:
    """Train, predict the same log, compare with the model's own predictions."""
    result = cli("train", log, "--label", "click", *SMALL, *flags, "--out", "a")
    assert result.code == 0, result.err
    assert sorted(listing(folder / "a")) == [
        "encoder", "encoder/encoder.json", "encoder/encoder.npz",
        "model", "model/weights.json", "model/weights.safetensors",
        "receipt.json", "report.html", "run.json",
    ]  # fmt: skip
    result = cli("predict", "a", log, "--out", "scores.parquet")
    assert (result.code, result.out, result.err) == (0, "", f"scored {rows:,} rows into scores.parquet\n")
    found = scores(folder / "scores.parquet")
    assert len(found) == rows
    assert ((found > 0) & (found < 1)).all()
    np.testing.assert_array_equal(found, own_scores(folder / "a", log))


def test_time_split(cli: Cli, log: Path, tmp_path: Path) -> None:
    check_run(cli, tmp_path, log, 1200, "--time", "ts")
    receipt = Receipt.load(tmp_path / "a" / "receipt.json")
    assert receipt.verdict == "undecided"
    assert receipt.why == "no paired runs were made (--pairs 0)"
    assert receipt.notes == ("960 rows to train, 240 to test (the later ones)",)
    assert receipt.command.startswith("vitalfew train ")
    assert "whole run, AUC" in [line.what for line in receipt.lines]


def test_lists(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    columns = clicks()
    columns["tags"] = [[f"t{t}" for t in rng.integers(0, 20, rng.integers(0, 4))] for _ in columns["click"]]
    columns["seen"] = pa.array([None if i % 9 == 0 else [i % 5, i % 7] for i in range(1200)], pa.list_(pa.int64()))
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    check_run(cli, tmp_path, tmp_path / "log.parquet", 1200, "--time", "ts")
    schema = cli("look", "log.parquet", "--label", "click", "--format", "json").json()["schema"]
    assert [c["name"] for c in schema["columns"] if c["kind"] == "list"] == ["tags", "seen"]


def test_gzip_csv_with_missing_numbers_and_huge_ids(cli: Cli, tmp_path: Path) -> None:
    columns = clicks()
    columns["user"] = columns["user"] + 2**40
    columns["price"][::7] = np.nan
    text = "\n".join(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    log = tmp_path / "log.csv.gz"
    log.write_bytes(gzip.compress(f"{','.join(columns)}\n{text}\n".encode()))
    check_run(cli, tmp_path, log, 1200, "--time", "ts")


@pytest.mark.parametrize(
    "flags",
    [
        ("--hash-rows", 50),
        ("--direct", "user"),
        ("--min-count", 3, "--cross", "user,item"),
        ("--ignore", "price", "--categorical", "ts"),
        ("--epochs", 2, "--batch-size", 100_000),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_kinds_of_tables(cli: Cli, log: Path, tmp_path: Path, flags: tuple[object, ...]) -> None:
    check_run(cli, tmp_path, log, 1200, *flags)


def test_skipped_rows_are_noted(cli: Cli, tmp_path: Path) -> None:
    columns = clicks()
    text = "\n".join(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    (tmp_path / "log.csv").write_text(f"{','.join(columns)}\n{text}\n1,2\n")
    assert cli("train", "log.csv", *TRAIN, "--bad-rows", "skip", "--out", "a").code == 0
    assert "1 malformed rows were skipped" in Receipt.load(tmp_path / "a" / "receipt.json").notes


def test_a_random_split_is_drawn_by_the_seed(cli: Cli, log: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli("train", log, "--label", "click", *SMALL, "--seed", seed, "--out", name).code == 0
    a, b, c = ((tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert "drawn at random" in Receipt.load(tmp_path / "a" / "receipt.json").notes[0]


def test_several_files_and_a_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for i in range(2):
        write_clicks(tmp_path / "logs" / f"{i}.parquet", 600, i)
    assert cli("train", "logs/0.parquet", "logs/1.parquet", "--label", "click", *SMALL, "--out", "a").code == 0
    assert cli("train", "logs", "--label", "click", *SMALL, "--out", "b").code == 0
    a, b = ((tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in "ab")
    assert a == b
    assert cli("predict", "a", "logs", "--out", "scores.csv").code == 0
    assert len(scores(tmp_path / "scores.csv")) == 1200


@pytest.fixture
def run(cli: Cli, log: Path, tmp_path: Path) -> Path:
    assert cli("train", log, *TRAIN, "--out", "a").code == 0
    return tmp_path / "a"


def test_predict_other_rows(cli: Cli, run: Path, tmp_path: Path) -> None:
    del run
    columns = clicks(50, seed=9)
    del columns["click"], columns["ts"]
    columns["user"][:10] = 10**9 + np.arange(10)
    columns["item"][5] = "never seen"
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "new.parquet")
    assert cli("predict", "a", "new.parquet", "--out", "down/new.csv").code == 0
    found = scores(tmp_path / "down" / "new.csv")
    np.testing.assert_allclose(found, own_scores(tmp_path / "a", tmp_path / "new.parquet"), rtol=1e-6)
    pq.write_table(table.take(pc.sort_indices(table["price"])), tmp_path / "turned.parquet")
    result = cli("predict", "a", "turned.parquet", "--out", "turned.parquet.csv", "--format", "json")
    assert result.json() == {"rows": 50, "out": "turned.parquet.csv"}
    order = np.argsort(columns["price"], kind="stable")
    np.testing.assert_allclose(scores(tmp_path / "turned.parquet.csv"), found[order], rtol=1e-5)


def test_predict_refuses(cli: Cli, refused: Any, run: Path, log: Path, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(log).drop_columns(["item"]), tmp_path / "narrow.parquet")
    out = ("--out", "new/scores.csv")
    assert refused("predict", "a", "narrow.parquet", *out).startswith("column `item` is missing")
    assert refused("predict", "a", "absent.parquet", *out) == "no such file: absent.parquet"
    assert refused("predict", "a", log, "--out", "scores.json") == "cannot write .json"
    assert refused("predict", "a", log, "--out", "scores") == "cannot write a file without suffix"
    assert refused("predict", "a", log, "--out", log) == f"the scores would take the place of the log {log}"
    assert refused("predict", "nowhere", log, *out) == "nowhere holds no trained model"
    table = pq.read_table(log)
    pq.write_table(table.set_column(4, "price", pa.array([np.inf] * 1200)), tmp_path / "inf.parquet")
    assert "infinite in row 1" in refused("predict", "a", "inf.parquet", *out)
    pq.write_table(table.set_column(2, "user", pa.array(["x"] * 1200)), tmp_path / "text.parquet")
    assert "the encoder learned it as integer" in refused("predict", "a", "text.parquet", *out)

    weights = run / "model" / "weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        assert "is damaged" in refused("predict", "a", log, *out)
    weights.unlink()
    assert "cannot be read" in refused("predict", "a", log, *out)


def test_a_failed_prediction_keeps_the_former_scores(cli: Cli, run: Path, log: Path, tmp_path: Path) -> None:
    del run
    assert cli("predict", "a", log, "--out", "scores.csv").code == 0
    before = (tmp_path / "scores.csv").read_bytes()
    result = cli("predict", "a", log, "--out", "scores.csv", file_bytes=len(before) // 2)
    assert result.code == 2
    assert re.fullmatch(r"error: .+\nhint: .+\n", result.err), result.err
    assert (tmp_path / "scores.csv").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_diverging_run_stops_at_once(cli: Cli, log: Path) -> None:
    result = cli("train", log, *TRAIN, "--optimizer", "sgd", "--lr", "1e30", "--out", "a")
    assert result.code == 2
    assert re.fullmatch(r"error: .*NaN.*\nhint: lower the learning rate.*\n", result.err), result.err
