"""Which methods act in a training run, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitalfew.core import InputError

__all__ = ["METHODS", "Way", "way_named"]


@dataclass(frozen=True, slots=True)
class Way:
    """Which methods act in a training run.

    Attributes
    ----------
    fused
        False: plain PyTorch tables, and nothing of ours.
    hot
        Batches are all hot or not at all: `HotRows`.
    split
        The popular part of each batch first: `SplitBatches`, for rows over tiers.
    skip
        What goes without training once it is stale, ``"rows"`` or ``"inputs"``: `SkipStale`.

    Examples
    --------
    >>> way_named("hot-rows+skip-rows").name
    'hot-rows+skip-rows'
    """

    fused: bool = True
    hot: bool = False
    split: bool = False
    skip: Literal["", "rows", "inputs"] = ""

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of what acts."""
        return tuple(name for name, (attribute, value) in METHODS.items() if getattr(self, attribute) == value)

    @property
    def update(self) -> Literal["backward", "step"]:
        """When rows have to change: parts of a batch are summed up first."""
        return "step" if self.split else "backward"

    @property
    def reorders(self) -> bool:
        """Whether batches are of other samples than those of plain shuffling."""
        return self.hot or self.skip == "inputs"

    @property
    def acts(self) -> bool:
        """Whether any method does."""
        return bool(self.methods)

    @property
    def name(self) -> str:
        """The methods joined by ``+``; ``fused`` where none acts on the batches."""
        return "+".join(self.methods) if self.methods else "fused" if self.fused else "plain"


METHODS: dict[str, tuple[str, object]] = {
    "hot-rows": ("hot", True),
    "split-batches": ("split", True),
    "skip-rows": ("skip", "rows"),
    "skip-inputs": ("skip", "inputs"),
}
"""What can act on the batches, and the field of `Way` that says so."""


def way_named(name: str) -> Way:
    """Return the way of a name such as ``fused``, ``plain``, ``skip-rows`` or ``hot-rows+skip-inputs``.

    Raises
    ------
    InputError
        For an unknown name, or methods that exclude each other.
    """
    if name in ("fused", "plain"):
        return Way(fused=name == "fused")
    chosen: dict[str, object] = {}
    for part in name.split("+"):
        if part not in METHODS:
            known = ", ".join(["fused", "plain", *METHODS])
            raise InputError(f"there is no method {part!r}", hint=f"choose from {known}; join several by +")
        attribute, value = METHODS[part]
        if attribute in chosen:
            raise InputError(f"{name} names two methods of one kind", hint="choose one of them")
        chosen[attribute] = value
    return Way(**chosen)  # type: ignore[arg-type]
