"""The benchmark of the methods on a GPU runs whole without one, and its arms that only move rows learn the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitalfew.core.files import read_document

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_methods.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_all_arms_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu_methods.json"
    done = run("--dry", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {figure["arm"]: figure for figure in read_document(out, "benchmark", 1)["figures"]}
    assert list(figures) == ["cpu", "fetch", "ahead", "hot", "split", "stale"]
    losses = {arm: figure["held_back_loss"] for arm, figure in figures.items()}
    assert losses["cpu"] == losses["fetch"] == losses["ahead"] == pytest.approx(losses["split"], rel=1e-4)
    assert losses["hot"] == pytest.approx(losses["cpu"], rel=0.05)
    moved = {arm: figure["rows_moved_per_step"] for arm, figure in figures.items()}
    assert 0 == moved["cpu"] < moved["ahead"] < moved["fetch"] == moved["split"]
    assert moved["hot"] < moved["fetch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 0
    assert "no GPU" in done.stdout
