"""Whatever is wrong with the input: exit 2, one line that says what, one that says what to do, nothing left behind."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import SMALL, TRAIN, Cli, clicks

Refused = Callable[..., str]

HEADER = "click,user,item,price\n"
ROWS = "".join(f"{i % 3 % 2},u{i % 7},i{i % 5},{i / 10}\n" for i in range(300))

BAD = {
    "empty": (b"", "is empty"),
    "only a header": (HEADER.encode(), "a header but no rows"),
    "a row with a field too few": ((HEADER + ROWS + "1,u1\n").encode(), "2 fields, expected 4"),
    "a row with a field too many": ((HEADER + "1,u1,i1,0.5,9\n" + ROWS).encode(), "5 fields, expected 4"),
    "an infinite number": ((HEADER + ROWS + "1,u1,i1,inf\n").encode(), "is infinite in row 301"),
    "a label that is NaN": ((HEADER + ROWS + "nan,u1,i1,1\n").encode(), "missing in row 301"),
    "a label that is absent": ((HEADER + ROWS + ",u1,i1,1\n").encode(), "missing in row 301"),
    "a label of 2": ((HEADER + ROWS + "2,u1,i1,1\n").encode(), "holds 2 in row 301"),
    "one label only": ((HEADER + ROWS.replace("\n1,", "\n0,")).encode(), "have the label 0"),
    "Latin-1": ((HEADER + ROWS).encode() + "1,ué,i1,1\n".encode("latin-1"), "not UTF-8"),
    "UTF-16": ((HEADER + ROWS).encode("utf-16"), ""),
    "zero bytes": (b"\0" * 4096, ""),
    "an HTML page": (b"<html><body>404</body></html>\n", ""),
    "two columns of one name": ((HEADER.replace("item", "user") + ROWS).encode(), "two columns named `user`"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_text(refused: Refused, tmp_path: Path, what: str) -> None:
    content, message = BAD[what]
    (tmp_path / "log.csv").write_bytes(content)
    assert message in refused("train", "log.csv", "--label", "click", "--out", "runs/a", *SMALL)


def test_text_in_a_number(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + ROWS + "1,u1,i1,cheap\n")
    argv = ("train", "log.csv", "--label", "click", "--out", "a", *SMALL)
    assert "'cheap', which is no number" in refused(*argv, "--numeric", "price")
    (tmp_path / "log.csv").write_text(HEADER + ROWS * 400 + "1,u1,i1,cheap\n")  # behind what types are inferred from
    assert "'cheap', which is no number" in refused(*argv)


def test_cut_off_gzip(refused: Refused, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = HEADER + "".join(f"{i % 2},u{rng.integers(1e9)},i{i},{i}\n" for i in range(2000))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode())[:-2000])
    assert "log.csv.gz" in refused("train", "log.csv.gz", "--label", "click", "--out", "a", *SMALL)


def test_damaged_parquet(refused: Refused, log: Path) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    assert "clicks.parquet" in refused("train", log, *TRAIN, "--out", "a")
    log.write_bytes(b"")
    assert "clicks.parquet" in refused("look", log, "--label", "click")


def test_one_label_in_the_later_rows_only(refused: Refused, tmp_path: Path) -> None:
    columns = clicks()
    columns["click"][900:] = 0
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    found = refused("train", "log.parquet", *TRAIN, "--out", "deep/down/a")
    assert found == "all 240 rows of the test slice have the label 0 in `click`"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["click"], "no column of the log is a feature (the label is alone)"),
        (["click", "price"], "has no categorical column"),
        (["click", "user"], "has one feature, `user`"),
    ],
)
def test_too_few_columns(refused: Refused, tmp_path: Path, columns: list[str], message: str) -> None:
    full = clicks()
    pq.write_table(pa.table({name: full[name] for name in columns}), tmp_path / "log.parquet")
    for verb in (("look",), ("train", "--out", "a")):
        assert message in refused(*verb, "log.parquet", "--label", "click")


def test_ids_as_row_numbers_need_a_table_that_fits(refused: Refused, tmp_path: Path) -> None:
    columns = clicks()
    columns["user"][7] = 2**40
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    found = refused("train", "log.parquet", *TRAIN, "--out", "a", "--direct", "user")
    assert "column `user` holds the id 1099511627776" in found


def test_tables_beyond_memory(refused: Refused, log: Path) -> None:
    found = refused("train", log, *TRAIN, "--out", "a", "--hash-rows", 2_000_000_000)
    assert "4,000,000,000 rows x 32 B" in found


def test_memory_for_both_ways(refused: Refused, log: Path) -> None:
    import psutil

    rows = int(psutil.virtual_memory().available / 32 / 2 * 0.8)  # 32 bytes a row, two features
    found = refused("train", log, *TRAIN, "--out", "a", "--hash-rows", rows, "--pairs", 1)
    assert "GiB more to compare with plain PyTorch" in found


FLAGS = [
    (("--label", "clik"), "column `clik` is missing"),
    (("--time", "when"), "column `when` is missing"),
    (("--time", "click"), "asked for as label and as time"),
    (("--categorical", "nobody"), "column `nobody` is missing"),
    (("--cross", "user,nobody"), "which is absent"),
    (("--cross", "user"), "two different columns or more"),
    (("--direct", "nobody"), "column `nobody` is missing"),
    (("--direct", "item"), "its values are no row numbers"),
    (("--hash-rows", 0), "hash_rows must be at least 1"),
    (("--min-count", 0), "min_count must be at least 1"),
    (("--test-share", 2), "test_share must lie between 0 and 1"),
    (("--test-share", "nan"), "test_share must lie between 0 and 1"),
    (("--optimizer", "lion"), "there is no optimizer 'lion'"),
    (("--storage", "int4"), "cannot be stored as 'int4'"),
    (("--lr", "nan"), "lr must be finite"),
    (("--lr", -1), "lr must be finite"),
    (("--dim", 0), "dim must be at least 1"),
    (("--batch-size", 0), "batch_size must be at least 1"),
    (("--bottom", "8,x"), "widths must be whole numbers"),
    (("--top", "1000000000"), "cannot have the width"),
    (("--seed", -1), "seed must not be negative"),
    (("--pairs", -1), "pairs must not be negative"),
    (("--trial-steps", 0), "trial_steps must be at least 1"),
    (("--tolerance", 0), "tolerance must be positive"),
    (("--checkpoint-seconds", -1), "checkpoint_seconds must not be negative"),
    (("--checkpoint-seconds", "nan"), "checkpoint_seconds must not be negative"),
    (("--bad-rows", "drop"), "bad_rows must be"),
    (("--log-format", "xml"), "unknown format 'xml'"),
    (("--log-format", "csv"), "clicks.parquet"),
    (("--format", "xml"), "xml"),
    (("--lable", "click"), "no such option: --lable"),
    (("--epochs", "many"), "--epochs"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[" ".join(map(str, flags)) for flags, _ in FLAGS])
def test_bad_flags(refused: Refused, log: Path, flags: tuple[str, ...], message: str) -> None:
    assert message in refused("train", log, *TRAIN, "--out", "runs/a", *flags)


def test_bad_commands(refused: Refused, log: Path) -> None:
    assert refused("learn") == "no such command 'learn'"
    assert refused("train") == "missing option '--out'"
    assert refused("train", log, "--out", "a") == "train needs a log and its --label"
    assert refused("train", "absent.csv", *TRAIN, "--out", "a") == "no such file: absent.csv"
    assert refused("look", log) == "missing option '--label'"
    assert "cannot tell the format" in refused("look", __file__, "--label", "click")
    assert refused("demo", "--pairs", 0) == "pairs must be at least 1, got 0"


def test_out_is_taken(refused: Refused, log: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert refused("train", log, *TRAIN, "--out", "full") == "full exists and is not an empty folder"
    assert refused("train", log, *TRAIN, "--out", log) == f"{log} exists and is not an empty folder"
    (tmp_path / "empty").mkdir()
    refused("train", log, *TRAIN, "--out", "empty", "--label", "ts")


def test_the_traceback_is_for_those_who_ask(cli: Cli) -> None:
    argv = ("look", "absent.csv", "--label", "click")
    for asked in (("--debug", *argv), (*argv, "--debug")):
        result = cli(*asked)
        assert result.code == 2
        assert result.err.startswith("Traceback")
        assert result.err.endswith("error: no such file: absent.csv\nhint: check the path\n")
