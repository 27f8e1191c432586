"""Five steps of every rule against nn.EmbeddingBag with PyTorch's optimizers, and against float64 arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from vitalfew.core import InputError
from vitalfew.embeddings import (
    SGD,
    Adagrad,
    EmbeddingBags,
    LazyAdam,
    Optimizer,
    RowwiseAdagrad,
    Table,
    optimizer_from_dict,
)

SHAPES = ["one id", "multi-hot", "weighted", "shared", "one row"]


def tables_of(shape: str, dim: int, pooling: str) -> list[Table]:
    if shape == "one row":
        return [Table("a", 1, dim, pooling), Table("b", 2, dim, pooling)]
    if shape == "shared":
        return [Table("a", 9, dim, pooling, ("x", "y", "z")), Table("b", 20, dim, pooling)]
    return [Table("a", 9, dim, pooling), Table("b", 20, dim, pooling), Table("c", 40, dim, pooling)]


class Peer:
    """One nn.EmbeddingBag per table, fed bag by bag; gradients dense or sparse."""

    def __init__(self, ours: EmbeddingBags, *, sparse: bool) -> None:
        self.layout = ours.layout
        self.bags, self.of_feature = [], []
        for table in ours.tables:
            start = ours.rows_of(table.name).clone()
            bag = nn.EmbeddingBag.from_pretrained(start, freeze=False, mode=table.pooling, sparse=sparse)
            self.bags.append(bag)
            self.of_feature += [bag] * len(table.features or (table.name,))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [bag.weight for bag in self.bags]

    def __call__(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        out = []
        for b, (first, last) in enumerate(itertools.pairwise(offsets)):
            f = b % len(self.of_feature)
            scale = None if weights is None else weights[first:last]
            out.append(self.of_feature[f](ids[first:last], torch.tensor([0]), scale))
        return torch.cat(out).reshape(-1, len(self.of_feature), out[0].shape[1])


def batch(ours: EmbeddingBags, shape: str, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    features, samples = len(ours.features), 7
    limits = np.resize(ours.layout.num_rows, samples * features)
    sizes = np.ones(len(limits), np.int64) if shape == "one id" else rng.integers(0, 5, len(limits))
    ids = (rng.random(sizes.sum()) * np.repeat(limits, sizes)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    weights = torch.from_numpy(rng.standard_normal(len(ids)).astype(np.float32)) if shape == "weighted" else None
    return torch.from_numpy(ids), torch.from_numpy(offsets), weights


def torch_optimizer(rule: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if isinstance(rule, SGD):
        return torch.optim.SGD(parameters, lr=rule.lr)
    if isinstance(rule, Adagrad):
        return torch.optim.Adagrad(parameters, lr=rule.lr, eps=rule.eps)
    return torch.optim.SparseAdam(parameters, lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps)


STATE = {"adagrad": {"wide0": "sum"}, "lazy_adam": {"wide0": "exp_avg", "wide1": "exp_avg_sq"}, "sgd": {}}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("rule", [SGD(0.1), Adagrad(0.1), LazyAdam(0.05)], ids=lambda r: r.name)
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 33, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_five_steps_equal_pytorch(rule: Optimizer, dim: int, shape: str, pooling: str) -> None:
    if shape == "weighted" and pooling == "mean":
        pytest.skip("nn.EmbeddingBag has no weighted mean")
    ours = EmbeddingBags(tables_of(shape, dim, pooling), rule, generator=torch.Generator().manual_seed(dim))
    peer = Peer(ours, sparse=True)
    optimizer = torch_optimizer(rule, peer.parameters)
    rng = np.random.default_rng(dim)
    for _ in range(5):
        ids, offsets, weights = batch(ours, shape, rng)
        out = ours(ids.reshape(-1, len(ours.features))) if shape == "one id" else ours(ids, offsets, weights)
        expected = peer(ids, offsets, weights)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        target = torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32))
        (out * target).sum().backward()
        optimizer.zero_grad()
        (expected * target).sum().backward()
        optimizer.step()
    for table, parameter in zip(ours.tables, peer.parameters, strict=True):
        torch.testing.assert_close(ours.rows_of(table.name), parameter.detach(), rtol=1e-5, atol=1e-5)
        start = ours._start[table.name]
        for mine, theirs in STATE[rule.name].items():
            state = ours.rows.state[mine][start : start + table.num_rows]
            torch.testing.assert_close(state, optimizer.state[parameter][theirs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 33, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_rowwise_adagrad_equals_float64_arithmetic(dim: int, shape: str, pooling: str) -> None:
    rule = RowwiseAdagrad(0.1)
    ours = EmbeddingBags(tables_of(shape, dim, pooling), rule, generator=torch.Generator().manual_seed(dim))
    w, s = ours.weight.numpy().astype(np.float64), np.zeros(len(ours.weight))
    rng = np.random.default_rng(dim)
    base, mean, features = ours.layout.base, ours.layout.mean, len(ours.features)
    for _ in range(5):
        ids, offsets, weights = batch(ours, shape, rng)
        out = ours(ids, offsets, weights)
        target = rng.standard_normal((out.shape[0] * features, dim)).astype(np.float32)
        out.reshape(-1, dim).backward(torch.from_numpy(target))
        g = np.zeros_like(w)
        for bag in range(len(target)):
            for i in range(int(offsets[bag]), int(offsets[bag + 1])):
                scale = 1.0 if weights is None else float(weights[i])
                if mean[bag % features]:
                    scale /= int(offsets[bag + 1] - offsets[bag])
                g[base[bag % features] + int(ids[i])] += scale * target[bag]
        s += (g * g).mean(1)
        w -= np.where(g != 0, rule.lr * g / (np.sqrt(s)[:, None] + rule.eps), 0)
    np.testing.assert_allclose(ours.rows.state["narrow0"].numpy()[:, 0], s, rtol=2e-5, atol=1e-10)
    np.testing.assert_allclose(ours.weight.numpy(), w, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rule", [SGD(0.1, weight_decay=0.1), Adagrad(0.1, weight_decay=0.1)], ids=lambda r: r.name)
def test_weight_decay_is_the_dense_rule_on_touched_rows_only(rule: Optimizer) -> None:
    ours = EmbeddingBags([Table("a", 6, 4)], rule, generator=torch.Generator().manual_seed(0))
    start = ours.weight.clone()
    dense = nn.Parameter(start[:3].clone())
    kind = torch.optim.SGD if isinstance(rule, SGD) else torch.optim.Adagrad
    optimizer = kind([dense], lr=rule.lr, weight_decay=rule.weight_decay)
    for _ in range(3):
        optimizer.zero_grad()
        ours(torch.tensor([[0], [1], [2]])).square().sum().backward()
        dense.square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight[:3], dense.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.weight[3:], start[3:])


def test_lazy_adam_corrects_its_bias_by_all_steps_and_leaves_other_rows() -> None:
    ours = EmbeddingBags([Table("a", 2, 1)], LazyAdam(0.1))
    ours.weight.zero_()
    for _ in range(4):
        ours(torch.tensor([[0]])).sum().backward()
    assert ours.weight[1] == 0
    ours(torch.tensor([[1]])).sum().backward()
    rate = 0.1 * np.sqrt(1 - 0.999**5) / (1 - 0.9**5)
    assert float(ours.weight[1]) == pytest.approx(-rate * 0.1 / (np.sqrt(0.001) + 1e-8), rel=1e-5)


@pytest.mark.parametrize("rule", [SGD(0.1), RowwiseAdagrad(0.2, eps=1e-5), Adagrad(1), LazyAdam(0.1, beta1=0.5)])
def test_rules_go_through_their_settings(rule: Optimizer) -> None:
    assert optimizer_from_dict(rule.to_dict()) == rule


@pytest.mark.parametrize("make", [
    lambda: SGD(-1.0), lambda: SGD(float("nan")), lambda: Adagrad(0.1, eps=-1), lambda: LazyAdam(0.1, beta2=1.0),
    lambda: RowwiseAdagrad(float("inf")), lambda: optimizer_from_dict({"name": "lion"}),
    lambda: optimizer_from_dict({"name": "sgd", "lr": 0.1, "momentum": 0.9}),
])  # fmt: skip
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(InputError):
        make()


def test_rate_schedule_changes_the_next_step() -> None:
    ours = EmbeddingBags([Table("a", 1, 1)], SGD(1.0))
    ours.weight.zero_()
    for lr in (1.0, 0.5, 0.0):
        ours.lr = lr
        ours(torch.tensor([[0]])).sum().backward()
    assert float(ours.weight) == -1.5
    assert ours.lr == 0.0
