"""State with arrays in it, as a JSON document and named tensors, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitalfew.data.encoded import Encoded

__all__ = ["pack", "unpack"]

_MARK = "$"


def pack(state: Any, prefix: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Return plain values, and the tensors that were taken out of them.

    Parameters
    ----------
    state
        Dicts with string keys, lists, tuples, numbers, texts, tensors, arrays and batches.
    prefix
        Begins the tensors' names.

    Examples
    --------
    >>> plain, tensors = pack({"best": float("inf"), "seen": (1, torch.arange(2))})
    >>> plain, list(tensors)
    ({'best': {'$': 'inf'}, 'seen': {'$': 'tuple', 'items': [1, {'$': 'tensor', 'name': 'state.0'}]}}, ['state.0'])
    >>> unpack(plain, tensors)
    {'best': inf, 'seen': (1, tensor([0, 1]))}
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            name = f"{prefix}.{len(tensors)}"
            kind = "tensor" if isinstance(value, Tensor) else "array"
            # A copy: two names for one memory cannot be saved.
            tensors[name] = torch.as_tensor(value).clone()
            return {_MARK: kind, "name": name}
        if isinstance(value, Encoded):
            parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
            return {_MARK: "batch", "parts": walk(parts)}
        if isinstance(value, Mapping):
            return {key: walk(each) for key, each in value.items()}
        if isinstance(value, list):
            return [walk(each) for each in value]
        if isinstance(value, tuple):
            return {_MARK: "tuple", "items": [walk(each) for each in value]}
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return {_MARK: str(value)}
        return value

    return walk(state), tensors


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given."""
    if isinstance(plain, list):
        return [unpack(each, tensors) for each in plain]
    if not isinstance(plain, dict):
        return plain
    match plain.get(_MARK):
        case None:
            return {key: unpack(each, tensors) for key, each in plain.items()}
        case "tensor":
            return tensors[plain["name"]]
        case "array":
            return tensors[plain["name"]].numpy()
        case "batch":
            return Encoded(**unpack(plain["parts"], tensors))
        case "tuple":
            return tuple(unpack(each, tensors) for each in plain["items"])
        case number:
            return float(number)
