"""Caches on disk: one safetensors file that is whole or absent, with a JSON header and a digest of each tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitalfew.core.errors import InputError, need
from vitalfew.core.files import atomic_write

__all__ = ["load_state", "read_tensors", "save_state", "tensor_digest", "text_digest", "write_tensors"]

VERSION = 1
_KEY = "vitalfew"
_PER_LAYER = ("length", "prompt_end", "counts", "filled", "caps", "codec", "dtype", "sizes")


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write what ``cache.state_dict()`` returned, so that a generation can go on in another process.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from vitalfew.generate import KeyTokens
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=4, eos_token_id=None)).eval()
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.safetensors"
    >>> with KeyTokens(model, 0.5, min_length=0) as few:
    ...     cache = few.cache(max_new_tokens=8)
    ...     _ = model(torch.arange(1, 21)[None], past_key_values=cache)
    ...     save_state(file, cache.state_dict())
    ...     again = few.cache()
    ...     again.load_state_dict(load_state(file))
    >>> again.length, again.nbytes == cache.nbytes
    (20, True)
    """
    header, tensors = flatten(state)
    write_tensors(path, "cache", header, tensors)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `save_state` wrote, for ``cache.load_state_dict``.

    Raises
    ------
    InputError
        If there is no such file, or it is torn, altered, or something else.
    """
    return unflatten(*read_tensors(path, "cache"))


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the plain values and the tensors of a cache's state."""
    layers: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(state["layers"]):
        layers.append({name: layer[name] for name in _PER_LAYER})
        tensors |= {f"{index}.{name}": t for name, t in layer.items() if isinstance(t, torch.Tensor)}
    windows = [window.get("seen") for window in state["windows"]]
    for index, window in enumerate(state["windows"]):
        tensors |= {f"window {index}.{name}": t for name, t in window.items() if isinstance(t, torch.Tensor)}
    return {"prompt": state["prompt"], "planned": state["planned"], "layers": layers, "windows": windows}, tensors


def unflatten(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the state of a cache from its plain values and tensors."""
    layers = [{"mass": None, **layer} for layer in header["layers"]]
    windows: list[dict[str, Any]] = [{} if seen is None else {"seen": seen} for seen in header["windows"]]
    for name, tensor in tensors.items():
        place, _, part = name.partition(".")
        which, _, index = place.rpartition(" ")
        (windows if which else layers)[int(index)][part] = tensor
    return {"prompt": header["prompt"], "planned": header["planned"], "layers": layers, "windows": windows}


def write_tensors(
    path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write tensors and plain values as one safetensors file, in one step."""
    need("safetensors")
    from safetensors.torch import save

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = {
        "schema": f"vitalfew/{kind}", "version": VERSION, **header,
        "tensors": {name: tensor_digest(tensor) for name, tensor in held.items()},
    }  # fmt: skip
    document["digest"] = text_digest(document)
    with atomic_write(path) as file:
        file.write(save(held, {_KEY: json.dumps(document, sort_keys=True, allow_nan=False)}))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the plain values and tensors of a file, once all of it is known to be as it was written."""
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"no such file: {path}", hint="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            document = None if text is None else json.loads(text)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is torn, or no safetensors file ({error})", hint="write it again") from None
    found = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != f"vitalfew/{kind}":
        raise InputError(f"{path} holds the schema {found!r}, not a vitalfew {kind}", hint=f"name a file of a {kind}")
    version = document.get("version")
    if version != VERSION:
        raise InputError(f"{path} has version {version!r}, this vitalfew reads {VERSION}", hint="write it again")
    if document.pop("digest", None) != text_digest(document):
        raise InputError(f"the header of {path} was altered after it was written", hint="write it again")
    for name in sorted(document["tensors"].keys() | tensors.keys()):
        if name not in tensors or document["tensors"].get(name) != tensor_digest(tensors[name]):
            raise InputError(f"the tensor {name} of {path} was altered after it was written", hint="write it again")
    return document, tensors


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return a SHA-256 over a tensor's type, shape and bytes."""
    held = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{held.dtype} {tuple(held.shape)} ".encode())
    sha.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def text_digest(document: Mapping[str, Any]) -> str:
    """Return a SHA-256 over plain values in canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
