"""What evicting can save at most: bytes of the cache, and the speed of a step that waits for memory alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitalfew.core.errors import InputError
from vitalfew.core.receipt import Declined, Prediction

if TYPE_CHECKING:
    import torch

__all__ = ["WORTHWHILE", "Ceiling", "KVShape", "decode_ceiling", "foretell", "weight_bytes"]

WORTHWHILE = 1.1
"""A lower ceiling is no speed to gain: what deciding costs takes the rest."""


def decode_ceiling(weight_bytes: float, batch: int, length: float, slots: float, bytes_per_token: float) -> float:
    """Return how many times faster a step can be than with a static full cache, by the bytes that it reads.

    Parameters
    ----------
    weight_bytes
        Weights read per step, once for all rows.
    batch, length
        Rows, and tokens of each.
    slots
        Tokens kept of each.
    bytes_per_token
        Keys and values of one token in all layers.

    Examples
    --------
    >>> round(decode_ceiling(0.54e9, 4, 4096, 2048, 46_080), 2)
    1.41
    """
    if min(weight_bytes, bytes_per_token) < 0 or min(batch, length, slots) <= 0:
        raise InputError(
            f"{batch} rows of {length} tokens with {slots} slots have no bytes to compare", hint="pass positive numbers"
        )
    full, kept = batch * length * bytes_per_token, batch * min(slots, length) * bytes_per_token
    return (weight_bytes + full) / (weight_bytes + kept)


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model's cache holds per token, counted from its configuration.

    Attributes
    ----------
    layers, window_layers
        Layers that attend to everything, and those that attend to a window; only the former evict.
    heads, head_dim
        Key-value heads, and the channels of a key (a value has as many).
    element_size
        Bytes per channel.
    window
        Tokens of the window.
    """

    layers: int
    heads: int
    head_dim: int
    element_size: int
    window_layers: int = 0
    window: int = 0

    @classmethod
    def of(cls, config: Any, element_size: int) -> KVShape:
        """Count from a configuration of transformers.

        Raises
        ------
        InputError
            If the model's layers hold something else than keys and values of every token or of a window.

        Examples
        --------
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=30, num_attention_heads=16, hidden_size=1024)
        >>> KVShape.of(config, 2).bytes_per_token
        122880
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise InputError(
                f"{config.model_type} holds latent vectors, not keys and values", hint="this works on plain attention"
            )
        num_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or num_heads
        if getattr(config, "model_type", "") == "falcon":  # it repeats grouped keys before they enter the cache
            heads = 1 if config.multi_query and not config.new_decoder_architecture else num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        window = getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
        strange = set(kinds) - {"full_attention", "sliding_attention"}
        if strange:
            raise InputError(
                f"layers of the kind {', '.join(sorted(strange))} hold no keys and values per token",
                hint="this counts full and sliding attention",
            )
        full = list(kinds).count("full_attention")
        return cls(full, heads, head_dim, element_size, len(kinds) - full, window if len(kinds) > full else 0)

    @property
    def _per_layer(self) -> int:
        return 2 * self.heads * self.head_dim * self.element_size

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in the layers that evict."""
        return self.layers * self._per_layer

    def full_bytes(self, batch: int, length: int) -> int:
        """Return the bytes of a cache that evicts nothing; a window holds one token less than it attends to."""
        windows = self.window_layers * min(length, max(self.window - 1, 0)) * self._per_layer
        return batch * (length * self.bytes_per_token + windows)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The bytes that a step reads with all tokens and with those kept.

    Attributes
    ----------
    weights
        Bytes of weights, and of windows that evict nothing.
    full, kept
        Bytes of keys and values of all tokens, and of those kept.
    """

    weights: int
    full: int
    kept: int

    @property
    def ratio(self) -> float:
        """How many times faster than with a static full cache a step can be; modelled from the bytes."""
        return (self.weights + self.full) / (self.weights + self.kept)

    @property
    def weights_share(self) -> float:
        """The weights' share of the bytes of a step at full cache."""
        return self.weights / (self.weights + self.full)

    @property
    def declined(self) -> Declined | None:
        """Why there is no speed to gain; None where there is. The memory is saved either way."""
        if self.ratio >= WORTHWHILE:
            return None
        return Declined(
            "fewer keys and values for speed",
            f"no speed to gain: weights are {self.weights_share:.0%} of the bytes of a step, so that it can be at most "
            f"{self.ratio:.2f}x as fast; keys and values shrink from {self.full:,} to {self.kept:,} bytes",
        )

    def against(self, measured: float) -> Prediction:
        """Return the ceiling beside a measured ratio of step times, a static full cache's to ours."""
        basis = f"bytes read: {self.weights:,} of weights, {self.full:,} and {self.kept:,} of keys and values"
        return Prediction("speed of a step, at most", "x", self.ratio, measured, basis)


def foretell(shape: KVShape, weight_bytes: int, batch: int, length: int, slots: int) -> Ceiling:
    """Return what a step can gain, before anything runs.

    Parameters
    ----------
    shape
        What the cache holds per token.
    weight_bytes
        Of the model, as `weight_bytes` counts them.
    batch, length, slots
        Rows, tokens of each, and tokens kept of each.

    Examples
    --------
    >>> shape = KVShape(layers=30, heads=3, head_dim=64, element_size=4)
    >>> print(foretell(shape, 538_000_000, 1, 2048, 1024).declined.reason[:53])
    no speed to gain: weights are 85% of the bytes of a s
    >>> foretell(shape, 538_000_000, 4, 4096, 819).declined is None
    True
    """
    if min(batch, length, slots) < 1 or weight_bytes < 0:
        raise InputError(
            f"{batch} rows of {length} tokens with {slots} slots have no bytes to compare", hint="pass positive numbers"
        )
    full = batch * length * shape.bytes_per_token
    windows = shape.full_bytes(batch, length) - full
    return Ceiling(weight_bytes + windows, full, batch * min(slots, length) * shape.bytes_per_token)


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights that a step reads: all but tables of which it takes single rows.

    An embedding that is also the output layer is read in full. Of a mixture of experts all count, so that the ceiling
    is too low for small batches.

    Examples
    --------
    >>> import torch
    >>> weight_bytes(torch.nn.Sequential(torch.nn.Embedding(1000, 4), torch.nn.Linear(4, 2, bias=False)))
    32
    """
    from torch import nn

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
