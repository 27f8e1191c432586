"""The kernels and their plain twins give the same bits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, LazyAdam, RowwiseAdagrad, Table
from vitalfew.embeddings import _kernels_numba as kernels
from vitalfew.embeddings import _kernels_reference as reference
from vitalfew.embeddings.optim import Optimizer

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = [
    SGD(0.1),
    SGD(0.1, weight_decay=0.01),
    RowwiseAdagrad(0.1),
    RowwiseAdagrad(0.1, weight_decay=0.01, eps=1e-3),
    Adagrad(0.1),
    Adagrad(0.1, weight_decay=0.01),
    LazyAdam(0.01),
    LazyAdam(0.01, weight_decay=0.01, beta1=0.0),
]


@dataclass
class Case:
    tables: list[Table]
    ids: np.ndarray
    offsets: np.ndarray | None
    weights: np.ndarray | None
    seed: int

    @property
    def features(self) -> int:
        return sum(len(table.features) for table in self.tables)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dim = draw(st.sampled_from([1, 3, 8, 16, 33]))
    tables, limits = [], []
    for t in range(draw(st.integers(1, 4))):
        num_rows = draw(st.sampled_from([1, 2, 7, 50]))
        names = tuple(f"f{t}.{k}" for k in range(draw(st.integers(1, 2))))
        tables.append(Table(f"t{t}", num_rows, dim, draw(st.sampled_from(["sum", "mean"])), names))
        limits += [num_rows] * len(names)
    samples = draw(st.integers(0, 12))
    bags = samples * len(limits)
    if draw(st.booleans()):
        sizes = rng.integers(0, draw(st.integers(1, 6)), bags)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    else:
        sizes, offsets = np.ones(bags, np.int64), None
    ids = (rng.random(sizes.sum()) * np.repeat(np.resize(limits, bags), sizes)).astype(np.int64)
    weights = rng.choice([0.0, 1.0, -2.5, 0.3], len(ids)).astype(np.float32) if draw(st.booleans()) else None
    return Case(tables, ids, offsets, weights, draw(st.integers(-5, 2**40)))


def stored(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy().view(np.uint16)


def forward(bags: EmbeddingBags, case: Case, weights: torch.Tensor | None) -> torch.Tensor:
    if case.offsets is None:
        return bags(torch.from_numpy(case.ids).reshape(-1, case.features), None, weights)
    return bags(torch.from_numpy(case.ids), torch.from_numpy(case.offsets), weights)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@given(case=cases(), rule=st.sampled_from(RULES), threads=st.integers(1, 4))
@settings(max_examples=40)
def test_kernels_equal_their_twins_bit_by_bit(dtype: torch.dtype, case: Case, rule: Optimizer, threads: int) -> None:
    torch.set_num_threads(threads)
    storage = STORAGE[dtype]
    start = torch.Generator().manual_seed(case.seed)
    bags = EmbeddingBags(case.tables, rule, dtype=dtype, generator=start, seed=case.seed)
    weight = stored(bags.weight).copy()
    state = {name: tensor.numpy().copy() for name, tensor in bags.rows.state.items()}
    rng = np.random.default_rng(abs(case.seed))
    mean, base = bags.layout.mean, bags.layout.base
    for step in (1, 2):
        scales = None if case.weights is None else torch.from_numpy(case.weights).requires_grad_()
        out = forward(bags, case, scales)
        pooled, row_of, bag_of, scale_of = reference.pool(
            weight, storage, case.ids, case.offsets, case.weights, mean, base
        )
        np.testing.assert_array_equal(out.detach().numpy().reshape(pooled.shape), pooled)
        grad = rng.standard_normal(pooled.shape).astype(np.float32)
        out.backward(torch.from_numpy(grad).reshape(out.shape))
        if scales is not None:
            sizes = np.bincount(bag_of, minlength=1)[bag_of].astype(np.float32)
            divisor = np.where(mean[bag_of % len(mean)], sizes, np.float32(1))
            expected = reference.scale_gradients(weight, storage, row_of, bag_of, divisor, grad)
            np.testing.assert_array_equal(scales.grad.numpy(), expected)
        total = reference.gradients(row_of, bag_of, scale_of, grad)
        reference.update(rule, weight, storage, state, total, step=step, seed=case.seed)
        np.testing.assert_array_equal(stored(bags.weight), weight)
        for name, tensor in bags.rows.state.items():
            np.testing.assert_array_equal(tensor.numpy(), state[name])
        assert bags.counts.steps == step
        assert bags.counts.rows_updated == step * len(total)


@given(case=cases(), factor=st.sampled_from([1.0, 0.25, 0.3]))
@settings(max_examples=40)
def test_norm_and_scaled_step_equal_their_twins(case: Case, factor: float) -> None:
    bags = EmbeddingBags(case.tables, SGD(0.1), update="step", generator=torch.Generator().manual_seed(0))
    weights = None if case.weights is None else torch.from_numpy(case.weights)
    out = forward(bags, case, weights)
    grad = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    out.backward(torch.from_numpy(grad))
    bags.rows.scale_grad(factor)
    weight = bags.weight.numpy().copy()
    _, *lookups = reference.pool(weight, 0, case.ids, case.offsets, case.weights, bags.layout.mean, bags.layout.base)
    total = reference.gradients(*lookups, grad.reshape(-1, grad.shape[-1]), factor)
    assert bags.rows.grad_norm() == pytest.approx(np.sqrt(reference.squared_norm(total)), rel=1e-12)
    bags.step()
    reference.update(SGD(0.1), weight, 0, {}, total, step=1)
    np.testing.assert_array_equal(bags.weight.numpy(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_finite_16_bit_floats_go_through_the_kernels_unchanged(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    bags = EmbeddingBags([Table("t", len(finite), 1)], SGD(1.0), dtype=dtype)
    bags.weight.copy_(finite.unsqueeze(1))
    out = bags(torch.arange(len(finite)).unsqueeze(1))
    assert torch.equal(out.flatten().view(torch.int32), finite.float().view(torch.int32))
    (out * 0).sum().backward()  # an update by nothing writes each row back: exact values are never rounded away
    assert bags.counts.rows_updated == len(finite)
    assert torch.equal(bags.weight.view(torch.int16).flatten(), finite.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), random=st.integers(0, 2**64 - 1))
@settings(max_examples=300)
def test_rounding_goes_to_a_neighbour_and_never_to_infinity(dtype: torch.dtype, value: float, random: int) -> None:
    exact = np.array([value], np.float32)
    bits = reference.narrow(exact, STORAGE[dtype], [random])
    got = float(reference.widen(bits, STORAGE[dtype])[0])
    largest = torch.finfo(dtype).max
    clamped = float(np.clip(exact[0], -largest, largest))
    spacing = max(abs(clamped) * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert abs(got) <= largest
    assert abs(got - clamped) <= spacing
    assert np.signbit(got) == np.signbit(exact[0])
    assert reference.narrow(np.array([got], np.float32), STORAGE[dtype], [random])[0] == bits[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_beyond_the_largest_half_stop_there(dtype: torch.dtype) -> None:
    bags = EmbeddingBags([Table("t", 2, 4)], SGD(1.0), dtype=dtype)
    largest = torch.finfo(dtype).max
    bags.weight.fill_(largest)
    for _ in range(3):
        sign = torch.tensor([[-1.0], [1.0]]) * largest / 300
        bags(torch.tensor([[0], [1]])).backward(sign.unsqueeze(2).expand(2, 1, 4))
    assert torch.isfinite(bags.weight).all()
    assert (bags.weight[0] == largest).all()
    assert (bags.weight[1] < largest).any()


def test_partition_is_a_stable_permutation() -> None:
    rows = np.random.default_rng(0).zipf(1.3, 10_000).astype(np.int64) + 2**33
    seen = []
    for threads in (1, 2, 4):
        order, in_order, starts = np.empty(len(rows), np.int32), np.empty(len(rows), np.int64), np.empty(9, np.int64)
        largest = kernels.partition(rows, order, in_order, starts, threads)
        assert sorted(order.tolist()) == list(range(len(rows)))
        np.testing.assert_array_equal(rows[order], in_order)
        buckets = [set(in_order[a:b].tolist()) for a, b in itertools.pairwise(starts)]
        assert sum(map(len, buckets)) == len(set(rows.tolist()))  # each row in one bucket
        assert all((np.diff(order[a:b]) > 0).all() for a, b in itertools.pairwise(starts))
        assert largest == np.diff(starts).max()
        seen.append((order, starts))
    for order, starts in seen[1:]:
        np.testing.assert_array_equal(order, seen[0][0])
        np.testing.assert_array_equal(starts, seen[0][1])
