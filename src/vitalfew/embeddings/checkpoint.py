"""Weights and optimizer state on disk: safetensors and a JSON document in a folder that is whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from vitalfew.core import InputError
from vitalfew.core.files import atomic_folder, read_document, write_document
from vitalfew.embeddings.models import DLRM

__all__ = ["load_weights", "newest_checkpoint", "save_checkpoint", "save_model"]

_VERSION = 1
_EXTRA = "tables._extra_state"


def _write(folder: Path, tensors: dict[str, torch.Tensor], body: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "weights.safetensors")
    write_document(folder / "weights.json", "weights", _VERSION, body)


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    body = read_document(folder / "weights.json", "weights", _VERSION)
    try:
        return load_file(folder / "weights.safetensors"), body
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"`{folder / 'weights.safetensors'}` is damaged ({error})", hint="restore or retrain"
        ) from None


def _model_tensors(model: DLRM, *, with_state: bool) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in model.state_dict().items() if name != _EXTRA}
    if not with_state:
        state = {name: value for name, value in state.items() if not name.startswith(("tables.wide", "tables.narrow"))}
    return state


def save_model(folder: str | os.PathLike[str], model: DLRM) -> None:
    """Save the weights alone, for predictions; the folder must not exist."""
    with atomic_folder(folder) as part:
        _write(part, _model_tensors(model, with_state=False), {"extra": model.tables.get_extra_state()})  # type: ignore[attr-defined]


def save_checkpoint(
    folder: str | os.PathLike[str], model: DLRM, optimizer: torch.optim.Optimizer, step: int, progress: dict[str, Any]
) -> None:
    """Save everything a run needs to go on, as ``checkpoint-<step>``, then drop the older ones."""
    tensors = _model_tensors(model, with_state=True)
    state = optimizer.state_dict()["state"]
    tensors |= {
        f"optimizer.{index}.{key}": torch.as_tensor(value) for index, of in state.items() for key, value in of.items()
    }
    target = Path(folder) / f"checkpoint-{step:09d}"
    if target.exists():
        return
    with atomic_folder(target) as part:
        _write(part, tensors, {"extra": model.tables.get_extra_state(), "progress": progress})  # type: ignore[attr-defined]
    for older in _checkpoints(Path(folder))[:-1]:
        shutil.rmtree(older)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest whole checkpoint; drop what a killed run left unfinished."""
    for part in Path(folder).glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def load_weights(folder: Path, model: DLRM, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill the model (and the dense optimizer) from a folder that `save_model` or `save_checkpoint` wrote.

    Returns
    -------
    dict
        What was passed as `progress`; empty for a model.
    """
    tensors, body = _read(folder)
    names = set(_model_tensors(model, with_state=optimizer is not None))
    if missing := names - set(tensors):
        raise InputError(f"`{folder}` lacks the weights {min(missing)!r}", hint="it was made for another model")
    state = {name: tensor for name, tensor in tensors.items() if name in names}
    try:
        model.load_state_dict({**state, _EXTRA: body["extra"]}, strict=optimizer is not None)
    except RuntimeError as error:
        raise InputError(f"`{folder}` does not fit the model: {error}", hint="use the settings of that run") from None
    if optimizer is not None:
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                saved.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    progress: dict[str, Any] = body.get("progress", {})
    return progress
