"""Take samples out of a user's batches, and join what is left into full ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.data.encoded import Encoded

__all__ = ["join_batches", "take_samples"]

Ints = NDArray[np.int64]


def take_samples(batch: Any, samples: Ints, num_samples: int) -> Any:
    """Return a batch of the same type with some of its samples, in the order named.

    Parameters
    ----------
    batch
        An `Encoded`, or tensors and arrays with a line per sample in a dict, dataclass, tuple or list. Keys ``ids``
        and ``offsets`` together are bags, and `weights` beside them has one for each id.
    samples
        Their positions.
    num_samples
        Samples in the batch.

    Examples
    --------
    >>> import torch
    >>> take_samples({"ids": torch.tensor([[1], [2], [3]]), "label": torch.arange(3.0)}, np.array([0, 2]), 3)["label"]
    tensor([0., 2.])
    """
    if isinstance(batch, Encoded):
        return batch.take(samples)
    parts, rebuild = _parts(batch)
    taken = {}
    if _jagged(parts):
        count = len(parts["ids"])
        bags = Encoded(np.empty((num_samples, 0), np.float32), np.arange(count), _array(parts["offsets"]))
        some = bags.take(samples)
        assert some.offsets is not None
        taken["offsets"] = _like(parts["offsets"], some.offsets)
        for name in ("ids", "weights"):
            if (value := parts.get(name)) is None:
                continue
            if len(value) != count:
                raise InputError(
                    f"`{name}` beside bags of {count} ids has shape {_shape(value)}",
                    hint="one for each id, or pass take= and join=",
                )
            taken[name] = value[torch.from_numpy(some.ids).to(value.device) if isinstance(value, Tensor) else some.ids]
    for name, value in parts.items():
        if name in taken:
            continue
        if value is None:
            taken[name] = None
        elif isinstance(value, Tensor | np.ndarray) and value.ndim and len(value) == num_samples:
            taken[name] = value[torch.from_numpy(samples).to(value.device) if isinstance(value, Tensor) else samples]
        elif _is_container(value):
            taken[name] = take_samples(value, samples, num_samples)
        else:
            raise InputError(
                f"`{name}` of a batch has no line for each of its {num_samples} samples: {_shape(value)}",
                hint="pass take= and join= to say how samples are taken out of your batches",
            )
    return rebuild(taken)


def join_batches(batches: Sequence[Any]) -> Any:
    """Return the samples of several batches of one type, one after the other, as one batch.

    Examples
    --------
    >>> import torch
    >>> one = {"ids": torch.tensor([4, 5]), "offsets": torch.tensor([0, 2])}
    >>> join_batches([one, one])["offsets"]
    tensor([0, 2, 4])
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Encoded):
        return Encoded.concat(batches)
    every = [_parts(batch)[0] for batch in batches]
    joined: dict[str, Any] = {}
    for name, value in every[0].items():
        values = [parts[name] for parts in every]
        if value is None:
            joined[name] = None
        elif _is_container(value):
            joined[name] = join_batches(values)
        elif name == "offsets" and _jagged(every[0]):
            sizes = np.concatenate([np.diff(_array(v)) for v in values])
            joined[name] = _like(value, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        elif isinstance(value, Tensor):
            joined[name] = torch.cat(values)
        else:
            joined[name] = np.concatenate(values)
    return _parts(first)[1](joined)


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | tuple | list | Encoded) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )


def _parts(batch: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Return what a batch consists of by name, and what makes a batch of such parts again."""
    if isinstance(batch, Mapping):
        return dict(batch), dict
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True)), lambda parts: type(batch)(**parts)
    if isinstance(batch, tuple | list):
        return {str(k): v for k, v in enumerate(batch)}, lambda parts: type(batch)(parts.values())
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return fields, lambda parts: dataclasses.replace(batch, **parts)
    if isinstance(batch, Tensor | np.ndarray):
        return {"ids": batch}, lambda parts: parts["ids"]
    raise InputError(
        f"samples cannot be taken out of a {type(batch).__name__}",
        hint="pass take= and join= to say how samples are taken out of your batches",
    )


def _jagged(parts: Mapping[str, Any]) -> bool:
    return parts.get("ids") is not None and parts.get("offsets") is not None


def _array(value: Any) -> Ints:
    return np.ascontiguousarray(value.cpu().numpy() if isinstance(value, Tensor) else value, np.int64)


def _like(value: Any, array: Ints) -> Any:
    return torch.from_numpy(array).to(value) if isinstance(value, Tensor) else array.astype(value.dtype)


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
