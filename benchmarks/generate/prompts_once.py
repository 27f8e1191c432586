"""Arms that go on from one reading of a prompt, so that it need not be read again for each of them.

Which tokens stay is decided when the prompt ends. Until then a cache holds all of them, and the votes of the tokens
read so far if the policy lets all tokens vote; so all policies that hear the same votes can share the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vitalfew.generate import H2O, Keyformer, KeyTokens, Policy, Streaming

WINDOW = 64
"""Last tokens of a prompt that are read with its end: where not all tokens vote, none before these may."""


class Beginnings:
    """The first tokens of some prompts of one length, read once for each kind of votes.

    Parameters
    ----------
    model
        A causal language model of transformers.
    ids
        The prompts, ``(rows, tokens)``.
    cut
        How many of the tokens are the beginning.
    """

    def __init__(self, model: Any, ids: torch.Tensor, cut: int) -> None:
        self.model, self.ids, self.cut = model, ids, cut
        self._states: dict[str, dict[str, Any]] = {}

    @contextmanager
    def resumed(
        self, policy: Policy, share: float, prompt: int, later: int, question: int | None = None
    ) -> Iterator[Any]:
        """Enable the model for a policy, and give a cache that has read the beginning of a prompt of so many tokens."""
        every = policy.voters is None and question is None
        heard = Keyformer.dynamic() if every and policy.noise else H2O() if every else Streaming()
        state = self._state(heard)
        with KeyTokens(self.model, share, policy=policy, min_length=0, question=question) as few:
            cache = few.cache()
            cache.load_state_dict(state)
            cache.expect(prompt, later)
            yield cache

    def _state(self, policy: Policy) -> dict[str, Any]:
        name = type(policy).__name__
        if name not in self._states:
            with KeyTokens(self.model, 0.5, policy=policy, min_length=0) as few:
                cache = few.cache(self.cut + 1, 1)
                self.model(self.ids[:, : self.cut], past_key_values=cache, logits_to_keep=1)
                self._states[name] = cache.state_dict()
        return self._states[name]
