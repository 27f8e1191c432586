"""The GPU benchmark runs whole without a GPU: every arm trains the same rows to the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitalfew.core.files import read_document

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_tiers.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("extra", [(), ("--bag", "3", "--share", "0.06")], ids=["one id", "bags"])
def test_all_arms_agree_and_the_plan_that_knows_the_future_moves_least(tmp_path: Path, extra: tuple[str, ...]) -> None:
    out = tmp_path / "gpu_tiers.json"
    done = run("--device", "cpu", "--tiny", "--out", str(out), *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {figure["arm"]: figure for figure in read_document(out, "benchmark", 1)["figures"]}
    assert list(figures) == ["g0", "g1", "g2", "g3", "plan", "ours"]
    assert all(figure["same_bits"] and figure["losses_apart"] == 0 for figure in figures.values())
    for arm in ("plan", "ours"):
        assert 0 < figures[arm]["bytes_in_per_step"] < figures["g3"]["bytes_in_per_step"]


def test_a_cache_smaller_than_a_batch_is_said() -> None:
    done = run("--device", "cpu", "--tiny", "--share", "0.001")
    assert done.returncode == 1
    assert "--share" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 0
    assert "no GPU" in done.stdout
