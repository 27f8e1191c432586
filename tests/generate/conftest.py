from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # for test_triton; read when triton is imported, which transformers does

settings.register_profile("generate", deadline=None, derandomize=True, database=None)
settings.load_profile("generate")


@pytest.fixture(autouse=True)
def one_thread(threads: object) -> None:
    """Each test here computes with one thread, unless it says otherwise."""
