"""Run the command as a process of its own, without waiting each time until torch is loaded.

A server loads the libraries once and forks for every command; it runs no kernel itself, so no thread is lost in a fork.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_SERVER = """
import json, os, resource, signal, sys
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import vitalfew.cli._app, vitalfew.embeddings.jobs, vitalfew.look.clicks, vitalfew.report
import numba, pyarrow.parquet, pyarrow.csv, safetensors.torch, torch._dynamo, vitalfew.embeddings._kernels_numba
numba.njit(lambda x: x)(1)  # loads what every compiled function needs
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    code = 99
    try:
        os.chdir(request["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        if request["file_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
        sys.argv = ["vitalfew", *request["argv"]]
        code = vitalfew.cli.main()
    finally:
        for stream in sys.stdout, sys.stderr:
            stream.flush()
        os._exit(code)
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Running:
    """A command under way."""

    def __init__(self, server: subprocess.Popen[str], pid: int, folder: Path) -> None:
        self.pid, self._server, self._folder = pid, server, folder

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Result:
        code = int(_ask(self._server, {"wait": self.pid}))
        return Result(code, *((self._folder / name).read_text() for name in ("stdout", "stderr")))


def _ask(server: subprocess.Popen[str], request: dict[str, Any]) -> str:
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


Start = Callable[..., Running]
Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def start_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start `vitalfew ...` in a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def start(cwd: Path, *argv: object, file_bytes: int = 0) -> Running:
            folder = tmp_path_factory.mktemp("streams")
            request = {
                "argv": [str(word) for word in argv],
                "cwd": str(cwd),
                "stdout": str(folder / "stdout"),
                "stderr": str(folder / "stderr"),
                "file_bytes": file_bytes,
            }
            return Running(server, int(_ask(server, request)), folder)

        yield start
        assert server.stdin
        server.stdin.close()


@pytest.fixture
def start(start_in: Start, tmp_path: Path) -> Start:
    """Start `vitalfew ...` in the test's folder."""
    return functools.partial(start_in, tmp_path)


@pytest.fixture
def cli(start: Start) -> Cli:
    """Run `vitalfew ...` in the test's folder and return exit status, stdout and stderr."""
    return lambda *argv, **limits: start(*argv, **limits).wait()


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must end with exit 2, one error line, one hint line and no file more; return the error."""

    def refused(*argv: object, **limits: int) -> str:
        before = listing(tmp_path)
        result = cli(*argv, **limits)
        found = re.fullmatch(r"error: (.+)\nhint: (.+)\n", result.err)
        assert found, result.err
        assert result.code == 2
        assert result.out == ""
        assert listing(tmp_path) == before
        return found[1]

    return refused


def listing(folder: Path) -> dict[str, int]:
    """Return every path below a folder, files with their time of change."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns if path.is_file() else 0 for path in found}


def clicks(rows: int = 1200, seed: int = 0) -> dict[str, Any]:
    """Return the columns of a log in which some users click more."""
    rng = np.random.default_rng(seed)
    user = rng.zipf(1.5, rows) % 200
    score = (user % 3 == 0) * 0.5 + rng.random(rows)
    return {
        "ts": np.arange(rows),
        "click": (score > 0.8).astype(np.int64),
        "user": user,
        "item": [f"i{i}" for i in rng.integers(0, 40, rows)],
        "price": rng.normal(size=rows),
    }


def write_clicks(path: Path, rows: int = 1200, seed: int = 0) -> Path:
    """Write that log as Parquet."""
    pq.write_table(pa.table(clicks(rows, seed)), path)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log as Parquet."""
    return write_clicks(tmp_path / "clicks.parquet")


SMALL = ("--batch-size", 64, "--bottom", 8, "--top", 8, "--dim", 4, "--pairs", 0)
TRAIN = ("--label", "click", "--time", "ts", *SMALL)


def start_command(folder: Path, *argv: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start the real command in a folder, with pipes for what is not given."""
    command = [sys.executable, "-m", "vitalfew", *map(str, argv)]
    return subprocess.Popen(command, cwd=folder, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
