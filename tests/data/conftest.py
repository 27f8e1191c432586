from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from vitalfew.data import LogReader, open_log

# Kernels are compiled on their first call, which may take seconds.
settings.register_profile("data", deadline=None)
settings.load_profile("data")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write text or bytes into a file of the given name."""

    def write(content: str | bytes, name: str = "log.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., LogReader]:
    """Write columns as Parquet and open it."""

    def write(columns: dict[str, object], name: str = "log.parquet", row_group_size: int = 1000) -> LogReader:
        pq.write_table(pa.table(columns), tmp_path / name, row_group_size=row_group_size)
        return open_log(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def real_logs() -> Path:
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("VITALFEW_DATA", default)) / "recsys"
    if not folder.is_dir():
        pytest.skip(f"the real logs are absent: {folder} is no folder; set VITALFEW_DATA")
    return folder
