"""Facts of the machine, the limits of containers, and what an import costs."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
import subprocess
import sys

import pytest

from vitalfew.meter import machine
from vitalfew.meter._cgroup import core_limit, memory_limit


def test_facts_tell_neither_who_nor_where():
    text = json.dumps(machine())
    assert str(os.path.expanduser("~")) not in text
    assert os.getcwd() not in text
    for name in {socket.gethostname(), getpass.getuser(), platform.node()}:
        assert f'"{name}"' not in text


def test_facts_are_plain_and_whole():
    facts = machine(["numpy", "no-such-package"])
    assert set(facts["packages"]) == {"numpy"}
    assert 0 < facts["usable_cores"] <= facts["logical_cores"]
    assert facts["memory_bytes"] > 2**20
    assert facts["python"] == platform.python_version()


def test_limits_of_the_second_version(tmp_path):
    table = tmp_path / "table"
    table.write_text("0::/job/step\n")
    step = tmp_path / "job" / "step"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text("1048576\n")
    (step / "cpu.max").write_text("150000 100000\n")
    (step.parent / "cpu.max").write_text("max 100000\n")
    assert memory_limit(tmp_path, table) == 1048576
    assert core_limit(tmp_path, table) == 1.5


def test_limits_of_the_first_version(tmp_path):
    table = tmp_path / "table"
    table.write_text("4:memory:/host/name\n3:cpu,cpuacct:/\n2:cpuset:/\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4096\n")
    (tmp_path / "cpu,cpuacct").mkdir()
    (tmp_path / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu,cpuacct" / "cpu.cfs_period_us").write_text("100000\n")
    assert memory_limit(tmp_path, table) == 4096
    assert core_limit(tmp_path, table) == 0.5
    (tmp_path / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("-1\n")
    assert core_limit(tmp_path, table) is None


def test_importing_the_meter_loads_nothing_heavy():
    program = "import vitalfew.meter, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "psutil", "pynvml", "pandas", "zeus", "scipy"} & set(loaded)


def test_the_name_of_the_machine_is_its_processor():
    assert machine()["cpu"]


@pytest.mark.parametrize("missing", ["psutil"])
def test_a_missing_library_is_named_with_its_extra(missing):
    program = f"""
import sys
sys.modules[{missing!r}] = None
from vitalfew.meter import machine
machine()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "vitalfew[meter]" in run.stderr
