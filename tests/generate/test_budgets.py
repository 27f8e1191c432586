"""Slots of a budget: exact shares, equal totals, bytes that fit, and the fewest slots for a mass."""

from __future__ import annotations

import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import Budget, InputError
from vitalfew.generate.budgets import by_mass, pyramid, slot_bytes, slots_for_bytes, uniform, weighted
from vitalfew.generate.quant import Int4, Int8

lengths, layers = st.integers(1, 10_000), st.integers(1, 40)


@given(hundredths=st.integers(1, 100), length=lengths)
def test_a_share_loses_no_slot_to_float_errors(hundredths: int, length: int) -> None:
    exact = hundredths * length // 100
    if exact:
        assert uniform(hundredths / 100, length, 2) == [exact, exact]
        assert uniform(f"{hundredths}%", length, 1) == [exact]
    else:
        with pytest.raises(InputError, match="0 slots, 1 are needed"):
            uniform(hundredths / 100, length, 2)


def test_the_float_product_would_lose_one() -> None:
    assert int(100 * 0.29) == 28
    assert uniform(0.29, 100, 1) == [29]


@given(share=st.decimals("0.01", "1", places=4), length=lengths)
def test_a_share_is_rounded_down_from_its_decimal_text(share: Decimal, length: int) -> None:
    expected = int(share * length)
    if expected:
        assert uniform(float(share), length, 1) == [expected]


def test_a_count_may_exceed_the_length() -> None:
    assert uniform(512, 100, 2) == [512, 512]
    assert pyramid(512, 100, 3) == [512, 512, 512]


@given(
    mean=st.integers(1, 3000), length=st.integers(1, 3000), num=layers, slope=st.floats(0, 1), least=st.integers(1, 50)
)
def test_pyramid_has_the_total_of_uniform_falls_and_stays_in_range(
    mean: int, length: int, num: int, slope: float, least: int
) -> None:
    if mean < least:
        return
    slots = pyramid(mean, length, num, slope=slope, least=least)
    assert sum(slots) == mean * num
    assert all(a >= b for a, b in itertools.pairwise(slots))
    assert least <= min(slots)
    assert max(slots) <= max(length, mean)


def test_pyramid_is_linear_where_nothing_stands_in_the_way() -> None:
    slots = pyramid(0.2, 4000, 30, slope=0.5)
    ideal = np.linspace(1200, 400, 30)
    assert np.abs(np.array(slots) - ideal).max() < 1
    assert pyramid(0.5, 99, 1) == [49]
    assert pyramid(0.5, 64, 4, slope=0.0) == uniform(0.5, 64, 4)


@given(weights=st.lists(st.floats(0, 100), min_size=1, max_size=12), mean=st.integers(1, 200), least=st.integers(0, 9))
def test_weights_keep_total_and_order(weights: list[float], mean: int, least: int) -> None:
    if not any(weights) or mean < least:
        return
    slots = weighted(mean, 200, weights, least=least)
    assert sum(slots) == mean * len(weights)
    assert min(slots) >= least
    assert max(slots) <= 200
    for (a, b), (x, y) in zip(itertools.combinations(weights, 2), itertools.combinations(slots, 2), strict=True):
        assert x >= y if a > b else y >= x if b > a else abs(x - y) <= 1


@given(
    slot=st.lists(st.integers(1, 5000), min_size=1, max_size=8), rows=st.integers(1, 9), fixed=st.integers(0, 99),
    slots=st.integers(1, 5000), more=st.integers(0, 10**6),
)  # fmt: skip
def test_bytes_and_slots_are_inverse(slot: list[int], rows: int, fixed: int, slots: int, more: int) -> None:
    def nbytes(k: int) -> int:
        return rows * (fixed + k * sum(slot))

    assert slots_for_bytes(nbytes(slots), slot, rows, fixed=fixed) == slots
    found = slots_for_bytes(nbytes(slots) + more, slot, rows, fixed=fixed)
    assert nbytes(found) <= nbytes(slots) + more < nbytes(found + 1)


def test_too_small_a_size_names_the_smallest_that_works() -> None:
    with pytest.raises(InputError) as caught:
        slots_for_bytes("1 kB", [100, 50], 2, least=10, fixed=8)
    smallest = 2 * (8 + 10 * 150)
    assert str(smallest) in str(caught.value.hint)
    assert "1000 bytes hold 3 slots" in caught.value.message
    assert slots_for_bytes(smallest, [100, 50], 2, least=10, fixed=8) == 10
    with pytest.raises(InputError):
        slots_for_bytes(smallest - 1, [100, 50], 2, least=10, fixed=8)


@pytest.mark.parametrize(("codec", "content"), [(None, 2 * 64 * 2), (Int8(), 2 * 66), (Int4(), 2 * 36)])
def test_bytes_of_a_slot(codec: Int8 | Int4 | None, content: int) -> None:
    assert slot_bytes(64, 64, 2, codec) == content + 8
    assert slot_bytes(96, 64, 4) == 640 + 8


def curves(draw: np.random.Generator, num: int, n: int) -> list[np.ndarray]:
    weights = [np.sort(draw.dirichlet(np.full(n, draw.uniform(0.02, 2)), size=(2, 3)))[..., ::-1] for _ in range(num)]
    return [w.cumsum(-1) for w in weights]


def mass_of(found: list[int], some: list[np.ndarray]) -> float:
    return float(np.mean([curve[..., k - 1].mean() for curve, k in zip(some, found, strict=True)]))


@given(seed=st.integers(0, 10**6), target=st.floats(0.05, 1), num=st.integers(1, 5), least=st.integers(1, 4))
def test_by_mass_reaches_the_target_with_no_more_slots_than_uniform(
    seed: int, target: float, num: int, least: int
) -> None:
    n = 24
    some = curves(np.random.default_rng(seed), num, n)
    found = by_mass(some, target, least=least)
    assert mass_of(found, some) >= target - 1e-8
    same = next(k for k in range(least, n + 1) if mass_of([k] * num, some) >= target - 1e-9)
    assert sum(found) <= same * num
    assert min(found) >= least


def test_by_mass_is_the_fewest_of_all_choices() -> None:
    some = curves(np.random.default_rng(3), 3, 7)
    for target in (0.5, 0.8, 0.93):
        fewest = min(
            sum(choice)
            for choice in itertools.product(range(1, 8), repeat=3)
            if mass_of(list(choice), some) >= target - 1e-9
        )
        assert sum(by_mass(some, Budget.cover(target))) == fewest


def test_by_mass_takes_protected_tokens_first_and_honours_a_cap() -> None:
    late = [0.0, 0.1, 0.7, 1.0]  # two protected tokens that nobody looks at, then those that matter
    assert by_mass([late], 0.6, least=2) == [3]
    assert by_mass([late, late], 1.0, least=2, cap=3) == [3, 3]
    assert by_mass([[1.0]], 0.5, least=4) == [1]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: uniform(0, 100, 2),
        lambda: uniform(0.0, 100, 2),
        lambda: uniform(0.5, 0, 2),
        lambda: uniform(0.5, 10, 0),
        lambda: uniform("1 MiB", 10, 2),
        lambda: uniform(Budget.cover(0.9), 10, 2),
        lambda: uniform(4, 100, 2, least=5),
        lambda: uniform(float("nan"), 100, 2),
        lambda: pyramid(0.5, 10, 2, slope=1.5),
        lambda: weighted(0.5, 10, []),
        lambda: weighted(0.5, 10, [0.0, 0.0]),
        lambda: weighted(0.5, 10, [1.0, -1.0]),
        lambda: weighted(0.5, 10, [1.0, float("nan")]),
        lambda: slots_for_bytes("0.5", [1], 1),
        lambda: slots_for_bytes(Budget.of(0.5), [1], 1),
        lambda: slots_for_bytes(10**6, [], 1),
        lambda: slots_for_bytes(10**6, [8], 0),
        lambda: slot_bytes(0, 64, 2),
        lambda: by_mass([], 0.9),
        lambda: by_mass([[0.5, 1.0]], 0.0),
        lambda: by_mass([[0.5, 1.0]], 1.1),
        lambda: by_mass([[1.0, 0.5]], 0.9),
        lambda: by_mass([[float("nan")]], 0.9),
        lambda: by_mass([[]], 0.9),
        lambda: by_mass([[1.0]], Budget.of(3)),
        lambda: by_mass([[1.0]], 0.9, least=4, cap=2),
    ],
)
def test_bad_values_are_named(bad: object) -> None:
    with pytest.raises(InputError) as caught:
        bad()  # type: ignore[operator]
    assert caught.value.hint


def test_fractions_are_taken_as_weights() -> None:
    assert weighted(3, 10, [Fraction(1, 3), Fraction(2, 3)]) == [2, 4]
