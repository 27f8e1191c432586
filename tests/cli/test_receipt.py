"""The verbs about receipts: what they print, and what their exit status says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vitalfew.core import Line, Receipt

from .conftest import TRAIN, Cli, start_command


def receipt(seconds: float = 2.0) -> Receipt:
    line = Line("training time", "s", 10.0, seconds, "measured")
    return Receipt("demo", "fused rows", (line,), "undecided", "one pair only", notes=("[bold]not markup[/bold]",))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    receipt().save(tmp_path / "receipt.json")
    return tmp_path / "receipt.json"


def test_show(cli: Cli, file: Path, tmp_path: Path) -> None:
    result = cli("receipt", "show", file)
    assert (result.code, result.err) == (0, "")
    assert "UNDECIDED" in result.out
    assert "[bold]not markup[/bold]" in result.out
    assert "\x1b" not in result.out
    assert cli("receipt", "show", file, "--format", "json").json() == receipt().to_dict()
    assert "# demo" in cli("receipt", "show", file, "--markdown").out
    result = cli("receipt", "show", file, "--html", "page.html")
    assert (result.code, result.out, result.err) == (0, "", "wrote page.html\n")
    assert (tmp_path / "page.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_diff(cli: Cli, file: Path, tmp_path: Path) -> None:
    receipt(3.0).save(tmp_path / "other.json")
    assert (cli("receipt", "diff", file, file).code, cli("receipt", "diff", file, file).out) == (0, "")
    result = cli("receipt", "diff", file, "other.json")
    assert (result.code, result.err) == (1, "")
    assert result.out == "lines > training time > after: 2 -> 3\n"
    result = cli("receipt", "diff", file, "other.json", "--format", "json")
    assert (result.code, result.err) == (1, "")
    assert result.json() == [{"where": "lines > training time > after", "before": 2.0, "after": 3.0}]
    assert cli("receipt", "diff", file, file, "--format", "json").json() == []


def test_check(cli: Cli, file: Path) -> None:
    result = cli("receipt", "check", file)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"unchanged: undecided, {receipt().digest()}\n"
    assert cli("receipt", "check", file, "--format", "json").json()["unchanged"] is True

    body = json.loads(file.read_text())
    body["verdict"] = "saved"
    file.write_text(json.dumps(body))
    result = cli("receipt", "check", file)
    assert (result.code, result.out) == (1, "")
    assert "was changed after it was written" in result.err
    result = cli("receipt", "check", file, "--format", "json")
    assert result.code == 1
    assert result.json()["unchanged"] is False
    result = cli("receipt", "show", file)
    assert (result.code, result.out) == (2, "")


def test_what_is_no_receipt(refused: Callable[..., str], cli: Cli, log: Path, file: Path) -> None:
    assert cli("train", log, *TRAIN, "--out", "a").code == 0
    for verb in ("show", "check"):
        assert refused("receipt", verb, "a/run.json").endswith("holds 'vitalfew/run', not a vitalfew receipt")
        assert refused("receipt", verb, "absent.json") == "no such file: absent.json"
        assert refused("receipt", verb, "a") == "a is a folder"
        assert "is not a JSON document" in refused("receipt", verb, log)
    body = json.loads(file.read_text())
    del body["lines"], body["verdict"]
    file.write_text(json.dumps(body))
    assert refused("receipt", "check", file).startswith("this is not a receipt")


def test_a_reader_that_leaves_early(file: Path, tmp_path: Path) -> None:
    """As with any tool of the shell; above all not 0, which `diff` would mean as `the same`."""
    big = Receipt("demo", "m", (), "undecided", "w", notes=tuple(f"note {i} " * 20 for i in range(3000)))
    big.save(tmp_path / "big.json")
    for argv in (("show", "big.json"), ("diff", file.name, "big.json")):
        with start_command(tmp_path, "receipt", *argv) as process:
            assert process.stdout
            process.stdout.read(10)
            process.stdout.close()
            assert process.stderr
            assert process.stderr.read() == b""
            assert process.wait(30) == 141
