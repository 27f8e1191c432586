"""The benchmark of decoding on a GPU runs whole without one: its kernels are right and its bytes as foretold."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitalfew.core.files import read_document

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "generate" / "gpu.py"
pytestmark = pytest.mark.slow


def figures() -> Any:
    """Return what makes tables of results for the pages."""
    spec = importlib.util.spec_from_file_location("figures_generate", ROOT / "docs" / "figures_generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_all_parts_run(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    out = tmp_path / "gpu.json"
    done = run("--dry", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    body = read_document(out, "benchmark", 1)
    results = body["results"]
    assert list(results) == ["copy", "kernels", "step", "model", "prompt", "memory"]
    assert all(results.values())
    assert not any(row["missed"] for part in ("kernels", "memory") for row in results[part])
    table = figures().gpu_table(body, "a machine")
    for row in results["model"]:
        assert f"| {row['model']} | {row['rows']} x {row['tokens']:,} | {row['share']:.0%} |" in table
    assert all(f"{row['policy']} " in table for row in results["prompt"])
    assert f"{results['memory'][-1]['largest batch']} (50%)" in table


def test_an_unknown_part_is_refused() -> None:
    done = run("--dry", "--parts", "step,steps")
    assert done.returncode == 2
    assert "there is no part steps" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 0
    assert "no GPU" in done.stdout
