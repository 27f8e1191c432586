"""Bad inputs are refused with the value and a hint, nothing has changed then, and a later good call succeeds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from vitalfew.core import InputError
from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, Rows, Table, TorchBags

Refuses = Callable[..., AbstractContextManager[None]]


def make() -> EmbeddingBags:
    tables = [Table("user", 10, 4), Table("item", 20, 4, "mean", ("bought", "seen"))]
    return EmbeddingBags(tables, Adagrad(0.1), generator=torch.Generator().manual_seed(0))


def tensor(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


FLAT = tensor([1, 2, 3])
BAD = [
    (-1, (tensor([[1, 2, 3], [1, -1, 3]]),)),
    (20, (tensor([[1, 20, 3]]),)),
    ("`user` in sample 1", (tensor([[1, 2, 3], [10, 2, 3]]),)),
    ("`seen` in sample 0", (tensor([0, 1, 2, 99]), tensor([0, 1, 2, 4]))),
    (2**40, (tensor([[1, 2**40, 3]]),)),
    (-(2**63), (tensor([[-(2**63), 2, 3]]),)),
    ("float32", (tensor([[1, 2, 3]], torch.float32),)),
    ("bool", (tensor([[1, 1, 0]], torch.bool),)),
    ("int16", (tensor([[1, 2, 3]], torch.int16),)),
    ("uint8", (tensor([[1, 2, 3]], torch.uint8),)),
    ("(1, 2)", (tensor([[1, 2]]),)),
    ("(3,)", (FLAT,)),
    ("(1, 3, 1)", (tensor([[[1], [2], [3]]]),)),
    ("4 bags", (FLAT, tensor([0, 1, 1, 2, 3]))),
    ("offsets", (FLAT, tensor([0, 1, 2]))),
    ("offsets", (FLAT, tensor([1, 1, 2, 3]))),
    ("offsets", (FLAT, tensor([0, 2, 1, 3]))),
    ("offsets", (FLAT, tensor([0, -1, 2, 3]))),
    ("offsets", (FLAT, tensor([0, 1, 2, 4]))),
    ("offsets", (FLAT, tensor([], torch.int64))),
    ("offsets must be integers", (FLAT, tensor([0, 1, 2, 3], torch.float32))),
    ("2 weights", (FLAT, tensor([0, 1, 2, 3]), torch.ones(2))),
    ("4 weights", (FLAT, tensor([0, 1, 2, 3]), torch.ones(4))),
    ("weight 1 is nan", (FLAT, tensor([0, 1, 2, 3]), torch.tensor([1, float("nan"), 1]))),
    ("weight 2 is inf", (FLAT, tensor([0, 1, 2, 3]), torch.tensor([1, 1, float("inf")]))),
    ("meta", (torch.zeros(1, 3, dtype=torch.int64, device="meta"),)),
    ("offsets lie on meta", (FLAT, torch.zeros(4, dtype=torch.int64, device="meta"))),
    ("weights lie on meta", (FLAT, tensor([0, 1, 2, 3]), torch.ones(3, device="meta"))),
]


@pytest.mark.parametrize(("value", "arguments"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_lookups_are_refused_and_change_nothing(
    value: object, arguments: tuple[torch.Tensor, ...], refuses: Refuses
) -> None:
    bags = make()
    before = copy.deepcopy(bags)
    with refuses(value):
        bags(*arguments)
    assert torch.equal(bags.weight, before.weight)
    assert bags.counts == before.counts
    for each in (bags, before):
        each(tensor([[1, 2, 3]])).sum().backward()
    assert torch.equal(bags.weight, before.weight)


def test_first_of_many_wrong_ids_is_named(refuses: Refuses) -> None:
    bags = make()
    ids = torch.zeros(5000, 3, dtype=torch.int64)
    ids[1234:] = 77
    with refuses("id 77 of feature `user` in sample 1234 lies outside [0, 10)"):
        bags(ids)


def read_only_copy(tensor: torch.Tensor) -> torch.Tensor:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def lookups(bags: EmbeddingBags, ids: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    out = bags(ids, offsets)
    out.sum().backward()  # an expanded gradient: stride 0
    return bags.weight.clone()


def test_layout_and_width_of_the_ids_do_not_matter() -> None:
    ids = tensor([[1, 2, 3], [4, 5, 6], [1, 2, 2], [0, 0, 0]])
    expected = lookups(make(), ids)
    read_only = read_only_copy(ids)
    wide = torch.zeros(4, 6, dtype=torch.int64)
    wide[:, ::2] = ids
    for same in (ids.int(), ids.T.contiguous().T, read_only, wide[:, ::2], ids.flip(0).flip(0)):
        assert torch.equal(lookups(make(), same), expected)
    one = tensor([[1, 2, 3]])
    assert torch.equal(lookups(make(), one.expand(4, 3)), lookups(make(), one.repeat(4, 1)))
    assert torch.equal(
        lookups(make(), ids.flatten().int(), torch.arange(13, dtype=torch.int32)),
        lookups(make(), ids.flatten(), torch.arange(13)),
    )


def test_ids_are_not_kept_or_changed() -> None:
    bags, other = make(), make()
    ids = tensor([[1, 2, 3]])
    out = bags(ids)
    ids.fill_(9)  # a loader that reuses its buffer
    out.sum().backward()
    other(tensor([[1, 2, 3]])).sum().backward()
    assert torch.equal(bags.weight, other.weight)


def test_gradients_of_any_layout_and_width_are_taken() -> None:
    ids = tensor([[1, 2, 3], [4, 5, 6]])
    grad = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    read_only = read_only_copy(grad)
    found = []
    for same in (grad, grad.transpose(0, 2).contiguous().transpose(0, 2), read_only):
        bags = make()
        bags(ids).backward(same)
        found.append(bags.weight.clone())
    assert all(torch.equal(found[0], each) for each in found)


def test_features_on_other_default_devices_and_types_still_work() -> None:
    plain = make()
    with torch.device("meta"):
        bags = make()
        out = bags(tensor([[1, 2, 3]]).new_zeros(0, 3, device="cpu"))
    assert out.device.type == "cpu"
    assert torch.equal(bags.weight, plain.weight)
    torch.set_default_dtype(torch.float64)
    try:
        bags = make()
        bags.to(torch.float32)
        assert bags(tensor([[1, 2, 3]])).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bags.weight, plain.weight)


@pytest.mark.parametrize(("value", "make"), [
    ("no tables", lambda: EmbeddingBags([], SGD(0.1))),
    ("['a']", lambda: EmbeddingBags([Table("a", 2, 2), Table("a", 3, 2)], SGD(0.1))),
    ("[2, 3]", lambda: EmbeddingBags([Table("a", 2, 2), Table("b", 3, 3)], SGD(0.1))),
    ("('x', 'x')", lambda: EmbeddingBags([Table("a", 2, 2, features=("x",)), Table("x", 3, 2)], SGD(0.1))),
    ("0 rows", lambda: Table("a", 0, 2)),
    ("rows of -1", lambda: Table("a", 2, -1)),
    ("'max'", lambda: Table("a", 2, 2, "max")),
    ("'users'", lambda: Table("a", 2, 2, features="users")),
    ("float64", lambda: EmbeddingBags([Table("a", 2, 2)], SGD(0.1), dtype=torch.float64)),
    ("'later'", lambda: EmbeddingBags([Table("a", 2, 2)], SGD(0.1), update="later")),
    ("0 x 3", lambda: Rows(0, 3, SGD(0.1))),
    ("`b`", lambda: EmbeddingBags([Table("a", 2, 2)], SGD(0.1)).rows_of("b")),
    ("shared", lambda: TorchBags([Table("a", 2, 2, features=("x", "y"))])),
    ("(1, 2)", lambda: TorchBags([Table("a", 2, 2)])(tensor([[0, 0]]))),
])  # fmt: skip
def test_bad_tables_are_refused(value: object, make: Callable[[], object], refuses: Refuses) -> None:
    with refuses(value):
        make()


def test_error_in_a_pass_is_the_users_own() -> None:
    bags = make()
    with pytest.raises(InputError) as caught:
        bags(tensor([[1, 2, 3]])).backward(torch.full((1, 3, 4), float("nan")))
    assert caught.value.hint


def test_huge_bag_and_many_tiny_ones() -> None:
    bags = EmbeddingBags([Table("a", 3, 2), Table("b", 2, 2, "mean")], SGD(1.0))
    before = bags.weight.clone()
    ids = torch.cat([torch.zeros(100_000, dtype=torch.int64), torch.ones(50_000, dtype=torch.int64)])
    offsets = torch.cat([tensor([0, 100_000, 150_000]), torch.full((20_000,), 150_000)])
    out = bags(ids, offsets)
    out.sum().backward()
    moved = before - bags.weight
    np.testing.assert_allclose(moved[0].numpy(), 100_000, rtol=1e-4)
    np.testing.assert_allclose(moved[4].numpy(), 1.0, rtol=1e-2)
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
