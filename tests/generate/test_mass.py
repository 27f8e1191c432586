"""Retained attention mass: equal to an eager n x n computation, in blocks, and the bound that follows from it."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.generate import mass as module
from vitalfew.generate.mass import (
    attention_mass,
    coverage_curve,
    kept_mask,
    layer_mass,
    output_bound,
    slots_for_mass,
)
from vitalfew.generate.scores import Logits

B, H, G, N, M, D = 2, 2, 3, 11, 17, 8


def eager(query, keys, form: Logits, key_pos, query_pos):  # type: ignore[no-untyped-def]
    """Return all weights ``(B, Hq, n, m)`` in float64, head by head and query by query."""
    weights = torch.zeros(B, H * G, query.shape[2], keys.shape[2], dtype=torch.float64)
    for b in range(B):
        for head in range(H * G):
            for i, at in enumerate(query_pos[b].tolist()):
                x = torch.full((keys.shape[2],), -math.inf, dtype=torch.float64)
                for j, near in enumerate(key_pos[b, head // G].tolist()):
                    if not 0 <= near <= at:
                        continue
                    x[j] = form.scale * float(query[b, head, i].double() @ keys[b, head // G, j].double())
                    if form.softcap is not None:
                        x[j] = form.softcap * math.tanh(x[j] / form.softcap)
                    if form.slopes is not None:
                        x[j] += float(form.slopes[head]) * (near - at)
                if at >= 0:
                    total = x.exp().sum() + (0 if form.sinks is None else form.sinks[head].double().exp())
                    weights[b, head, i] = x.exp() / total
    return weights


def case(seed: int, padded: int):  # type: ignore[no-untyped-def]
    dice = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H * G, N, D, generator=dice)
    keys = 2 * torch.randn(B, H, M, D, generator=dice)
    values = torch.randn(B, H, M, D, generator=dice)
    pad = torch.tensor([0, padded])
    at = torch.arange(M)[None] - pad[:, None]
    at = torch.where(at >= 0, at, -1)
    kept = torch.rand(B, H, M, generator=dice) < 0.5
    return query, keys, values, kept, at[:, None].expand(B, H, M), at[:, M - N :]


FORMS = {
    "plain": Logits(0.35),
    "softcap": Logits(0.35, softcap=1.5),
    "alibi": Logits(0.35, slopes=torch.linspace(0.05, 0.5, H * G)),
    "sinks": Logits(0.35, sinks=torch.linspace(-1, 2, H * G)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("padded", [0, 5, 9])
@pytest.mark.parametrize("elements", [1, 1 << 22])
def test_mass_equals_eager(form: Logits, padded: int, elements: int) -> None:
    query, keys, _, kept, key_pos, query_pos = case(padded, padded)
    weights = eager(query, keys, form, key_pos, query_pos)
    dropped = (weights * ~kept.repeat_interleave(G, 1)[:, :, None]).sum(-1)
    expected = 1 - dropped.sum(2) / (query_pos >= 0).sum(1)[:, None]
    with mock.patch.object(module, "_ELEMENTS", elements):  # a block of one query, and one of all
        found = attention_mass(query, keys, kept, form, key_pos=key_pos, query_pos=query_pos)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_all_kept_is_one_and_none_is_zero() -> None:
    query, keys, _, _, key_pos, query_pos = case(0, 5)
    for kept, share in ((torch.ones(B, H, M), 1.0), (torch.zeros(B, H, M), 0.0)):
        found = attention_mass(query, keys, kept.bool(), FORMS["plain"], key_pos=key_pos, query_pos=query_pos)
        torch.testing.assert_close(found, torch.full((B, H * G), share), rtol=0, atol=1e-5)


def test_a_row_has_the_mass_it_has_alone() -> None:
    query, keys, _, kept, key_pos, query_pos = case(1, 5)
    both = attention_mass(query, keys, kept, FORMS["alibi"], key_pos=key_pos, query_pos=query_pos)
    alone = attention_mass(
        query[1:, :, :], keys[1:, :, 5:], kept[1:, :, 5:], FORMS["alibi"], key_pos=key_pos[1:, :, 5:],
        query_pos=query_pos[1:],
    )  # fmt: skip
    torch.testing.assert_close(both[1:], alone)


def test_never_queries_times_keys() -> None:
    n = 1024
    query, at = torch.zeros(1, 1, n, 4), torch.arange(n)
    largest = []
    original = torch.logsumexp
    with (
        mock.patch.object(module, "_ELEMENTS", 1 << 14),
        mock.patch.object(torch, "logsumexp", lambda x, *a, **k: (largest.append(x.numel()), original(x, *a, **k))[1]),
    ):
        kept = torch.arange(n).view(1, 1, n) % 2 == 0
        attention_mass(query, query, kept, Logits(1.0), key_pos=at.view(1, 1, n), query_pos=at[None])
    assert max(largest) <= 1 << 14
    assert len(largest) == 64


@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1), sharp=st.floats(0, 4))
def test_the_bound_is_never_exceeded(seed: int, share: float, sharp: float) -> None:
    dice = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(20, generator=dice, dtype=torch.float64)
    values = torch.randn(20, 5, generator=dice, dtype=torch.float64)
    kept = torch.rand(20, generator=dice) < share
    kept[int(torch.randint(20, (1,), generator=dice))] = True
    weights = logits.softmax(0)
    mass = (weights * kept).sum()
    out = (weights * kept / mass) @ values
    bound = output_bound(mass, values.norm(dim=1).max())
    assert (out - weights @ values).norm() <= bound + 1e-12


def test_kept_mask_meets_positions_not_slots() -> None:
    slots = torch.tensor([[[7, -1, 0, 3], [1, 2, 4, 5]]])
    keys = torch.tensor([[[-1, -1, 0, 1, 2, 3, 4, 5, 6, 7]]]).expand(1, 2, 10)
    found = kept_mask(slots, keys)
    assert keys[0, 0][found[0, 0]].tolist() == [0, 3, 7]
    assert keys[0, 1][found[0, 1]].tolist() == [1, 2, 4, 5]


def test_coverage_curve_is_the_best_choice_of_each_size() -> None:
    votes = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0)) ** 4
    votes[1, :, 6:] = 0  # padding
    curve = coverage_curve(votes)
    for k in (1, 4, 9):
        best = votes.topk(k, dim=2).values.sum(2) / votes.sum(2)
        torch.testing.assert_close(curve[..., k - 1], best)
    first = torch.zeros(2, 3, 9, dtype=torch.bool)
    first[..., 4:6] = True
    forced = coverage_curve(votes, first)
    torch.testing.assert_close(forced[..., 1], votes[..., 4:6].sum(2) / votes.sum(2))
    assert (forced <= curve + 1e-6).all()
    assert (coverage_curve(torch.zeros(1, 1, 4)) == 0).all()


@given(seed=st.integers(0, 10**6), mass=st.floats(0.01, 1))
def test_slots_for_mass_are_enough_and_one_less_is_not(seed: int, mass: float) -> None:
    votes = torch.rand(1, 2, 12, generator=torch.Generator().manual_seed(seed)) ** 3
    curve = coverage_curve(votes)
    count = slots_for_mass(curve, mass)
    assert (curve.gather(2, count[..., None] - 1)[..., 0] >= mass - 2e-6).all()
    less = curve.gather(2, (count[..., None] - 2).clamp(min=0))[..., 0]
    assert ((less < mass) | (count == 1)).all()


def test_layer_mass_by_hand() -> None:
    pos = torch.tensor([[[0, 1, 5, 9, 18, 19], [0, 2, 3, 9, 17, 19]], [[0, 1, 2, 3, 8, 9], [0, 1, 4, 5, 9, -1]]])
    found = layer_mass(
        3, torch.tensor([[0.9, 0.8], [1.0, 0.5]]), pos, [20, 10], sinks=1, protect=[slice(1, 4)], recent=[2, 3], bins=2
    )
    assert found.layer == 3
    assert (found.lowest, found.median) == (0.5, 0.85)
    assert found.p10 == pytest.approx(0.59)
    # Row 0 sees 18 and 19 as recent, row 1 sees 7, 8 and 9.
    assert found.spans == {"sinks": 4 / 23, "protected": 7 / 23, "recent": 6 / 23, "rest": 6 / 23}
    assert sum(found.spans.values()) == pytest.approx(1)
    assert found.histogram == (15 / 23, 8 / 23)


def test_bad_values_are_named() -> None:
    query, keys, _, kept, key_pos, query_pos = case(0, 0)
    with pytest.raises(InputError, match="kept has shape"):
        attention_mass(query, keys, kept[:, :1], FORMS["plain"], key_pos=key_pos, query_pos=query_pos)
    with pytest.raises(InputError, match="finite"):
        coverage_curve(torch.tensor([[[math.nan]]]))
    with pytest.raises(InputError, match="not negative"):
        coverage_curve(torch.tensor([[[-1.0]]]))
    with pytest.raises(InputError, match=r"1\.5"):
        slots_for_mass(torch.ones(1, 1, 3), 1.5)
    with pytest.raises(InputError, match="layer 2 keeps no token"):
        layer_mass(2, torch.ones(1, 1), torch.full((1, 1, 3), -1), [5])
