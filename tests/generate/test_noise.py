"""Addressed noise: its distribution, and that a draw depends on its address alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitalfew.generate import _kernels_numba as kernels
from vitalfew.generate.noise import POOL, Noise, exponential, gumbel, gumbels, hashed


def square(n, noise=None, heads=2, first=0):
    at = torch.arange(first, first + n)
    return exponential(noise or Noise(0, 0), heads, at[None], at.expand(1, heads, -1))


def test_moments():
    """Mean and variance of Exp(1) and Gumbel(0, 1), within five standard errors of as many draws as the pool has."""
    drawn = square(500).double()
    assert abs(float(drawn.mean()) - 1) < 5 / math.sqrt(POOL)
    assert abs(float(drawn.var()) - 1) < 5 * math.sqrt(8 / POOL)
    at = torch.arange(500)
    z = gumbel(Noise(1, 2), 2, at[None], at.expand(1, 2, -1)).double()
    assert abs(float(z.mean()) - 0.57722) < 5 * math.sqrt(math.pi**2 / 6 / POOL)
    assert abs(float(z.var()) - math.pi**2 / 6) < 0.05
    assert float(drawn.min()) > 0


def test_rows_are_independent():
    """Rows of other queries, heads, layers and seeds have no linear dependence."""
    base = square(400)
    others = [base[0, 1], square(400, Noise(0, 1))[0, 0], square(400, Noise(1, 0))[0, 0], base[0, 0].roll(1, 0)]
    for other in others:
        both = np.corrcoef(base[0, 0].flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(both) < 0.02
    neighbours = np.corrcoef(base[0, 0, :, 1:].flatten().numpy(), base[0, 0, :, :-1].flatten().numpy())[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, -7])
def test_a_draw_depends_on_its_address_alone(seed):
    noise = Noise(seed, 11)
    whole = square(60, noise, heads=4)
    queries, keys = torch.tensor([[59, 3], [4, 20]]), torch.tensor([[40, 2, 0, -1], [1, 40, 33, 7]])
    key_pos = torch.stack([keys, keys.flip(1)])  # two rows, each with two KV heads in an order of their own
    some = exponential(noise, 4, queries, key_pos)
    for b in range(2):
        for h in range(4):
            for i, q in enumerate(queries[b].tolist()):
                for j, k in enumerate(key_pos[b, h // 2].tolist()):
                    assert k < 0 or some[b, h, i, j] == whole[0, h, q, k]


def test_positions_beyond_the_pool_turn_round():
    far = torch.tensor([[[5, POOL + 5, 3 * POOL + 5]]])
    drawn = exponential(Noise(0, 0), 1, torch.tensor([[200_000]]), far)[0, 0, 0]
    assert len(set(drawn.tolist())) == 1


def test_seeds_and_layers_have_keys_of_their_own():
    keys = {Noise(seed, layer).key for seed in range(100) for layer in range(100)}
    assert len(keys) > 9_990  # of 2**32
    assert Noise(0, 0).key != Noise(2**32, 0).key


def test_the_kernel_hashes_alike():
    from numba import njit

    start = kernels._start
    call = njit(lambda key, head, pos: start(key, head, pos))
    head, pos = torch.tensor([[0], [7], [300]]), torch.tensor([0, 1, 9_999, 2**31 - 1])
    want = hashed(Noise(5, 6).key, head, pos)
    got = [[call(Noise(5, 6).key, h, p) for p in pos.tolist()] for h in head[:, 0].tolist()]
    assert want.tolist() == got
    assert int(want.min()) >= 0
    assert int(want.max()) < 2**32


def test_the_two_forms_of_the_pool():
    at = torch.arange(50)
    z = gumbel(Noise(3, 0), 1, at[None], at.expand(1, 1, -1))
    starts = Noise(3, 0).starts(1, at[None])[0, 0]
    for i in range(50):
        np.testing.assert_array_equal(gumbels(3)[(int(starts[i]) + at.numpy()) & (POOL - 1)], z[0, 0, i].numpy())
