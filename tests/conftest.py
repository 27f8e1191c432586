from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from vitalfew.core import InputError


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


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set PyTorch's number of threads for one test; one, unless the test says otherwise: the machine may be busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
