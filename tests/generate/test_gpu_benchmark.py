"""The benchmark of decoding on a GPU runs whole without one: its kernels are right and its bytes as foretold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitalfew.core.files import read_document

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generate" / "gpu.py"
pytestmark = pytest.mark.slow


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_all_parts_run(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    out = tmp_path / "gpu.json"
    done = run("--dry", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_document(out, "benchmark", 1)["results"]
    assert list(results) == ["copy", "kernels", "step", "model", "prompt", "memory"]
    assert not any(row["missed"] for part in ("kernels", "memory") for row in results[part])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 0
    assert "no GPU" in done.stdout
