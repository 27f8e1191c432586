from __future__ import annotations

import pytest
from hypothesis import settings

collect_ignore = ["peer_fbgemm.py"]  # a script for an environment of its own

settings.register_profile("embeddings", deadline=None, derandomize=True, database=None)
settings.load_profile("embeddings")


@pytest.fixture(autouse=True)
def one_thread(threads: object) -> None:
    """Each test here computes with one thread, unless it says otherwise."""
