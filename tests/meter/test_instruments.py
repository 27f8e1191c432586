"""The instruments of this process, and the reader that keeps a wrapping counter from turning unseen."""

from __future__ import annotations

import threading

from vitalfew.meter import instruments as module
from vitalfew.meter import scope
from vitalfew.meter.energy import Energy
from vitalfew.meter.instruments import Instruments, _keep_turning

from .conftest import FakeCounter


def test_figures_of_this_process():
    with scope("outer") as outer:
        sum(range(10_000))
        with scope("inner") as inner:
            pass
    figures = {figure.name: figure for figure in outer.figures()}
    assert {"wall", "cpu", "peak_rss", "rss_start"} <= set(figures)
    assert figures["wall"].value >= inner["wall"].value >= 0
    assert all(figure.unit and figure.how and figure.source for figure in figures.values())


def test_the_instruments_are_found_once_and_again_after_a_fork(monkeypatch):
    monkeypatch.setattr(module, "_default", None)
    first = module.default()
    assert module.default() is first
    monkeypatch.setattr(module, "_lock", module._lock)
    module._forget()
    assert module.default() is not first


def test_a_counter_that_wraps_is_read_in_the_background():
    read = threading.Event()

    class Wrapping(FakeCounter):
        def read(self):
            read.set()
            return 0.0

    stop = _keep_turning(Energy([FakeCounter(), Wrapping(max_gap=0.01)]))
    assert read.wait(10)
    stop.set()


def test_a_system_without_a_disk_counter(monkeypatch):
    psutil = module.need("psutil")

    def denied(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "io_counters", denied)
    assert Instruments(energy=Energy([])).begin().disk is None
