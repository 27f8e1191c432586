"""Weights and optimizer state on disk: safetensors and a JSON document in a folder that is whole or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitalfew.core import InputError
from vitalfew.core.files import atomic_folder, read_document, write_document
from vitalfew.embeddings.models import ClickModel
from vitalfew.embeddings.packing import pack, unpack
from vitalfew.embeddings.tables import EmbeddingBags

__all__ = ["about_weights", "load_newest", "load_weights", "save_checkpoint", "save_model"]

_VERSION = 1
_TENSORS = "weights.safetensors"
_EXTRA = "tables._extra_state"

Tensors = dict[str, torch.Tensor]


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(folder: Path, tensors: Tensors, body: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = folder / _TENSORS
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{file.parent.parent} cannot take the weights: {error}") from error
    write_document(folder / "weights.json", "weights", _VERSION, {**body, "sha256": _digest(file)})


def _read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    body, file = read_document(folder / "weights.json", "weights", _VERSION), folder / _TENSORS
    try:
        if _digest(file) != body["sha256"]:
            raise InputError(f"`{file}` is damaged: it is not what was written", hint="restore it, or train again")
        return load_file(file), body
    except (OSError, SafetensorError) as error:
        raise InputError(f"`{file}` cannot be read ({error})", hint="restore it, or train again") from None


def _bags(model: ClickModel) -> EmbeddingBags:
    assert isinstance(model.tables, EmbeddingBags)
    return model.tables


def _tensors(model: ClickModel, *, with_state: bool) -> Tensors:
    left_out = {_EXTRA} | (set() if with_state else {f"tables.{name}" for name in _bags(model).rows.state})
    return {name: value for name, value in model.state_dict().items() if name not in left_out}


def save_model(folder: str | os.PathLike[str], model: ClickModel, about: Mapping[str, Any] | None = None) -> None:
    """Save the weights alone, for predictions, with plain values about them; the folder must not exist."""
    with atomic_folder(folder) as part:
        _write(part, _tensors(model, with_state=False), {"about": dict(about or {})})


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: ClickModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    about: Mapping[str, Any],
    course: Mapping[str, Any] | None = None,
) -> None:
    """Save everything a run needs to go on, as ``checkpoint-<step>``, and keep the one before it.

    Parameters
    ----------
    course
        Where the run stands, such as `Course.state_dict` tells.
    """
    tensors = _tensors(model, with_state=True)
    if course is not None:
        plain, arrays = pack(course, "course")
        about, tensors = {**about, "course": plain}, tensors | arrays
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    # Dropped before the new one is written: the disk never holds more than two.
    for older in _checkpoints(Path(folder))[:-1]:
        shutil.rmtree(older)
    with atomic_folder(Path(folder) / f"checkpoint-{step:09d}") as part:
        _write(part, tensors, {"extra": _bags(model).get_extra_state(), "about": dict(about)})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def load_newest(
    folder: Path, model: ClickModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Fill model and optimizer from the newest checkpoint that is whole; damaged ones are named and removed.

    Returns
    -------
    dict or None
        What was saved about it; None where there is no checkpoint.
    tuple
        The damaged ones.
    """
    damaged: list[Path] = []
    first: InputError | None = None
    for found in reversed(_checkpoints(folder)):
        try:
            about = load_weights(found, model, optimizer)
        except InputError as error:
            first = first or error
            damaged.append(found)
            continue
        for each in damaged:
            shutil.rmtree(each)
        return about, tuple(each.name for each in damaged)
    if first:
        raise InputError(first.message, hint=f"to train from the first step again, remove {folder}/checkpoint-*")
    return None, ()


def about_weights(folder: Path) -> dict[str, Any]:
    """Return what was saved about the weights, without reading them."""
    about: dict[str, Any] = read_document(folder / "weights.json", "weights", _VERSION)["about"]
    return about


def load_weights(folder: Path, model: ClickModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill the model (and the dense optimizer) from a folder that `save_model` or `save_checkpoint` wrote.

    Returns
    -------
    dict
        What was saved about it.
    """
    tensors, body = _read(folder)
    names = set(_tensors(model, with_state=optimizer is not None))
    if missing := names - set(tensors):
        raise InputError(f"`{folder}` lacks the weights {min(missing)!r}", hint="it was made for another model")
    state: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name in names}
    if optimizer is not None:
        state[_EXTRA] = body["extra"]
    try:
        model.load_state_dict(state, strict=optimizer is not None)
    except RuntimeError as error:
        raise InputError(f"`{folder}` does not fit the model: {error}", hint="use the settings of that run") from None
    if optimizer is not None:
        saved: dict[int, Tensors] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                saved.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    about: dict[str, Any] = body["about"]
    if "course" in about:
        about["course"] = unpack(about["course"], tensors)
    return about
