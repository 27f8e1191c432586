from __future__ import annotations

import gzip
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data import open_log
from vitalfew.data._criteo import _filled


def rows_of(reader, **options):
    return [row for batch in reader.batches(**options) for row in batch.to_pylist()]


CSV = "click,user,price\n1,ann,0.5\n0,bob,1.5\n"


@pytest.mark.parametrize(
    "content",
    [CSV, CSV.rstrip("\n"), CSV.replace("\n", "\r\n"), "\ufeff" + CSV, CSV.replace("\n", "\n\n")],
    ids=["plain", "no last newline", "CRLF", "byte order mark", "empty lines"],
)
def test_csv_variants_read_the_same(write, content):
    expected = [{"click": 1, "user": "ann", "price": 0.5}, {"click": 0, "user": "bob", "price": 1.5}]
    assert rows_of(open_log(write(content))) == expected
    assert rows_of(open_log(write(gzip.compress(content.encode()), "log.csv.gz"))) == expected
    assert rows_of(open_log(write(content.replace(",", "\t"), "log.tsv"))) == expected


def test_columns_types_and_sizes(write, parquet):
    path = write(CSV)
    log = open_log(path)
    assert log.columns == ("click", "user", "price")
    assert log.types == {"click": pa.int64(), "user": pa.string(), "price": pa.float64()}
    assert log.num_rows is None
    assert log.num_bytes == path.stat().st_size
    assert parquet({"a": [1, 2, 3]}).num_rows == 3


def test_quoted_fields_may_hold_newlines_across_blocks(write):
    rows = [(i, "x" * 50 + "\n" + '"') for i in range(60_000)]
    content = "a,b\n" + "".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in rows)
    assert [tuple(row.values()) for row in rows_of(open_log(write(content)))] == rows


def test_selected_columns_come_in_the_order_asked_for(write, parquet):
    for log in (open_log(write(CSV)), parquet({"click": [1], "user": ["ann"], "user.x": [2], "price": [0.5]})):
        batch = next(log.batches(["price", "user"]))
        assert batch.schema.names == ["price", "user"]


def test_batch_rows_is_the_most(write, parquet):
    log = open_log(write("a,b\n" + "1,2\n" * 1000))
    assert max(batch.num_rows for batch in log.batches(batch_rows=64)) == 64
    assert max(batch.num_rows for batch in parquet({"a": range(1000)}).batches(batch_rows=64)) == 64


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
def test_progress_rises_to_one(write, parquet, kind):
    content = ("a,b\n" + "1,some text\n" * 800_000).encode()
    if kind == "parquet":
        log = parquet({"a": range(300_000)})
    else:
        log = open_log(write(gzip.compress(content, 1) if kind == "csv.gz" else content, f"log.{kind}"))
    shares = []
    for _ in log.batches(progress=shares.append):
        pass
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[0] > 0
    assert kind != "parquet" or shares[0] < 1  # text is read well ahead


def test_a_stream_may_be_left_early(write):
    log = open_log(write("a,b\n" + "1,2\n" * 2_000_000))
    batches = log.batches()
    next(batches)
    batches.close()


def test_a_folder_is_read_by_name(write, tmp_path):
    write("a,b\n1,x\n", "part-1.csv")
    write("b,a\ny,2\n", "part-2.csv")
    write("a,b\n", "part-3.csv")
    write("", "_SUCCESS")
    log = open_log(tmp_path)
    assert rows_of(log) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert rows_of(open_log([tmp_path / "part-2.csv", tmp_path / "part-1.csv"])) == [
        {"b": "y", "a": 2},
        {"b": "x", "a": 1},
    ]


def test_64_bit_ids_stay_exact(write):
    log = open_log(write("a,b\n18446744073709551615,1\n18446744073709551614,2\n"))
    assert [row["a"] for row in rows_of(log)] == ["18446744073709551615", "18446744073709551614"]


def test_text_columns_keep_leading_zeros(write):
    log = open_log(write("zip,b\n007,1\n7,2\n"), text=["zip"])
    assert [row["zip"] for row in rows_of(log)] == ["007", "7"]
    with pytest.raises(InputError, match="`zap` is missing"):
        open_log(write("zip,b\n007,1\n"), text=["zap"])


def test_a_parquet_with_other_types_inside(parquet):
    columns = {
        "tags": pa.array([[1, 2], None, []], pa.list_(pa.int32())),
        "site": pa.array(["a", "b", None]).dictionary_encode(),
    }
    assert rows_of(parquet(columns)) == [
        {"tags": [1, 2], "site": "a"},
        {"tags": None, "site": "b"},
        {"tags": [], "site": None},
    ]


def criteo_row(label="1\t", fields=39):
    return label + "\t".join(["5"] * 13 + ["68fd1e64"] * (fields - 13))


def test_criteo_rows_may_lack_trailing_fields(write):
    content = "\n".join([criteo_row(), criteo_row(fields=36), criteo_row(fields=14)])
    for text in (content, content.replace("\n", "\r\n"), content + "\n"):
        rows = rows_of(open_log(write(text, "train.txt"), format="criteo"))
        assert [row["label"] for row in rows] == [1, 1, 1]
        assert [row["C26"] for row in rows] == ["68fd1e64", "", ""]
        assert [row["C1"] for row in rows] == ["68fd1e64"] * 3


def test_criteo_without_labels_is_recognised(write):
    log = open_log(write(criteo_row(label="") + "\n" + criteo_row(label="", fields=30), "test.txt"), format="criteo")
    assert "label" not in log.columns
    assert [row["C26"] for row in rows_of(log)] == ["68fd1e64", ""]


@given(st.lists(st.lists(st.text(string.ascii_letters, max_size=4), min_size=2, max_size=5), min_size=1, max_size=20))
def test_filling_up_adds_only_trailing_fields(rows):
    text = "\n".join("\t".join(row) for row in rows) + "\n"
    filled = _filled(text.encode(), 5).decode().splitlines()
    assert [line.split("\t") for line in filled] == [row + [""] * (5 - len(row)) for row in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rows=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(min_size=1)), min_size=1, max_size=50))
def test_parquet_round_trip(tmp_path, rows):
    table = pa.table({"a": [a for a, _ in rows], "b": [b for _, b in rows]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    assert [tuple(row.values()) for row in rows_of(open_log(tmp_path / "x.parquet"), batch_rows=5)] == rows


BAD_FILES = {
    "empty": ("log.csv", b"", "`.*log.csv` is empty"),
    "blank": ("log.csv", b"\n\n", "`.*log.csv` is empty"),
    "header only": ("log.csv", b"a,b\n", "has a header but no rows"),
    "short row": ("log.csv", b"a,b\n1,2\n3\n", r"row 3 of `.*log.csv` has 1 field, expected 2: '3'"),
    "long row": ("log.csv", b"a,b\n1,2\n3,4,5\n", "has 3 fields, expected 2"),
    "not UTF-8": ("log.csv", "a,b\nZürich,2\n".encode("latin1"), "column `a` of `.*log.csv` is not UTF-8.*iconv"),
    "not UTF-8 header": ("log.csv", "ü,b\n1,2\n".encode("latin1"), "log.csv` is not UTF-8"),
    "two of a name": ("log.csv", b"a,a\n1,2\n", "two columns named `a`"),
    "truncated gzip": ("log.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 1000)[:-9], "ends in the middle or is dama"),
    "damaged gzip": ("log.csv.gz", b"\x1f\x8b" + b"\0" * 50, "ends in the middle or is damaged"),
    "no Parquet": ("log.parquet", b"PAR1 nonsense", "is not a readable Parquet file"),
    "empty Parquet": ("log.parquet", b"", "is empty"),
    "unknown format": ("log.xyz", b"a", "cannot tell the format of `.*log.xyz`.*csv"),
    "gzip of Parquet": ("log.parquet.gz", b"a", "cannot tell the format"),
    "unclosed quote": ("log.csv", b'a,b\n"1,2\n' + b"3,4\n" * 2_000_000, "longer than|has 1 field"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(write, name):
    file, content, message = BAD_FILES[name]
    path = write(content, file)
    with pytest.raises(InputError, match=message) as caught:
        rows_of(open_log(path))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [10, 200_000])
def test_a_bad_row_deep_in_the_file_has_its_number(write, at):
    lines = ["a,b"] + ["1,longer text to fill a block"] * 400_000
    lines[at - 1] = "1"
    path = write("\n".join(lines))
    with pytest.raises(InputError, match=rf"row {at} of .* has 1 field, expected 2.*--bad-rows skip"):
        rows_of(open_log(path))
    log = open_log(path, bad_rows="skip")
    assert sum(batch.num_rows for batch in log.batches()) == 400_000 - 1
    assert log.num_bad_rows == 1


def test_a_value_that_does_not_parse(write):
    path = write("a,b\n" + "1,2\n" * 400_000 + "1,x\n")
    with pytest.raises(InputError, match=r"column `b` of `.*` holds 'x', which is no whole number.*text=\['b'\]"):
        rows_of(open_log(path), columns=["b"])
    assert rows_of(open_log(path, text=["b"]), columns=["b"])[-1] == {"b": "x"}


def test_late_latin1(write):
    path = write(b"a,b\n" + b"1,x\n" * 400_000 + b"1,\xfc\n")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        rows_of(open_log(path))


def test_a_parquet_cut_short(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": range(100_000)}), path)
    damaged = bytearray(path.read_bytes())
    damaged[100:50_000] = b"\xff" * 49_900
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="not a readable Parquet file"):
        rows_of(open_log(path))
    path.write_bytes(bytes(damaged[:-100]))
    with pytest.raises(InputError, match="not a readable Parquet file"):
        open_log(path)


def test_wrong_columns(write, tmp_path):
    log = open_log(write(CSV))
    with pytest.raises(InputError, match=r"`clik` is missing from .*\(found: click, user, price\).*mean `click`"):
        log.batches(["clik"])
    write("click,usr,price\n1,ann,2\n", "other.csv")
    with pytest.raises(InputError, match=r"`user` is missing from `.*other.csv`"):
        open_log(tmp_path)


def test_wrong_calls(write, tmp_path, parquet):
    path = write(CSV)
    for call, message in [
        (lambda: open_log(tmp_path / "no.csv"), "no such file"),
        (lambda: open_log([]), "list of files is empty"),
        (lambda: open_log(path, format="json"), "unknown format 'json'"),
        (lambda: open_log(path, bad_rows="drop"), "bad_rows must be"),
        (lambda: open_log(path).batches(batch_rows=0), "batch_rows must be 1 or more"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="holds no Parquet or CSV file"):
        open_log(tmp_path / "void")
    parquet({"click": [1]})
    with pytest.raises(InputError, match="the files mix formats: csv, parquet"):
        open_log(tmp_path)
    with pytest.raises(InputError, match="has no rows"):
        parquet({"a": pa.array([], pa.int64())}, name="none.parquet")
