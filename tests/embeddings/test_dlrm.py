"""The model against a forward written down in numpy, and against itself over plain PyTorch tables."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import nn

from vitalfew.core import InputError
from vitalfew.embeddings import DLRM, SGD, Adagrad, EmbeddingBags, LazyAdam, Optimizer, RowwiseAdagrad, Table, TorchBags

Refuses = Callable[..., AbstractContextManager[None]]


def tables(pooling: str = "sum") -> list[Table]:
    return [Table("a", 7, 4, pooling), Table("b", 20, 4, pooling), Table("c", 1, 4, pooling)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lookups(kind: str, limits: list[int], samples: int = 6) -> tuple[torch.Tensor, torch.Tensor | None]:
    rng = np.random.default_rng(samples)
    each = np.resize(limits, samples * len(limits))
    if kind == "one id":
        return torch.from_numpy((rng.random(len(each)) * each).astype(np.int64).reshape(samples, -1)), None
    sizes = rng.integers(0, 4, len(each))
    ids = (rng.random(sizes.sum()) * np.repeat(each, sizes)).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))


@pytest.mark.parametrize("kind", ["one id", "jagged"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_plain_tables_start_and_pool_the_same(kind: str, pooling: str) -> None:
    ours, plain = (
        EmbeddingBags(tables(pooling), SGD(0.1), generator=seeded()),
        TorchBags(tables(pooling), generator=seeded()),
    )
    for table, bag in zip(ours.tables, plain.bags, strict=True):
        assert torch.equal(ours.rows_of(table.name), bag.weight)
        assert float(bag.weight.detach().abs().max()) <= table.num_rows**-0.5
    arguments = lookups(kind, [7, 20, 1])
    torch.testing.assert_close(ours(*arguments), plain(*arguments))
    empty = torch.zeros(0, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    torch.testing.assert_close(ours(*empty), plain(*empty))


@pytest.mark.parametrize("num_rows", [1, 3, 10, 100, 999, 4097])
def test_same_start_for_any_size(num_rows: int) -> None:
    table = [Table("a", num_rows, 3)]
    ours, plain = EmbeddingBags(table, SGD(0.1), generator=seeded()), TorchBags(table, generator=seeded())
    assert torch.equal(ours.weight, plain.bags[0].weight)


def by_hand(model: DLRM, fields: np.ndarray, dense: np.ndarray | None) -> np.ndarray:
    def through(layers: nn.Sequential, x: np.ndarray, *, last_linear: bool) -> np.ndarray:
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linears):
            x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
            if not (last_linear and i == len(linears) - 1):
                x = np.maximum(x, 0)
        return x

    inputs = []
    if dense is not None:
        low = through(model.bottom, dense, last_linear=False)
        fields = np.concatenate([low[:, None], fields], 1)
        inputs.append(low)
    dots = [(fields[:, i] * fields[:, j]).sum(1) for i in range(fields.shape[1]) for j in range(i)]
    inputs.append(np.stack(dots, 1))
    return through(model.top, np.concatenate(inputs, 1), last_linear=True)[:, 0]


@pytest.mark.parametrize("kind", ["one id", "jagged"])
@pytest.mark.parametrize("dense_in", [0, 5])
def test_forward_equals_one_written_by_hand(kind: str, dense_in: int) -> None:
    bags = EmbeddingBags(tables(), SGD(0.1), generator=seeded())
    model = DLRM(bags, dense_in=dense_in, bottom=(8, 4), top=(9, 3, 1), generator=seeded(1))
    dense = torch.randn(6, dense_in, generator=seeded(2)) if dense_in else None
    ids, offsets = lookups(kind, [7, 20, 1])
    found = model(dense, ids, offsets).detach().numpy()
    edges = np.arange(19) if offsets is None else offsets.numpy()
    flat, weight = ids.reshape(-1).numpy(), bags.weight.double().numpy()
    fields = np.stack([weight[[0, 7, 27][b % 3] + flat[edges[b] : edges[b + 1]]].sum(0) for b in range(18)])
    expected = by_hand(model, fields.reshape(6, 3, 4), None if dense is None else dense.double().numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (6,)


@pytest.mark.parametrize("rule", [SGD(0.05), Adagrad(0.05), LazyAdam(0.01)], ids=lambda r: r.name)
@pytest.mark.parametrize("kind", ["one id", "jagged"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_training_equals_that_over_plain_tables(rule: Optimizer, kind: str) -> None:
    bags = EmbeddingBags(tables(), rule, generator=seeded()), TorchBags(tables(), generator=seeded())
    ours, plain = (DLRM(each, dense_in=5, bottom=(8, 4), top=(9, 1), generator=seeded(1)) for each in bags)
    dense_ours = torch.optim.SGD(ours.parameters(), lr=0.05)
    dense_plain = torch.optim.SGD([*plain.bottom.parameters(), *plain.top.parameters()], lr=0.05)
    rows = plain.tables.optimizer(rule)
    label = torch.randint(0, 2, (6,), generator=seeded(5)).float()
    for step in range(5):
        dense = torch.randn(6, 5, generator=seeded(step))
        arguments = lookups(kind, [7, 20, 1])
        losses = []
        for model, optimizers in ((ours, [dense_ours]), (plain, [dense_plain, rows])):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(dense, *arguments), label)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for table, bag in zip(ours.tables.tables, plain.tables.bags, strict=True):
        torch.testing.assert_close(ours.tables.rows_of(table.name), bag.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense_in", [0, 3])
def test_gradients_equal_numerical_ones(dense_in: int) -> None:
    class Fixed(nn.Module):
        features, dim = ("a", "b", "c"), 4

        def __init__(self, fields: torch.Tensor) -> None:
            super().__init__()
            self.fields = fields

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
            return self.fields

    model = DLRM(Fixed(torch.zeros(2, 3, 4)), dense_in=dense_in, bottom=(6, 4), top=(5, 1), generator=seeded()).double()
    dense = torch.randn(2, dense_in, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    fields = torch.randn(2, 3, 4, generator=seeded(2), dtype=torch.float64, requires_grad=True)

    def run(dense: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        model.tables.fields = fields
        return model(dense if dense_in else None, torch.zeros(2, 3, dtype=torch.int64))

    assert torch.autograd.gradcheck(run, (dense, fields))


@pytest.mark.parametrize(
    ("dense_in", "bottom", "top"), [(13, (64, 16, 4), (32, 16, 1)), (0, (4,), (8, 1)), (1, (4,), (1,))]
)
def test_parameters_are_as_many_as_the_formula_says(
    dense_in: int, bottom: tuple[int, ...], top: tuple[int, ...]
) -> None:
    model = DLRM(EmbeddingBags(tables(), SGD(0.1)), dense_in=dense_in, bottom=bottom, top=top)
    fields = 3 + (dense_in > 0)
    chains = [(fields * (fields - 1) // 2 + (4 if dense_in else 0), *top)] + ([(dense_in, *bottom)] if dense_in else [])
    expected = sum((a + 1) * b for chain in chains for a, b in itertools.pairwise(chain))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_autocast_and_copies_train() -> None:
    bags = EmbeddingBags(tables(), RowwiseAdagrad(0.1), generator=seeded())
    model = DLRM(bags, dense_in=5, bottom=(8, 4), top=(9, 1), generator=seeded(1))
    ids, _ = lookups("one id", [7, 20, 1])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(6, 5), ids).float().sum().backward()
    assert bags.counts.steps == 1
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    other = copy.deepcopy(model)
    before = bags.weight.clone()
    other(torch.randn(6, 5), ids).sum().backward()
    assert torch.equal(bags.weight, before)
    with torch.inference_mode():
        first = model(torch.ones(6, 5), ids)
    assert torch.equal(model(torch.ones(6, 5), ids), first)


@pytest.mark.parametrize(("value", "settings"), [
    ("16", {"dense_in": 3, "bottom": (8, 16), "top": (1,)}),
    ("()", {"dense_in": 3, "bottom": (), "top": (1,)}),
    ("2", {"dense_in": 3, "bottom": (8, 4), "top": (5, 2)}),
    ("()", {"dense_in": 3, "bottom": (8, 4), "top": ()}),
    ("-1", {"dense_in": -1, "bottom": (8, 4), "top": (1,)}),
    ("to 0 values", {"dense_in": 3, "bottom": (8, 4), "top": (0, 1)}),
    ("to -2 values", {"dense_in": 3, "bottom": (-2, 4), "top": (1,)}),
])  # fmt: skip
def test_bad_shapes_are_refused(value: str, settings: dict[str, object], refuses: Refuses) -> None:
    with refuses(value):
        DLRM(EmbeddingBags(tables(), SGD(0.1)), **settings)


def test_lonely_field_is_refused(refuses: Refuses) -> None:
    with refuses("1 field"):
        DLRM(EmbeddingBags([Table("a", 3, 4)], SGD(0.1)), dense_in=0, top=(1,))


def test_dense_inputs_that_do_not_fit_are_refused(refuses: Refuses) -> None:
    bags = EmbeddingBags(tables(), SGD(0.1))
    ids = torch.zeros(6, 3, dtype=torch.int64)
    with_dense = DLRM(bags, dense_in=5, bottom=(4,), top=(1,))
    for dense in (None, torch.ones(6, 4), torch.ones(6), torch.ones(5, 5)):
        with refuses("None" if dense is None else str(tuple(dense.shape))):
            with_dense(dense, ids)
    without = DLRM(bags, dense_in=0, top=(1,))
    with refuses("(6, 4)"):
        without(torch.ones(6, 4), ids)
    assert without(torch.ones(6, 0), ids).shape == (6,)


def test_nan_input_trains_no_row() -> None:
    bags = EmbeddingBags(tables(), SGD(0.1), generator=seeded())
    model = DLRM(bags, dense_in=2, bottom=(4,), top=(1,))
    before = bags.weight.clone()
    with pytest.raises(InputError, match="no row was changed"):
        model(torch.full((2, 2), float("nan")), torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
    assert torch.equal(bags.weight, before)


def test_baseline_has_only_the_rules_pytorch_has(refuses: Refuses) -> None:
    plain = TorchBags(tables())
    with refuses("rowwise_adagrad"):
        plain.optimizer(RowwiseAdagrad(0.1))
    with refuses("weight decay"):
        plain.optimizer(SGD(0.1, weight_decay=0.1))
