"""Rows of 16-bit floats: rounded at random, without bias, the same way for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, Table
from vitalfew.embeddings import _kernels_reference as reference

HALVES = [torch.bfloat16, torch.float16]
COPIES = 20_000


def rounded(value: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Write one value to many rows, by an SGD step from zero."""
    bags = EmbeddingBags([Table("t", COPIES, 1)], SGD(1.0), dtype=dtype, seed=seed)
    bags.weight.zero_()
    bags(torch.arange(COPIES).unsqueeze(1)).backward(torch.full((COPIES, 1, 1), -value))
    return bags.weight.flatten().double()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(
    value=st.floats(2**-23, 6e4, width=32) | st.floats(-6e4, -(2**-23), width=32) | st.floats(2**-23, 2**-14, width=32),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25)
def test_rounding_is_without_bias(dtype: torch.dtype, value: float, seed: int) -> None:
    found = rounded(value, dtype, seed)
    below, above = float(found.min()), float(found.max())
    assert below <= value <= above
    assert len(found.unique()) <= 2
    spacing = max(abs(value) * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert above - below <= spacing
    # The mean of 20,000 fair choices; six standard errors.
    assert abs(float(found.mean()) - value) <= 6 * spacing / 2 / COPIES**0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 6.103515625e-05, 5.9604644775390625e-08, 2.0**-20])
def test_what_fits_is_stored_exactly(dtype: torch.dtype, value: float) -> None:
    assert (rounded(value, dtype) == value).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_follows_seed_and_step_alone(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    def train(seed: int, count: int, steps: int = 3) -> torch.Tensor:
        threads(count)
        tables = [Table("a", 100, 8), Table("b", 100, 8)]
        bags = EmbeddingBags(tables, SGD(0.01), dtype=dtype, seed=seed, generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            ids = torch.from_numpy(np.random.default_rng(step).integers(0, 100, (3000, 2)))
            bags(ids).sum().backward()
        return bags.weight.clone()

    assert torch.equal(train(1, 1), train(1, 2))
    assert torch.equal(train(1, 1), train(1, 1))
    assert not torch.equal(train(1, 1), train(2, 1))
    numbers = {tuple(reference.random_bits(0, step, row, 3)) for step in range(1, 30) for row in range(100)}
    assert len(numbers) == 29 * 100


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_steps_add_up_where_the_nearest_float_would_stand_still(dtype: torch.dtype) -> None:
    target, lr = 0.0, 1e-4  # a step is far below the spacing around 1
    bags = EmbeddingBags([Table("t", 64, 8)], SGD(lr), dtype=dtype)
    bags.weight.fill_(1.0)
    ids = torch.arange(64).unsqueeze(1)
    nearest = torch.ones((), dtype=dtype)
    for _ in range(500):
        (bags(ids) - target).square().sum().div(2).backward()
        nearest = (nearest.float() - lr * (nearest.float() - target)).to(dtype)
    assert float(nearest) == 1.0
    assert float(bags.weight.float().mean()) == pytest.approx((1 - lr) ** 500, abs=3e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_state_stays_float32_and_learning_follows_full_width(dtype: torch.dtype) -> None:
    def train(dtype: torch.dtype) -> tuple[EmbeddingBags, float]:
        bags = EmbeddingBags([Table("t", 40, 8)], Adagrad(0.1), dtype=dtype, generator=torch.Generator().manual_seed(0))
        target = torch.randn(40, 1, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(200):
            loss = (bags(torch.arange(40).unsqueeze(1)) - target).square().mean()
            loss.backward()
        return bags, float(loss.detach())

    half, loss = train(dtype)
    _, full = train(torch.float32)
    assert all(state.dtype == torch.float32 for state in half.rows.state.values())
    assert half.weight.dtype == dtype
    assert half.rows.nbytes == 40 * 8 * (2 + 4)
    assert loss < full + 2e-3
