"""The peak of a scope, on a pretended machine and on this one; and the bytes that reach the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.meter import scope
from vitalfew.meter.memory import PeakRss

from .conftest import Bench

# What a scope does: hold more, give back, open a scope, close one.
steps = st.lists(st.one_of(st.integers(-500, 2000), st.sampled_from(["open", "close"])), max_size=40)


@given(steps)
def test_every_scope_keeps_its_own_peak(taken):
    bench = Bench()
    instruments = bench.instruments()
    truth: list[int] = []
    opened = []

    def close():
        ended, peak = opened.pop(), truth.pop()
        ended.__exit__(None, None, None)
        assert ended["peak_rss"].value == peak

    for step in taken:
        if step == "open":
            opened.append(scope("a", instruments=instruments).__enter__())
            truth.append(bench.rss)
        elif step == "close":
            if opened:
                close()
        else:
            bench.touch(max(step, -bench.rss))
            truth = [max(peak, bench.rss) for peak in truth]
    while opened:
        close()


def test_a_mark_that_cannot_be_lowered_is_said():
    now = [50, 900]
    peaks = PeakRss(read=lambda: (now[0], now[1]), reset=lambda: False)
    watch = peaks.open()
    peaks.close(watch)
    figure = watch.figure()
    assert (figure.low, figure.value, figure.high) == (50, 900, 900)
    assert "process peak so far" in figure.source
    # Where the mark rose inside, it is the peak of the scope all the same.
    watch = peaks.open()
    now[1] = 1200
    peaks.close(watch)
    assert (watch.figure().value, watch.figure().low) == (1200, None)


def test_the_peak_of_the_process_survives_lowering():
    marks = iter([(10, 90), (20, 50), (20, 60)])
    peaks = PeakRss(read=lambda: next(marks), reset=lambda: True)
    peaks.open()
    peaks.open()
    assert peaks.highest() == 90


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lowers the mark")
def test_the_peak_rises_by_what_is_touched():
    program = """
import json
from vitalfew.meter import peak_rss, scope
MIB = 2**20
with scope("warm"):
    pass
with scope("outer") as outer:
    big = bytearray(b"x") * (96 * MIB)
    del big
    with scope("inner") as inner:
        small = bytearray(b"x") * (32 * MIB)
        del small
print(json.dumps({
    "outer": outer["peak_rss"].value - outer["rss_start"].value,
    "inner": inner["peak_rss"].value - inner["rss_start"].value,
    "source": inner["peak_rss"].source,
    "process": peak_rss().value - outer["rss_start"].value,
}))
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    mib = 2**20
    assert 90 * mib < found["outer"] < 104 * mib
    assert found["process"] >= found["outer"]
    if "in the scope" not in found["source"]:
        pytest.skip("the mark cannot be lowered here")
    assert 30 * mib < found["inner"] < 40 * mib


def test_bytes_that_reach_the_disk(tmp_path):
    with scope("outer") as outer, scope("save"), open(tmp_path / "file", "wb") as file:
        file.write(b"x" * (8 * 2**20))
        file.flush()
        os.fsync(file.fileno())
    names = {figure.name for figure in outer.figures()}
    if "written" not in names or outer["written"].value == 0:
        pytest.skip("this system or file system does not count")
    assert 8 * 2**20 <= outer["written"].value < 16 * 2**20
    assert outer["written"].how == "measured"
