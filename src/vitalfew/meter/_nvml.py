"""NVML: the energy counter and the name of each GPU, through the optional library pynvml."""

from __future__ import annotations

import math
import threading
from typing import Any

from vitalfew.core.errors import MissingExtra, need
from vitalfew.meter._source import Absent, Covers, Source, SourceLost
from vitalfew.meter.figure import How
from vitalfew.meter.model import GPU_SHARE, Power

__all__ = ["Nvml", "gpu_names", "gpus"]

# The counter moves every 20 to 100 ms.
_STEP_SECONDS = 0.1
# The largest boards; where the limit of the board cannot be read.
_MAX_WATTS = 1000.0


class Nvml:
    """The counter of one GPU: every process on it, idle power included.

    Work that is queued on the device but not done at the end of a scope falls outside it: synchronise first.
    """

    scope: Covers = "gpu"
    how: How = "measured"
    reason = ""
    max_gap = math.inf

    def __init__(self, nvml: Any, index: int) -> None:
        self.name = f"gpu{index}"
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        limit = _limit(nvml, self._handle)
        self.detail = "NVML counter, whole device, idle included, every process on it"
        self.error = _STEP_SECONDS * limit
        self.power = _power(limit)
        self._lock = threading.Lock()
        self._last = 0.0
        self.read()

    def read(self) -> float:
        """Return the joules since the driver was loaded."""
        with self._lock:
            try:
                joules = float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
            except self._nvml.NVMLError as error:
                raise SourceLost(f"{self.name} does not tell its energy ({error})") from None
            last, self._last = self._last, joules
        if joules < last:
            raise SourceLost(f"the energy counter of {self.name} was reset")
        return joules


def _limit(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000
    except nvml.NVMLError:
        return _MAX_WATTS


def _power(limit: float) -> Power:
    return Power(GPU_SHARE * limit, note=f"nominal shares of the power limit, {limit:.0f} W")


def _in_slices(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:
        return False


def _start() -> tuple[Any, int]:
    """Return the library, with its driver found, and the number of GPUs."""
    try:
        nvml = need("pynvml")
    except MissingExtra as missing:
        raise SourceLost(str(missing)) from None
    try:
        nvml.nvmlInit()
        return nvml, int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        raise SourceLost(f"no NVIDIA driver answers ({error})") from None


def _gpu(nvml: Any, index: int) -> Source:
    name = f"gpu{index}"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _in_slices(nvml, handle):
            reason = f"{name} is cut into MIG slices, which have no counter"
            return Absent(name, "gpu", reason, _power(_limit(nvml, handle)))
        return Nvml(nvml, index)
    except (SourceLost, nvml.NVMLError) as error:
        # The device is there and draws power: a wide guess, not nothing.
        return Absent(name, "gpu", str(error), _power(_MAX_WATTS))


def gpus() -> list[Source]:
    """Return the counters of the GPUs, or null sources with the reason."""
    try:
        nvml, count = _start()
    except SourceLost as lost:
        return [Absent("gpu", "gpu", str(lost))]
    return [_gpu(nvml, index) for index in range(count)] or [Absent("gpu", "gpu", "NVML finds no GPU")]


def gpu_names() -> list[str]:
    """Return the names of the GPUs, none where NVML is absent."""
    try:
        nvml, count = _start()
    except SourceLost:
        return []
    return [_name(nvml, index) for index in range(count)]


def _name(nvml: Any, index: int) -> str:
    try:
        name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError as error:
        return f"unknown ({error})"
    # Releases before 12 answered in bytes.
    return name.decode() if isinstance(name, bytes) else str(name)
