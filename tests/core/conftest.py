from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from hypothesis import settings

from vitalfew.core import InputError

settings.register_profile("core", deadline=None, derandomize=True, database=None)
settings.load_profile("core")


@contextmanager
def _refuses(value: object, kind: type[Exception] = InputError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert str(value) in caught.value.message
    assert caught.value.hint
    assert str(caught.value) == f"{caught.value.message}; {caught.value.hint}"


@pytest.fixture(scope="session")
def refuses() -> Callable[..., AbstractContextManager[None]]:
    """The block raises an error for users that names the value and says what to do."""
    return _refuses
