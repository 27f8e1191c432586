"""Keyformer and H2O in a model, told by hand: from the layers' inputs, in plain loops, to the tokens that stay.

Nothing of the engine is used but the draws of the noise, which are addressed: own rotary positions, own attention in
float64, own sums, own choice. The layers' inputs are those of the evicting run itself.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vitalfew.generate import H2O, Keyformer, KeyTokens
from vitalfew.generate.noise import Noise, gumbel

from .families import make

SEED, SHARE = 11, 0.5


def rotated(x: torch.Tensor, pos: int, theta: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    angle = pos * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


class Head:
    """One KV head of one row: what it has seen, the sums of its votes, and the positions that it holds."""

    def __init__(self, policy: Any, layer: int, head: int, group: int, all_heads: int) -> None:
        self.policy, self.layer, self.head, self.group, self.all_heads = policy, layer, head, group, all_heads
        self.key: dict[int, torch.Tensor] = {}
        self.sums: dict[int, float] = {}
        self.slots: int | None = None
        self.fixed: set[int] = set()

    def vote(self, query: torch.Tensor, pos: int, tau: float) -> None:
        """Add what the group's queries (G, d) at a position give to each held key up to it, by the mean."""
        held = [p for p in self.sums if p <= pos]
        for g in range(self.group):
            x = torch.stack([query[g] @ self.key[p] for p in held]) / math.sqrt(query.shape[-1])
            if self.policy.noise:
                where = torch.tensor(held).expand(1, self.all_heads // self.group, -1)
                z = gumbel(Noise(SEED, self.layer), self.all_heads, torch.tensor([[pos]]), where)
                x = x + z[0, self.head * self.group + g, 0].double()
            for p, weight in zip(held, ((x / tau) - (x / tau).logsumexp(0)).exp().tolist(), strict=True):
                self.sums[p] += weight / self.group

    def choose(self, count: int) -> None:
        """Keep half of so many tokens: the latest, and the best of the rest."""
        self.slots = int(count * SHARE)
        window = self.policy.recent_of(self.slots)
        latest = [p for p in self.sums if p >= count - window]
        rest = sorted((p for p in self.sums if p < count - window), key=lambda p: (-self.sums[p], p))
        best = rest[: self.slots - window]
        self.sums = {p: self.sums[p] for p in (*best, *latest)}
        self.fixed = set(best) if getattr(self.policy, "fixed", False) else set()

    def make_room(self, pos: int) -> None:
        """Let one go for the token at this position, which is the newest of the window."""
        if self.slots is None or len(self.sums) < self.slots:
            return
        window = self.policy.recent_of(self.slots)
        free = [p for p in self.sums if p < pos + 1 - window and p not in self.fixed]
        del self.sums[min(free, key=lambda p: (self.sums[p], p))]


def tau(policy: Any, step: int, planned: int) -> float:
    if isinstance(policy, H2O):
        return 1.0
    return float(policy.tau_init + min(step / planned, 1.0) * (policy.tau_end - policy.tau_init))


POLICIES = [
    Keyformer.dynamic(), Keyformer.dynamic(recent=4, tau_init=0.7, tau_end=3.0), Keyformer(), Keyformer.frozen(), H2O(),
]  # fmt: skip


@pytest.mark.parametrize("least", [0, 30])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_stays_is_what_the_method_says(policy: Any, least: int) -> None:
    """Rows of 36, 29 and 22 tokens: with a least length of 30, two are chosen from when they reach it."""
    model, prompt, planned, steps = make("llama"), 36, 8, 14
    config, padding = model.config, [0, 7, 14]
    theta = float(config.rope_parameters["rope_theta"])
    size, group = config.hidden_size // config.num_attention_heads, config.num_attention_heads // 2
    ids = torch.randint(2, 64, (3, prompt + steps), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(prompt + steps) >= torch.tensor(padding)[:, None]).long()
    inputs: dict[int, torch.Tensor] = {}
    for k, each in enumerate(model.model.layers):
        each.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, k=k: inputs.__setitem__(k, kwargs["hidden_states"].double()), with_kwargs=True
        )
    heads = {
        (layer, row, h): Head(policy, layer, h, group, config.num_attention_heads)
        for layer in range(config.num_hidden_layers) for row in range(3) for h in range(2)
    }  # fmt: skip

    def projected(layer: int, row: int, column: int, pos: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries (Hq, d) and the keys (H, d) of a token."""
        x, attention = inputs[layer][row, column], model.model.layers[layer].self_attn
        q, k = ((each.weight.double() @ x).view(-1, size) for each in (attention.q_proj, attention.k_proj))
        return rotated(q, pos, theta), rotated(k, pos, theta)

    few = KeyTokens(model, SHARE, policy=policy, min_length=least, seed=SEED)
    cache = few.cache(prompt=prompt, max_new_tokens=planned)
    with few, torch.no_grad():
        for end in range(prompt, prompt + steps + 1):
            start = 0 if end == prompt else end - 1
            at = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
            model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=at, past_key_values=cache)
            for (layer, row, h), head in heads.items():
                first = max(padding[row], start)
                for column in range(first, end):
                    pos = column - padding[row]
                    queries, keys = projected(layer, row, column - start, pos)
                    if start:
                        head.make_room(pos)
                    head.key[pos], head.sums[pos] = keys[h], 0.0
                    if not start or not getattr(policy, "fixed", False):
                        mine = queries[h * group : (h + 1) * group]
                        head.vote(mine, pos, tau(policy, end - prompt, planned))
                count = end - padding[row]
                if head.slots is None and count >= least:
                    head.choose(count)
                slots = cache.slot_layers[layer].evicting.slots
                assert {p for p in slots.pos[row, h].tolist() if p >= 0} == set(head.sums), (end, layer, row, h)
                for slot, p in enumerate(slots.pos[row, h].tolist()):
                    if p in head.sums and p not in head.fixed and math.isfinite(slots.score[row, h, slot]):
                        assert float(slots.score[row, h, slot]) == pytest.approx(head.sums[p], abs=2e-5)
    assert all(len(head.sums) == head.slots for head in heads.values())
