from __future__ import annotations

import pickle
import sys
import tomllib
from pathlib import Path

import pytest

import vitalfew
from vitalfew.core import InputError, MissingExtra, VitalfewError, errors, need

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
PACKAGE_OF = {"pynvml": "nvidia-ml-py"}


def test_need_gives_the_module():
    assert need("json") is sys.modules["json"]
    assert need("os.path") is sys.modules["os.path"]


@pytest.mark.parametrize("module", sorted(errors._EXTRA_OF))
def test_need_names_an_extra_that_brings_the_library(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(MissingExtra) as caught:
        need(module)
    extra = errors._EXTRA_OF[module]
    assert module in caught.value.message
    assert caught.value.hint == f'install it with: pip install "vitalfew[{extra}]"'
    wanted = PACKAGE_OF.get(module, module)
    assert any(line.startswith(wanted) for line in PROJECT["optional-dependencies"][extra])


def test_need_of_a_part_of_an_absent_library(refuses):
    with refuses("absent_library.part", MissingExtra):
        need("absent_library.part")


def test_a_library_that_is_there_but_broken_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import absent_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_library"):
        need("broken_library")


@pytest.mark.parametrize(("kind", "builtin"), [(InputError, ValueError), (MissingExtra, ImportError)])
def test_an_error_is_ours_and_pythons_and_survives_pickling(kind, builtin):
    error = kind("got 3", hint="pass 2")
    assert isinstance(error, VitalfewError)
    assert isinstance(error, builtin)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.hint, str(again)) == (kind, "got 3", "pass 2", "got 3; pass 2")


def test_an_error_without_a_hint_is_its_message():
    assert str(VitalfewError("got 3")) == "got 3"


def test_every_public_name_is_there():
    for name in vitalfew.core.__all__:
        assert getattr(vitalfew.core, name)
    assert len(set(vitalfew.core.__all__)) == len(vitalfew.core.__all__)
