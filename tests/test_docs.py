"""Every block of README, documentation and docstrings is executed, and compared with what it shows.

`python` blocks of a page share their variables; ``# ->`` lines are what a block prints. `console` blocks run their
``$ vitalfew`` lines in a folder of the page. ``...`` stands for any text, alone on a line for any lines. `bash` blocks
are not run: the targets that their `make` lines name must exist.
"""

from __future__ import annotations

import contextlib
import difflib
import doctest
import importlib
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

import vitalfew

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
PAGES = [page for page in PAGES if "_build" not in page]
KNOWN = {"python", "console", "bash", "text", "markdown", "{eval-rst}", "{toctree}", "{include}"}
MODULES = [module.name for module in pkgutil.walk_packages(vitalfew.__path__, "vitalfew.")]
GUIDE = "docs/guide/train-on-your-own-log.md"


def matches(expected: str, found: str) -> bool:
    """Say whether a text is as shown; trailing blanks and the width of gaps do not count."""
    pattern = [re.sub(r"(\\\.){3}", ".*", re.escape(" ".join(line.split()))) for line in expected.strip().splitlines()]
    lines = "".join("(?:.*\n)*" if line == ".*" else f"{line}\n" for line in pattern)
    text = "".join(" ".join(line.split()) + "\n" for line in found.strip().splitlines())
    return re.fullmatch(lines, text) is not None


def compare(expected: str, found: str, where: str) -> None:
    if not matches(expected, found):
        both = expected.strip().splitlines(), found.strip().splitlines()
        pytest.fail(f"{where}\n" + "\n".join(difflib.unified_diff(*both, "shown", "found", lineterm="")))


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block with the output it shows."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE):
        if part.strip():
            command, _, output = part.partition("\n")
            yield command, output


def run_vitalfew(command: str, folder: Path) -> tuple[int, str]:
    """Run a command line as a user would and return its status with stdout and stderr."""
    words = shlex.split(command)
    assert words[0] == "vitalfew", f"a console block runs only vitalfew, got {command!r}"
    wanted = {"COLUMNS": "100", "NO_COLOR": "1", "OMP_WAIT_POLICY": "PASSIVE", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "vitalfew", *words[1:]],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | wanted,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def check_console(block: str, folder: Path, where: str) -> None:
    for command, shown in commands(block):
        status, found = run_vitalfew(command, folder)
        fails = re.search("^error: ", shown, re.MULTILINE) is not None
        if (status != 0) != fails:
            pytest.fail(f"{where}: `{command}` ended with {status}\n{found}")
        if shown.strip():
            compare(shown, found, f"{where}: `{command}`")


def check_bash(block: str, where: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"^make +([^#\s]+)", block, re.MULTILINE):
        assert target in targets, f"{where}: there is no target {target!r}"


def run_python(example: Example, where: str) -> None:
    """Execute a block and compare what it prints with its ``# ->`` lines."""
    source = example.parsed
    printed = io.StringIO()
    # The blank lines make the numbers in a traceback those of the page.
    code = compile("\n" * example.line + source, example.path, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, example.namespace)
    expected = re.findall(r"^ *# -> ?(.*)$", source, re.MULTILINE)
    compare("\n".join(expected), printed.getvalue(), where)


class Page:
    """One page's blocks, in order, in a folder of their own."""

    def __init__(self, name: str, folder: Path, *, demo: bool) -> None:
        self.name, self.folder, self.demo = name, folder, demo
        self.ran = 0

    def evaluate(self, example: Example, language: str) -> None:
        where = f"{self.name}:{example.line}"
        is_demo = "$ vitalfew demo" in example.parsed
        if language == "python" and not self.demo:
            run_python(example, where)
        elif language == "console" and is_demo == self.demo:
            check_console(example.parsed, self.folder, where)
        elif language == "bash":
            check_bash(example.parsed, where)
        else:
            return
        self.ran += 1

    def run(self) -> int:
        parsers = [
            CodeBlockParser(language, lambda example, language=language: self.evaluate(example, language))
            for language in ("python", "console", "bash")
        ]
        document = Document.parse(str(ROOT / self.name), *parsers, encoding="utf-8")
        for example in document.examples():
            example.evaluate()
        return self.ran


def blocks(page: str) -> list[str]:
    return re.findall(r"^```(\S+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that the blocks run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of(page: str, folder: Path) -> None:
    if page == "README.md":  # it works on the log that the guide writes
        first = re.search(
            r"^```python\n(.*?)^```", (ROOT / GUIDE).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        assert first
        exec(first[1], {})
    assert not set(blocks(page)) - KNOWN
    ran = Page(page, folder, demo=False).run()
    wanted = sum(language in ("python", "console", "bash") for language in blocks(page))
    demos = len(re.findall(r"^\$ vitalfew demo", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert ran == wanted - demos


@pytest.mark.slow
def test_the_demonstration(folder: Path) -> None:
    assert Page("docs/index.md", folder, demo=True).run() == 1
    assert {file.name for file in (folder / "runs" / "demo").iterdir()} >= {"receipt.json", "report.html"}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_docstrings_of(module: str, folder: Path) -> None:
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(importlib.import_module(module)):
        runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.name)
def test_example_runs(example: Path, folder: Path) -> None:
    done = subprocess.run([sys.executable, example], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_of_the_pages_are_those_of_the_results() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import figures as f; print([p.name for p in f.PLACES if f.updated(t := p.read_text()) != t])",
        ],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", f"run python docs/figures.py: {done.stdout}{done.stderr}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                base = ROOT / "docs" if page == "docs/contributing.md" else (ROOT / page).parent
                target = base / link
                assert target.exists() or link in ("contributing.md", "changelog.md"), f"{page}: {link}"


def test_cards_of_the_methods_are_there() -> None:
    from vitalfew.cli._methods import METHODS

    for method in METHODS:
        text = (ROOT / method["card"]).read_text(encoding="utf-8")
        for part in ("What it does", "Use it when", "Leave it when", "Settings that matter", "What we measured"):
            assert f"## {part}" in text, f"{method['card']} lacks {part!r}"


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("a\nb", "a\nc", False),
        ("a ... z", "a to z", True),
        ("...\nz", "z", True),
        ("a\n...\nz", "a\nb\nc\nz", True),
        ("a\n...", "b", False),
        ("1.5", "1x5", False),
        ("a  b", "a b", True),
    ],
)
def test_what_matches(expected: str, found: str, same: bool) -> None:
    assert matches(expected, found) is same
