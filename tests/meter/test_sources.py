"""Counters on pretended hardware: wraps, resets, refusals, absence; and what stands in for them."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType

import pytest

from vitalfew.core.errors import InputError, MissingExtra
from vitalfew.meter import _nvml, _rapl, scope, sources
from vitalfew.meter import sources as list_sources
from vitalfew.meter.energy import Energy
from vitalfew.meter.instruments import Instruments
from vitalfew.meter.model import BUSY_CORE, GPU_SHARE, IDLE_CORE, Watts
from vitalfew.meter.sources import SourceLost

RANGE = 262_144.0  # joules until the counter starts again, as on real packages


class Powercap:
    """A powercap folder with packages, and a clock."""

    def __init__(self, root):
        self.root, self.now = root, 0.0

    def add(self, zone, label, joules=0.0):
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(label + "\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE * 1e6:.0f}\n")
        self.set(joules, zone)

    def set(self, joules, zone="intel-rapl:0"):
        (self.root / zone / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")

    def packages(self, cores=8):
        return _rapl.packages(self.root, cores, lambda: self.now)


@pytest.fixture
def powercap(tmp_path):
    made = Powercap(tmp_path)
    made.add("intel-rapl:0", "package-0", 1000)
    return made


@pytest.fixture
def unreadable(monkeypatch):
    """Refuse to open files of a name: the permissions of a file mean nothing to a superuser."""
    refused: list[str] = []
    plain = builtins.open

    def guarded(file, *args, **kwargs):
        if any(str(file).endswith(name) for name in refused):
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)
    return refused


# Packages


def test_joules_of_a_package(powercap):
    (package,) = powercap.packages()
    powercap.now = 10
    powercap.set(1250.5)
    assert package.read() == pytest.approx(250.5)
    assert (package.name, package.scope, package.how, package.reason) == ("package0", "package", "measured", "")


def test_a_wrap_is_seen(powercap):
    (package,) = powercap.packages()
    for now, joules in ((100, 90_000), (200, 180_000), (300, 261_000)):
        powercap.now = now
        powercap.set(joules)
        package.read()
    powercap.now = 310
    powercap.set(856)
    assert package.read() == pytest.approx(261_000 - 1000 + RANGE - 261_000 + 856)


def test_a_reset_is_a_loss_and_the_next_reading_counts_on(powercap):
    (package,) = powercap.packages()
    powercap.now = 1
    powercap.set(5)
    with pytest.raises(SourceLost, match="was reset"):
        package.read()
    powercap.now = 2
    powercap.set(25)
    assert package.read() == 20


def test_a_gap_that_may_hide_a_wrap_is_a_loss(powercap):
    (package,) = powercap.packages()
    powercap.now = package.max_gap * 1.01
    powercap.set(1200)
    with pytest.raises(SourceLost, match="may have wrapped unseen"):
        package.read()


def test_only_whole_packages_are_read(powercap):
    powercap.add("intel-rapl:1", "package-1")
    powercap.add("intel-rapl:0:0", "core")
    powercap.add("intel-rapl:2", "psys")
    assert [package.name for package in powercap.packages()] == ["package0", "package1"]


def test_an_unreadable_counter_names_the_file_and_the_fix(powercap, unreadable):
    unreadable.append("energy_uj")
    (package,) = powercap.packages()
    file = powercap.root / "intel-rapl:0" / "energy_uj"
    assert package.reason == f"{file} may not be read; let an administrator run: chmod a+r {file}"
    with pytest.raises(SourceLost, match="chmod"):
        package.read()


@pytest.mark.parametrize("text", ["", "many", "\n"])
def test_a_counter_without_a_number_is_absent(powercap, text):
    (powercap.root / "intel-rapl:0" / "energy_uj").write_text(text)
    assert "holds no number" in powercap.packages()[0].reason


def test_a_file_that_disappears_is_a_loss(powercap):
    (package,) = powercap.packages()
    (powercap.root / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(SourceLost, match="No such file"):
        package.read()


def test_no_packages(tmp_path):
    (absent,) = _rapl.packages(tmp_path / "none", 8)
    assert "no package counter" in absent.reason


# GPUs


class FakeNvml(ModuleType):
    """The driver library, with scripted counters in millijoules; an exception in their place is raised."""

    class NVMLError(Exception):
        """Any error of the driver."""

    def __init__(self, counters, sliced=(), limit=700_000):
        super().__init__("pynvml")
        self.counters, self.sliced, self.limit, self.started = counters, sliced, limit, True

    def nvmlInit(self):
        if not self.started:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return b"Old GPU" if handle else "GPU"

    def nvmlDeviceGetMigMode(self, handle):
        if not self.sliced:
            raise self.NVMLError("Not Supported")
        return [int(handle in self.sliced), 0]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        if self.limit is None:
            raise self.NVMLError("Not Supported")
        return self.limit

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        answer = self.counters[handle]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def drive(monkeypatch):
    def install(*args, **kwargs):
        driver = FakeNvml(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        return driver

    return install


def test_joules_of_gpus(drive):
    driver = drive([5_000, 9_000])
    first, second = _nvml.gpus()
    driver.counters = [6_500, 9_000]
    assert (first.name, first.read(), second.name, second.read()) == ("gpu0", 6.5, "gpu1", 9.0)
    assert first.error == pytest.approx(70)
    assert _nvml.gpu_names() == ["GPU", "Old GPU"]


def test_a_gpu_counter_that_falls_was_reset(drive):
    driver = drive([5_000])
    (gpu,) = _nvml.gpus()
    driver.counters = [10]
    with pytest.raises(SourceLost, match="was reset"):
        gpu.read()
    driver.counters = [2_010]
    assert gpu.read() == 2.01


def test_a_sliced_gpu_is_modelled(drive):
    drive([5_000, 5_000], sliced=[1])
    whole, sliced = _nvml.gpus()
    assert whole.reason == ""
    assert "MIG" in sliced.reason
    figure = Energy([sliced]).figures([Energy([sliced]).read()[0]], Energy([sliced]).read(), wall=10, cpu=1)[0]
    assert (figure.how, figure.low, figure.high) == ("modelled", 700, 7000)
    assert "MIG" in figure.source


def test_a_gpu_without_a_counter_is_modelled(drive):
    drive([FakeNvml.NVMLError("Not Supported")], limit=None)
    (gpu,) = _nvml.gpus()
    assert "Not Supported" in gpu.reason
    assert gpu.power is not None


def test_no_gpu_no_driver_no_library(drive, monkeypatch):
    driver = drive([])
    assert [gpu.reason for gpu in _nvml.gpus()] == ["NVML finds no GPU"]
    driver.started = False
    assert "Driver Not Loaded" in _nvml.gpus()[0].reason
    assert _nvml.gpu_names() == []

    def missing(name):
        raise MissingExtra(f"this needs {name}", hint="install it")

    monkeypatch.setattr(_nvml, "need", missing)
    assert _nvml.gpus()[0].reason == "this needs pynvml; install it"


# Scopes on them


def energy_of(found, bench, between):
    instruments = Instruments(clock=lambda: bench.wall, cpu=lambda: bench.cpu, energy=Energy(found))
    with scope("outer", instruments=instruments) as outer:
        between()
    return {figure.name: figure for figure in outer.figures() if figure.unit == "J"}


def test_a_scope_takes_the_exact_difference(drive, powercap, bench):
    driver = drive([5_000])

    def work():
        powercap.now += 1
        powercap.set(1200)
        driver.counters = [1_005_000]

    found = energy_of([*powercap.packages(), *_nvml.gpus()], bench, work)
    assert found["energy_package0"].value == pytest.approx(200)
    assert found["energy_gpu0"].value == 1000
    assert {figure.how for figure in found.values()} == {"measured"}
    assert all(figure.low < figure.value < figure.high for figure in found.values())


def test_a_gpu_lost_in_a_scope_ends_as_modelled_with_the_reason(drive, bench):
    driver = drive([5_000])

    def work():
        bench.work(10)
        driver.counters = [FakeNvml.NVMLError("GPU is lost")]

    figure = energy_of(_nvml.gpus(), bench, work)["energy_gpu0"]
    assert (figure.how, figure.low, figure.value, figure.high) == ("modelled", 700, 3500, 7000)
    assert "GPU is lost" in figure.source


def test_a_reset_inside_is_known_to_every_scope_around_it(powercap, bench):
    found = powercap.packages()
    instruments = Instruments(clock=lambda: bench.wall, cpu=lambda: bench.cpu, energy=Energy(found))
    with scope("outer", instruments=instruments) as outer:
        with scope("before") as before:
            powercap.now += 1
            powercap.set(1010)
        with scope("around") as around:
            bench.work(10)
            powercap.now += 1
            powercap.set(3)
        with scope("after") as after:
            powercap.now += 1
            powercap.set(8)
    assert [node["energy_package0"].how for node in (before, around, after, outer)] == [
        "measured",
        "modelled",
        "measured",
        "modelled",
    ]
    assert "was reset" in outer["energy_package0"].source
    assert after["energy_package0"].value == pytest.approx(5)
    # A measured part cannot be taken from a modelled whole.
    assert "energy_package0" not in {figure.name for figure in outer.exclusive()}


def test_with_all_counters_gone_the_energy_is_modelled(monkeypatch, tmp_path, bench):
    monkeypatch.setattr(_rapl, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = energy_of(list_sources(), bench, lambda: bench.work(20))
    assert set(found) == {"energy_process", "energy_idle"}
    for figure in found.values():
        assert figure.how == "modelled"
        assert figure.high >= 2 * figure.low > 0
        assert "W (" in figure.source
        assert "no package counter" in figure.source
    # Half of 20 s of CPU time, at 5 W.
    assert found["energy_process"].value == 50


def test_the_list_is_best_first_and_leaves_nothing_out(monkeypatch, powercap, unreadable, drive):
    monkeypatch.setattr(_rapl, "ROOT", powercap.root)
    drive([5_000])
    assert [source.name for source in sources()] == ["package0", "gpu0"]
    unreadable.append("energy_uj")
    found = sources()
    assert [source.name for source in found] == ["gpu0", "package0", "process", "idle"]
    assert [bool(source.reason) for source in found] == [False, True, True, True]
    assert "chmod" in found[2].reason


@pytest.mark.parametrize("watts", [BUSY_CORE, IDLE_CORE, GPU_SHARE])
def test_nominal_watts_span_a_factor_of_two(watts):
    assert watts.high >= 2 * watts.low


@pytest.mark.parametrize("ends", [(5, 5, 5), (4, 5, 7), (5, 4, 20), (-1, 5, 20), (1, 30, 20)])
def test_narrow_or_crossed_watts_are_refused(ends):
    with pytest.raises(InputError):
        Watts(*ends)
