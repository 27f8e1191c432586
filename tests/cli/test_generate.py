"""The verbs about text: what they write where, what they refuse, and what a killed comparison leaves."""

from __future__ import annotations

import gzip
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from vitalfew.cli import _app
from vitalfew.core import Receipt

from ..generate.tiny import smollm2_folder, tiny_model  # noqa: TID252 - one model for both folders
from .conftest import Cli, Result, Start

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", context=2048)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `vitalfew ...` in this process: one of its own would load transformers each time."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Result:
        words = [str(word) for word in argv]
        monkeypatch.setattr(sys, "argv", ["vitalfew", *words])
        code = _app.run(words)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Four texts of which three have 100 tokens."""
    lines = [json.dumps({"text": (TEXT * 3)[k:]}) for k in range(3)] + [json.dumps({"text": "short"})]
    file = tmp_path / "texts.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


@pytest.fixture
def long(tmp_path: Path) -> Path:
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 6)
    return file


COMPARE = ("--prompt-tokens", 80, "--continue-tokens", 20, "--budgets", "20%,50%", "--policies", "full,snapkv,recent")


def test_text_goes_to_stdout_and_the_receipt_to_stderr(cli: Cli, model: Path, long: Path) -> None:
    result = cli("generate", model, "--prompt-file", long, "--max-new-tokens", 9, "--policy", "snapkv")
    assert result.code == 0, result.err
    assert result.out.endswith("\n")
    assert "keys and values" not in result.out
    assert "UNDECIDED" in result.err
    assert "less" in result.err


def test_the_receipt_goes_to_a_file(cli: Cli, model: Path, long: Path, tmp_path: Path) -> None:
    words = ("generate", model, "--prompt-file", long, "--max-new-tokens", 9, "--format", "json")
    result = cli(*words, "--out", "r/receipt.json")
    assert (result.code, result.err) == (0, "receipt: r/receipt.json\n")
    receipt = Receipt.load(tmp_path / "r" / "receipt.json")
    assert result.json()["receipt"] == receipt.to_dict()
    assert receipt.lines[0].ratio
    assert receipt.lines[0].ratio > 1.5
    assert receipt.command.startswith("vitalfew generate")
    assert cli("receipt", "check", "r/receipt.json").code == 0


def test_the_full_cache_is_the_plain_model(cli: Cli, model: Path, long: Path) -> None:
    words = ("generate", model, "--prompt-file", long, "--max-new-tokens", 16, "--format", "json")
    full = cli(*words, "--policy", "full")
    assert (full.code, full.err, full.json()["receipt"]) == (0, "", None)
    assert cli(*words, "--policy", "h2o", "--budget", "100%").json()["text"] == full.json()["text"]
    streamed = cli("generate", model, "--prompt-file", long, "--max-new-tokens", 16, "--policy", "full")
    assert streamed.out.rstrip("\n") == full.json()["text"].rstrip("\n")


def test_the_seed_is_all_that_is_drawn(cli: Cli, model: Path, long: Path) -> None:
    words = ("generate", model, "--prompt-file", long, "--max-new-tokens", 16, "--temperature", 1, "--format", "json")
    first, again, other = (cli(*words, "--seed", seed).json()["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_question_after_a_file(cli: Cli, model: Path, long: Path) -> None:
    words = ("generate", model, "--prompt-file", long, "--prompt", "Who minds?", "--max-new-tokens", 4)
    result = cli(*words, "--chat", "--budget", "100", "--policy", "keyformer", "--recent", 0.2)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is no prompt"),
        (("--prompt-file", "absent.txt"), "no such file: absent.txt"),
        (("--prompt", "  "), "the prompt is empty"),
        (("--prompt", "a", "--policy", "nosuch"), "nosuch"),
        (("--prompt", "a", "--budget", "some"), "some"),
        (("--prompt", "a", "--budget", "1.5"), "1.5"),
        (("--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, got 0"),
        (("--prompt", "a", "--temperature", -1), "--temperature must be at least 0, got -1"),
        (("--prompt", "a", "--max-new-tokens", 5000), "goes past the 2,048"),
        (("--prompt", "a", "--policy", "full", "--budget", "20%"), "--budget says nothing with --policy full"),
        (("--prompt", "a", "--policy", "full", "--out", "r.json"), "--out says nothing with --policy full"),
    ],
)
def test_what_generate_refuses(cli: Cli, model: Path, words: tuple[object, ...], said: str) -> None:
    result = cli("generate", model, *words)
    assert (result.code, result.out) == (2, "")
    assert re.match(r"error: .*\nhint: .*\n$", result.err)
    assert said in result.err


def test_a_model_that_is_none(cli: Cli, tmp_path: Path) -> None:
    result = cli("generate", "absent", "--prompt", "a")
    assert (result.code, result.err.splitlines()[0]) == (2, "error: no such folder: absent")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in cli("generate", "empty", "--prompt", "a").err


def test_a_comparison_leaves_table_page_and_receipts(cli: Cli, model: Path, texts: Path, tmp_path: Path) -> None:
    result = cli("compare-cache", model, texts, *COMPARE, "--out", "kv")
    assert result.code == 0, result.err
    assert result.err.splitlines() == [
        "3 of 4 texts have the 100 tokens that are asked for",
        "receipts: kv/receipts  report: kv/report.html",
    ]
    for name in ("full", "snapkv 20%", "snapkv 50%", "recent 20%", "recent 50%"):
        assert re.search(rf"^{name} ", result.out, re.MULTILINE)
    receipt = Receipt.load(tmp_path / "kv" / "receipts" / "snapkv-20%.json")
    assert len(receipt.pairs) == 3
    assert "<svg" in (tmp_path / "kv" / "report.html").read_text()
    again = cli("compare-cache", model, texts, *COMPARE, "--out", "kv", "--format", "json")
    assert again.code == 0
    arms = again.json()["arms"]
    assert [arm["policy"] for arm in arms] == ["full", "snapkv", "snapkv", "recent", "recent"]
    assert arms[1]["runs"][0]["nbytes"] < arms[2]["runs"][0]["nbytes"] < arms[0]["runs"][0]["nbytes"]
    other = cli("compare-cache", model, texts, *COMPARE, "--out", "kv", "--seed", 1)
    assert "holds a comparison with another --seed 0" in other.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policies", "full"), "nothing to compare"),
        (("--policies", "nosuch"), "nosuch"),
        (("--budgets", "0%"), "keeps nothing"),
        (("--texts", 0), "--texts must be at least 1, got 0"),
        (("--tolerance", 0), "tolerance must be positive"),
        (("--prompt-tokens", 4000), "no text has the 4000 + 20 tokens"),
    ],
)
def test_what_compare_cache_refuses(
    cli: Cli, model: Path, texts: Path, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    result = cli("compare-cache", model, texts, *COMPARE, "--out", "kv", *words)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert not (tmp_path / "kv").exists()


def test_a_killed_comparison_goes_on(start: Start, cli: Cli, model: Path, texts: Path, tmp_path: Path) -> None:
    words = ("compare-cache", model, texts, *COMPARE, "--out", "kv", "--format", "json")
    running, runs = start(*words), tmp_path / "kv" / "runs"
    until = time.monotonic() + 60
    while len(list(runs.glob("*.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    running.kill(signal.SIGKILL)
    running.wait()
    left = {file: file.stat().st_mtime_ns for file in runs.glob("*.json")}
    assert len(left) >= 2
    done = cli(*words)
    assert done.code == 0, done.err
    assert {file: file.stat().st_mtime_ns for file in left} == left
    assert len(list(runs.glob("*.json"))) == 15


def test_ctrl_c_says_how_to_go_on(start: Start, model: Path, texts: Path, tmp_path: Path) -> None:
    running = start("compare-cache", model, texts, *COMPARE, "--out", "kv")
    until = time.monotonic() + 60
    while not (tmp_path / "kv" / "course.json").exists() and time.monotonic() < until:
        time.sleep(0.005)
    running.kill(signal.SIGINT)
    result = running.wait()
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-2:] == ["stopped", "hint: the same command goes on where this one stood"]


def test_demonstrations_have_names(cli: Cli) -> None:
    assert "there is no demonstration 'flight'" in cli("demo", "flight").err
    assert "--pairs says nothing without flights" in cli("demo", "generate", "--pairs", 3).err


@pytest.mark.weights
@pytest.mark.slow
def test_the_demonstration(cli: Cli, tmp_path: Path) -> None:
    smollm2_folder()
    result = cli("demo", "generate", "--format", "json")
    assert result.code == 0, result.err
    receipt = Receipt.load(tmp_path / "runs" / "demo-generate" / "receipt.json")
    assert result.json() == receipt.to_dict()
    assert receipt.lines[0].ratio
    assert receipt.lines[0].ratio > 1.8
    assert (tmp_path / "runs" / "demo-generate" / "report.html").exists()
