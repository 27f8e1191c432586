"""Masked attention: what the mask keeps apart stays apart, exactly; what it learns is what was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from vitalfew.embeddings import SGD, EmbeddingBags, Table
from vitalfew.embeddings.models.adrec import AdRec, Mask

Refuses = Callable[..., AbstractContextManager[None]]
NAMES = ("a", "b", "c", "d")
SOME: list[tuple[int | str, int | str]] = [("(dense)", "a"), ("b", 4), (2, 3)]
EVERY = list(itertools.combinations(range(5), 2))


class Fixed(nn.Module):
    """Tables that give the same rows for any ids."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.features, self.dim = NAMES[: rows.shape[1]], rows.shape[2]
        self.register_buffer("rows", rows)

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.rows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(mask: Mask, *, dense_in: int = 3, rows: int = 6, **settings: int | float) -> AdRec:
    tables = Fixed(torch.randn(rows, 4, 4, generator=seeded(1)))
    return AdRec(
        tables, dense_in=dense_in, bottom=(6, 4), top=(5, 1), mask=mask, generator=seeded(), **settings
    ).double()


def ids(rows: int = 6) -> Tensor:
    return torch.zeros(rows, 4, dtype=torch.int64)


@pytest.mark.parametrize("mask", ["none", "triangular", "learned", SOME])
@pytest.mark.parametrize("training", [True, False])
def test_a_field_does_not_reach_those_it_is_kept_from(mask: Mask, training: bool) -> None:
    model = model_of(mask).train(training)
    seen = model.attention_mask()
    tokens = torch.randn(6, 5, 4, generator=seeded(2), dtype=torch.float64)
    before = model.mixed(tokens)
    for j in range(5):
        moved = tokens.clone()
        moved[:, j] += torch.randn(6, 4, generator=seeded(j), dtype=torch.float64)
        changed = (model.mixed(moved) != before).any(dim=(0, 2))
        assert torch.equal(changed, seen[:, j])


def test_attention_of_pairs_kept_apart_is_zero_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = model_of(SOME, layers=3).eval(), []
    attend = nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        one = torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:2], -1, -1)
        weights.append(attend(q, k, one, attn_mask=attn_mask))
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    model.mixed(torch.randn(6, 5, 4, generator=seeded(2), dtype=torch.float64))
    assert len(weights) == 3
    for each in weights:
        assert (each[..., ~model.attention_mask()] == 0).all()
        assert (each[..., model.attention_mask()] > 0).all()


def test_masks_are_what_their_names_say() -> None:
    assert model_of("none").attention_mask().all()
    triangle = model_of("triangular").attention_mask()
    assert torch.equal(triangle, torch.ones(5, 5, dtype=torch.bool).tril())
    some = model_of(SOME).attention_mask()
    assert torch.equal(some, some.T)
    assert {(i, j) for i, j in EVERY if some[i, j]} == {(0, 1), (2, 4), (2, 3)}
    assert model_of("none").pruned_pairs() == model_of("triangular").pruned_pairs() == []
    assert model_of(SOME, dense_in=3).pruned_pairs()[:2] == [("(dense)", "b"), ("(dense)", "c")]


@pytest.mark.parametrize("mask", [EVERY, "learned"])
def test_every_pair_is_no_mask(mask: Mask) -> None:
    dense = torch.randn(6, 3, generator=seeded(3), dtype=torch.float64)
    full = model_of(mask, **({"keep": 1.0} if mask == "learned" else {}))
    plain = model_of("none")
    plain.load_state_dict({k: v for k, v in full.state_dict().items() if k != "pair_logits"})
    assert torch.equal(full(dense, ids()), plain(dense, ids()))


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_learned_mask_keeps_the_share(keep: float) -> None:
    model = model_of("learned", keep=keep)
    kept = max(1, round(keep * 10))
    assert len(model.pruned_pairs()) == 10 - kept
    with torch.no_grad():
        model.pair_logits.copy_(torch.arange(10.0))
    names = list(itertools.combinations(model.fields, 2))
    assert model.pruned_pairs() == names[: 10 - kept]


def test_pruned_pairs_get_gradients_and_come_back() -> None:
    """Only the product of two fields says anything: their pair takes the place of the one that was kept."""
    model = AdRec(
        Fixed(torch.zeros(1, 4, 4)), dense_in=0, top=(8, 1), mask="learned", keep=1 / 6, generator=seeded(2)
    ).double()
    best = (0, 1)
    assert _kept(model) == {(0, 2)}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(200):
        rows = torch.randn(128, 4, 4, generator=seeded(step), dtype=torch.float64)
        model.tables.rows = rows
        label = ((rows[:, best[0]] * rows[:, best[1]]).sum(1) > 0).double()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(None, ids(128)), label).backward()
        if not step:
            assert (model.pair_logits.grad != 0).all()
        optimizer.step()
    assert _kept(model) == {best}


def _kept(model: AdRec) -> set[tuple[int, int]]:
    seen = model.attention_mask()
    return {(i, j) for i, j in itertools.combinations(range(len(seen)), 2) if seen[i, j]}


@pytest.mark.parametrize("mask", ["none", "triangular", SOME])
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_equal_numerical_ones(mask: Mask, layers: int) -> None:
    model = model_of(mask, rows=2, layers=layers)
    dense = torch.randn(2, 3, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 4, 4, generator=seeded(2), dtype=torch.float64, requires_grad=True)

    def run(dense: Tensor, rows: Tensor) -> Tensor:
        model.tables.rows = rows
        return model(dense, ids(2))

    assert torch.autograd.gradcheck(run, (dense, rows))


def test_learned_mask_leaves_other_gradients_exact() -> None:
    """The way back for the logits gives none to anything else: the same gradients as with the pairs written down."""
    learned = model_of("learned")
    pairs = [(i, j) for i, j in EVERY if learned.attention_mask()[i, j]]
    written = model_of(pairs)
    written.load_state_dict({k: v for k, v in learned.state_dict().items() if k != "pair_logits"})
    dense = torch.randn(6, 3, generator=seeded(3), dtype=torch.float64)
    for model in (learned, written):
        model(dense, ids()).square().sum().backward()
    found = dict(learned.named_parameters())
    for name, parameter in written.named_parameters():
        assert torch.equal(found[name].grad, parameter.grad), name


@pytest.mark.parametrize("dense_in", [0, 3])
@pytest.mark.parametrize(("layers", "heads", "feed_forward", "mask"), [(1, 2, 2, "triangular"), (3, 4, 4, "learned")])
def test_parameters_are_as_many_as_the_formula_says(
    dense_in: int, layers: int, heads: int, feed_forward: int, mask: Mask
) -> None:
    model = model_of(mask, dense_in=dense_in, layers=layers, heads=heads, feed_forward=feed_forward)
    tokens, dim = 4 + (dense_in > 0), 4
    chains = [(tokens * dim, 5, 1)] + ([(dense_in, 6, dim)] if dense_in else [])
    around = sum((a + 1) * b for chain in chains for a, b in itertools.pairwise(chain)) + 2 * dim
    wide = feed_forward * dim
    each = 4 * dim + 3 * dim * (dim + 1) + dim * (dim + 1) + wide * (dim + 1) + dim * (wide + 1)
    logits = math.comb(tokens, 2) if mask == "learned" else 0
    assert sum(p.numel() for p in model.parameters()) == around + layers * each + logits
    assert len(model.fields) == tokens


@pytest.mark.parametrize("mask", ["none", "triangular", "learned", SOME])
def test_exported_model_gives_the_same(mask: Mask) -> None:
    model = model_of(mask).eval()
    dense = torch.randn(6, 3, generator=seeded(3), dtype=torch.float64)
    exported = torch.export.export(model, (dense, ids()))
    torch.testing.assert_close(exported.module()(dense, ids()), model(dense, ids()))


@pytest.mark.parametrize("mask", ["triangular", "learned"])
@pytest.mark.parametrize("dense_in", [0, 2])
def test_trains_rows_and_layers(mask: Mask, dense_in: int) -> None:
    tables = EmbeddingBags([Table(name, 9, 8) for name in NAMES], SGD(0.1), generator=seeded())
    model = AdRec(tables, dense_in=dense_in, bottom=(8,), top=(32, 1), layers=2, mask=mask, generator=seeded())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    looked = torch.randint(0, 9, (64, 4), generator=seeded(1))
    label = ((looked[:, 0] + looked[:, 1]) % 2).float()
    dense = torch.randn(64, dense_in, generator=seeded(2)) if dense_in else None
    before, losses = tables.weight.clone(), []
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, looked), label)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(tables.weight, before)


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (model_of("learned", layers=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = model_of("learned", layers=2)
    with torch.no_grad():
        model.pair_logits.neg_()
    pruned = model.pruned_pairs()
    other = model_of("learned", layers=2)
    other.load_state_dict(model.state_dict())
    assert other.pruned_pairs() == pruned


def test_autocast() -> None:
    model = model_of("learned").float()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(6, 3, generator=seeded()), ids()).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("value", "settings"), [
    ("'square'", {"mask": "square"}),
    ("'e'", {"mask": [("a", "e")]}),
    ("5", {"mask": [(0, 5)]}),
    ("-1", {"mask": [(-1, 1)]}),
    ("'ab'", {"mask": ["ab"]}),
    ("(0, 1, 2)", {"mask": [(0, 1, 2)]}),
    ("3 heads", {"heads": 3}),
    ("0", {"heads": 0}),
    ("layers", {"layers": 0}),
    ("feed_forward", {"feed_forward": 0}),
    ("1.5", {"mask": "learned", "keep": 1.5}),
    ("0", {"mask": "learned", "keep": 0}),
    ("keep=0.3", {"keep": 0.3}),
    ("-1", {"dense_in": -1}),
    ("(8, 16)", {"bottom": (8, 16)}),
    ("(5, 2)", {"top": (5, 2)}),
])  # fmt: skip
def test_bad_settings_are_refused(value: str, settings: dict[str, object], refuses: Refuses) -> None:
    with refuses(value):
        AdRec(Fixed(torch.zeros(2, 4, 4)), **{"dense_in": 3, "bottom": (4,), "top": (1,), **settings})


def test_lonely_field_and_dense_inputs_that_do_not_fit_are_refused(refuses: Refuses) -> None:
    with refuses("1 field"):
        AdRec(Fixed(torch.zeros(2, 1, 4)), dense_in=0, top=(1,))
    model = model_of("none")
    for dense in (None, torch.ones(6, 4), torch.ones(5, 3)):
        with refuses("None" if dense is None else str(tuple(dense.shape))):
            model(dense, ids())
