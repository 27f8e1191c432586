"""What is measured of this machine stays within its bounds and leaves nothing; the laws of the formula."""

from __future__ import annotations

import dataclasses
import resource
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import InputError, StorageError
from vitalfew.tiers import speed as module
from vitalfew.tiers._pages import Layout
from vitalfew.tiers.speed import Speed, expected_pages, measure_speed, pages_of, predict_step

DISK = Speed(page_reads=1e5, write_bytes=1e9, rows=1e7, page_bytes=4096, records_per_page=30, direct=True)
AMOUNT = st.floats(0, 1e6)


@pytest.mark.parametrize("record_bytes", [4, 136, 5000])
def test_measured(tmp_path: Path, record_bytes: int) -> None:
    found = measure_speed(tmp_path, record_bytes, max_bytes=1 << 20, seconds=0.05)
    layout = Layout.of(record_bytes)
    assert (found.page_bytes, found.records_per_page) == (layout.page_bytes, layout.records_per_page)
    assert found.page_reads > 100
    assert found.write_bytes > 1e5
    assert found.rows > 1000
    assert 0 < found.page_seconds <= 1.01 / found.page_reads
    assert found.write_seconds > 0
    assert not list(tmp_path.iterdir())


def test_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    reserve = module.DirectFile.reserve
    monkeypatch.setattr(module.DirectFile, "reserve", lambda self, size: (sizes.append(size), reserve(self, size)))
    start = time.monotonic()
    measure_speed(tmp_path, 136, max_bytes=24 << 20, seconds=0.4)
    assert time.monotonic() - start < 10
    assert max(sizes) <= 24 << 20


def test_an_absent_folder_is_not_made(tmp_path: Path) -> None:
    assert measure_speed(tmp_path / "a" / "b", 136, max_bytes=1 << 20, seconds=0.02).page_reads > 0
    assert not list(tmp_path.iterdir())


def test_a_smaller_disk_is_measured_by_a_smaller_file(tmp_path: Path) -> None:
    """The first pages fit, the others do not; and where not even those do, it says so and leaves nothing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, before[1]))
        assert measure_speed(tmp_path, 136, seconds=0.05).page_reads > 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(StorageError, match=r"the disk is full: enlarging .*vitalfew-speed"):
            measure_speed(tmp_path, 136, seconds=0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("record", "size", "seconds"), [(0, 1 << 20, 1.0), (136, 0, 1.0), (136, 1 << 20, 0.0)])
def test_refused(tmp_path: Path, record: int, size: int, seconds: float) -> None:
    with pytest.raises(InputError, match="cannot measure records"):
        measure_speed(tmp_path, record, max_bytes=size, seconds=seconds)


@given(compute=st.floats(0, 10), pages=AMOUNT, written=AMOUNT, rows=AMOUNT)
def test_a_step_takes_the_longer_or_the_sum(compute: float, pages: float, written: float, rows: float) -> None:
    moving = pages / 1e5 + written / 1e9 + rows / 1e7
    assert predict_step(compute, pages, written, DISK, rows_moved=rows) == pytest.approx(max(compute, moving))
    assert predict_step(compute, pages, written, DISK, overlap=False, rows_moved=rows) == pytest.approx(
        compute + moving
    )
    assert predict_step(compute, 0, 0, DISK) == compute


def test_a_mover_without_a_core_of_its_own_holds_the_computing_up() -> None:
    disk = dataclasses.replace(DISK, page_seconds=1e-6, write_seconds=1e-9)
    parts = {"rows_moved": 1e5, "planning": 0.002}
    assert predict_step(1.0, 1000, 1e6, disk, **parts) == 1.0
    assert predict_step(1.0, 1000, 1e6, disk, **parts, crowded=True) == pytest.approx(1.0 + 0.002 + 0.01 + 0.002)
    assert predict_step(0.001, 1000, 1e6, disk, **parts, crowded=True) == pytest.approx(0.002 + 0.01 + 0.01 + 0.001)


@given(rows=AMOUNT, below=AMOUNT, more=AMOUNT)
def test_pages_are_no_more_than_rows_or_pages(rows: float, below: float, more: float) -> None:
    pages = expected_pages(rows, below, 30)
    assert 0 <= pages <= min(rows, 1.5 * below / 30) * (1 + 1e-9)
    assert pages <= expected_pages(rows + more, below, 30) + 1e-9


def test_pages_of() -> None:
    assert [pages_of(rows, 136) for rows in (0, 1, 29, 30)] == [0, 1, 1, 2]
