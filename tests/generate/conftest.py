from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import settings

from vitalfew.core import InputError

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # for test_triton; read when triton is imported, which transformers does

settings.register_profile("generate", deadline=None, derandomize=True, database=None)
settings.load_profile("generate")


@contextmanager
def _refuses(value: object) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    assert str(value) in caught.value.message
    assert caught.value.hint


@pytest.fixture(scope="session")
def refuses() -> Callable[..., AbstractContextManager[None]]:
    """The block raises an error for users that names the value and says what to do."""
    return _refuses


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Set PyTorch's number of threads for one test; one, unless the test says otherwise: the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
