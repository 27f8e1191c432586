"""Without a GPU, all that a launch of the kernels does but the launch: their calls are compiled for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import re, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vitalfew.generate import _kernels_triton as one, _kernels_triton_prompt as many, _kernels_triton_votes as ballots
from vitalfew.generate.noise import Noise
from vitalfew.generate.scores import Logits, Votes

class Hopper:
    get_current_device = get_current_stream = lambda *given: 0
    get_current_target = lambda *given: GPUTarget("cuda", 90, 32)

def compiled(kernel, *given, grid, warmup, **options):
    made = run(kernel, *given, grid=grid, warmup=True, **options)
    name, ptx, ttir = kernel.fn.__name__, made.asm["ptx"], made.asm["ttir"]
    assert made.metadata.shared <= 227 * 1024, (name, made.metadata.shared)
    assert all(size < 1 << 16 for size in grid[1:]), (name, grid)
    assert not re.search(r"\\b(atom|red)\\.", ptx), name  # what is added in another order is another number
    assert "shrsi" not in ttir, name  # hashes are shifted as what has no sign
    if name == "_attend" or name == "_cast":
        assert "cp.async" in ptx, name  # blocks are fetched ahead
    if kernel.__module__.endswith("prompt"):
        assert ("wgmma" in ptx) == (dtype.itemsize == 2 and d <= 256), name  # products run on tensor cores
    seen.append((name, made.hash))
    return made

def prompt(n):
    text, query = torch.zeros(B, H, n, d, dtype=dtype), torch.zeros(B, H * group, n, d, dtype=dtype)
    key_pos, query_pos = torch.zeros(B, H, n, dtype=torch.int32), torch.ones(B, n, dtype=torch.int64)
    many.attend_and_vote(query, text, text, form, key_pos, query_pos, torch.ones(B, n), votes, rich)

driver.set_active(Hopper())
run, JITFunction.run, one._processors, seen = JITFunction.run, compiled, lambda device: 132, []
dtype, (d, group, B, H, C, n) = getattr(torch, sys.argv[1]), map(int, sys.argv[2:])
slots, pos = torch.zeros(B, H, C, d, dtype=dtype), torch.zeros(B, H, C, dtype=torch.int32)
query, score, ones = torch.zeros(B, H, group, d, dtype=dtype), torch.zeros(B, H, C), torch.ones(B, dtype=torch.int64)
for rich in (True, False):
    each = torch.zeros(H * group)
    form = Logits(0.1, 5.0, each, each) if rich else Logits(0.1)
    _, logits = one.attend(query, slots, slots, pos, ones, form.scale, form.softcap, form.slopes, form.sinks)
    noise, tau, recent = (Noise(0, 1), torch.ones(B), ones) if rich else (None, 1.0, 1)
    ballots.vote_and_mark(score, logits, tau, noise, pos, ones, recent)
    one.write(slots, slots, pos, score, torch.zeros(B, H, dtype=torch.int64), query[:, :, 0], query[:, :, 0], ones)
    votes = Votes(None, 1.5 if rich else 1.0, noise)
    prompt(n)
assert " ".join(name for name, _ in seen[8:]) == "_attend _combine _ballot _vote _mark _write _attend _cast", seen
before = set(seen)
for other in (1, 7, 32, 75):
    prompt(other)
assert set(seen) == before  # another length is no reason to compile anew
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        "bfloat16 128 4 2 8 4000 300", "float16 80 3 2 2 4000 300", "bfloat16 256 8 1 1 819 77",
        "bfloat16 512 2 1 2 819 77", "bfloat16 64 71 1 1 100 64", "bfloat16 64 1 1 1 1 1", "float32 64 1 2 3 1000 50",
        "float32 256 4 1 2 1000 50",
    ],
    ids=str,
)  # fmt: skip
def test_calls_compile_for_hopper(tmp_path, sizes):
    pytest.importorskip("triton", reason="triton is not installed")
    (tmp_path / "build.py").write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "build.py"), *sizes.split()],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
