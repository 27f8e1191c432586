"""The command as a whole: what it loads, what it says where, how it looks on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitalfew
from vitalfew.core import Receipt

from .conftest import TRAIN, Cli, start_command


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, vitalfew.cli as c; c.main(['train', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not {"numpy", "torch", "pyarrow", "numba", "rich", "vitalfew.core", "vitalfew.data"} & loaded
    assert "--checkpoint-seconds" in done.stdout


def test_help_and_version(cli: Cli) -> None:
    result = cli("--help")
    assert (result.code, result.err) == (0, "")
    for verb in ("demo", "look", "train", "predict", "receipt", "methods", "doctor"):
        assert re.search(rf"^  {verb} +[A-Z].*[^.]\.?$", result.out, re.MULTILINE)
        assert cli(verb, "--help").code == 0
    assert "...\n" not in result.out.split("\n", 1)[1]  # no summary is cut off
    assert cli("--version").out == f"vitalfew {vitalfew.__version__}\n"
    result = cli()
    assert (result.code, result.out) == (2, "")
    assert "Usage: vitalfew" in result.err


@pytest.mark.parametrize("verb", ["methods", "doctor"])
def test_facts(cli: Cli, verb: str) -> None:
    result = cli(verb, "--format", "json")
    assert (result.code, result.err) == (0, "")
    assert result.json()
    result = cli(verb)
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out


def test_methods_name_what_is_there() -> None:
    from vitalfew.cli._methods import METHODS

    root = Path(vitalfew.__file__).parents[2]
    for method in METHODS:
        assert (root / method["card"]).exists(), method["card"]


def test_stdout_is_for_data(cli: Cli, log: Path, tmp_path: Path) -> None:
    result = cli("train", log, *TRAIN, "--out", "a", "--format", "json")
    assert result.code == 0
    assert result.json() == Receipt.load(tmp_path / "a" / "receipt.json").to_dict()
    assert result.err == "receipt: a/receipt.json  report: a/report.html\n"
    result = cli("train", log, *TRAIN, "--out", "b")
    assert "\x1b" not in result.out + result.err


def test_a_full_disk_under_stdout(log: Path, tmp_path: Path) -> None:
    del log
    with open("/dev/full", "wb") as full:
        process = start_command(tmp_path, "methods", stdout=full)
    assert process.stderr
    assert process.stderr.read().startswith(b"error: ")
    process.stderr.close()
    assert process.wait(30) == 2


def on_terminal(folder: Path, *argv: object, **env: str) -> tuple[bytes, bytes]:
    """Return what a command writes to a terminal as stderr, and its stdout."""
    master, slave = pty.openpty()
    process = start_command(folder, *argv, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **env})
    os.close(slave)
    drawn = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        drawn += piece
    os.close(master)
    assert process.stdout
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait(60) == 0
    return drawn, out


def test_bars_on_a_terminal(log: Path, tmp_path: Path) -> None:
    argv = ("train", log, *TRAIN, "--epochs", 40, "--out", "a", "--format", "json")
    drawn, out = on_terminal(tmp_path, *argv, NO_COLOR="1")
    for stage in ("split", "count ids", "encode", "train", "test"):
        assert stage.encode() in drawn
    assert "━".encode() in drawn
    assert b"100%" in drawn
    assert b"\x1b[" in drawn
    assert not re.search(rb"\x1b\[[\d;]*(3[0-7]|9[0-7]|38;)[\d;]*m", drawn)  # no colour
    assert b"\x1b" not in out


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the first flights only, and without the processes that measure memory."""
    import pyarrow.parquet as pq

    from vitalfew.cli import main
    from vitalfew.data import sample
    from vitalfew.embeddings import account

    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(sample.flights()).slice(0, 4000), few)
    monkeypatch.setattr(sample, "flights", lambda: few)
    monkeypatch.setattr(account, "peak_memory", lambda *a, plain, **k: 2 if plain else 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()  # the user's own
    assert main(["demo", "--pairs", "2", "--format", "json", "--out", "."]) == 0
    said = capsys.readouterr()
    receipt = Receipt.load(tmp_path / "receipt.json")
    assert said.out.startswith("{")
    assert receipt.to_dict()["pairs"]
    assert "flights to train on" in said.err
    assert "foretold: " in said.err
    assert "the rule, fixed beforehand: At equal work" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.parquet", "receipt.json", "report.html", "work"]


def test_the_comparison(cli: Cli, log: Path) -> None:
    """The whole of it, once, as a user runs it: nothing but data on stdout, no warning on stderr."""
    argv = (*TRAIN, "--trial-steps", 4, "--optimizer", "rowwise_adagrad", "--storage", "bfloat16")
    result = cli("train", log, *argv, "--pairs", 1, "--out", "a", "--format", "json")
    assert (result.code, result.err) == (0, "receipt: a/receipt.json  report: a/report.html\n")
    receipt = result.json()
    assert receipt["verdict"] == "undecided"
    assert receipt["why"] == "one pair has no spread: at least 2 are needed"
    assert receipt["pairs_needed"] == 2
    assert "the plain way trains its rows by adagrad: PyTorch has no rowwise Adagrad for them" in receipt["notes"]
    assert "the plain way keeps its rows as float32, ours as bfloat16" in receipt["notes"]
    peak = next(line for line in receipt["lines"] if line["what"] == "peak memory")
    assert peak["before"] > 2**20
    assert peak["after"] > 2**20


def test_look(cli: Cli, log: Path) -> None:
    result = cli("look", log, "--label", "click", "--time", "ts", "--format", "json")
    assert (result.code, result.err) == (0, "")
    seen = result.json()
    assert seen["rows"] == 1200
    assert seen["predicted"]["how"] == "modelled"
    assert seen["predicted"]["factor"] > 0
    text = cli("look", log, "--label", "click", "--time", "ts")
    assert (text.code, text.err) == (0, "")
    assert "foretold (modelled from a few timed steps)" in " ".join(text.out.split())
    assert "\x1b" not in text.out
