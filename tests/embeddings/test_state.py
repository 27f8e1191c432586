"""Saving, copying, moving: the rows and their state stay together, or the request is refused."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from vitalfew.core import InputError
from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, LazyAdam, Optimizer, RowwiseAdagrad, Table

Refuses = Callable[..., AbstractContextManager[None]]
RULES = [SGD(0.1), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.1)]


def make(rule: Optimizer = RULES[3], seed: int = 0, **settings: object) -> EmbeddingBags:
    tables = [Table("user", 10, 4), Table("item", 20, 4)]
    return EmbeddingBags(tables, rule, generator=torch.Generator().manual_seed(seed), **settings)


def train(bags: EmbeddingBags, steps: range) -> EmbeddingBags:
    for step in steps:
        ids = torch.randint(0, 10, (6, 2), generator=torch.Generator().manual_seed(step))
        bags(ids).square().sum().backward()
        bags.step()
    return bags


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def consistent(bags: EmbeddingBags) -> bool:
    buffers = dict(bags.named_buffers())
    return bags.rows.weight is buffers["weight"] and all(buffers[k] is v for k, v in bags.rows.state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_resumed_training_equals_uninterrupted(rule: Optimizer, dtype: torch.dtype) -> None:
    whole = train(make(rule, dtype=dtype, seed=3), range(6))
    part = train(make(rule, dtype=dtype, seed=3), range(3))
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = make(SGD(7.0) if rule.name == "sgd" else type(rule)(7.0), dtype=dtype, seed=9)
    resumed.rows.seed = 99
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.rows.optimizer == rule
    assert consistent(resumed)
    assert same_bits(train(resumed, range(3, 6)), whole)


def test_state_that_does_not_fit_is_refused_before_any_row_changes(refuses: Refuses) -> None:
    source = train(make(Adagrad(0.1)), range(2))
    other = EmbeddingBags([Table("shop", 10, 4), Table("item", 20, 4)], Adagrad(0.1))
    before = other.weight.clone()
    with refuses("shop"):
        other.load_state_dict(source.state_dict())
    assert torch.equal(other.weight, before)
    rule = make(RowwiseAdagrad(0.1), seed=5)
    before = rule.weight.clone()
    with refuses("adagrad"):
        rule.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(rule.weight, before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], Adagrad(0.1)).load_state_dict(source.state_dict())


def test_assigning_on_load_is_refused(refuses: Refuses) -> None:
    bags = make()
    with refuses("assign=True"):
        nn.Sequential(bags).load_state_dict(nn.Sequential(make()).state_dict(), assign=True)
    assert consistent(bags)


@pytest.mark.parametrize(("value", "move"), [
    ("float64", lambda m: m.double()),
    ("float16", lambda m: m.half()),
    ("bfloat16", lambda m: m.bfloat16()),
    ("meta", lambda m: m.to("meta")),
    ("float64", lambda m: nn.Sequential(m).to(torch.float64)),
    ("meta", lambda m: m.to_empty(device="meta")),
])  # fmt: skip
def test_moves_and_casts_are_refused(value: str, move: Callable[[nn.Module], object], refuses: Refuses) -> None:
    bags = make()
    before = copy.deepcopy(bags)
    with refuses(value):
        move(bags)
    assert consistent(bags)
    assert same_bits(train(bags, range(2)), train(before, range(2)))


def test_moves_to_where_it_is_are_fine() -> None:
    model = nn.Sequential(make())
    assert model.to("cpu").float().cpu() is model
    assert consistent(model[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_missing_cuda_is_pytorchs_own_error() -> None:
    bags = make()
    with pytest.raises((AssertionError, RuntimeError)):
        bags.cuda()
    assert consistent(train(bags, range(1)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies_are_whole_and_independent(how: str) -> None:
    bags = train(make(dtype=torch.bfloat16), range(2))
    if how == "deepcopy":
        other = copy.deepcopy(bags)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(bags))
    else:
        file = io.BytesIO()
        torch.save(bags, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert consistent(other)
    assert same_bits(bags, other)
    before = bags.weight.clone()
    train(other, range(2, 4))
    assert torch.equal(bags.weight, before)
    assert not torch.equal(other.weight, before)
    assert same_bits(train(bags, range(2, 4)), other)


def test_copy_leaves_out_what_waits() -> None:
    bags = make(update="step")
    bags(torch.tensor([[1, 2]])).sum().backward()
    other = copy.deepcopy(bags)
    assert (bags.rows.pending, other.rows.pending) == (1, 0)
    other.step()
    assert torch.equal(other.weight, bags.weight)


def test_rows_are_buffers_and_the_mode_is_kept() -> None:
    bags = make()
    assert list(bags.parameters()) == []
    assert set(bags.state_dict()) == {"weight", "wide0", "wide1", "_extra_state"}
    assert not bags.eval().training
    assert bags.train().training


DDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from vitalfew.core import InputError
from vitalfew.embeddings import EmbeddingBags, SGD, Table
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)
bags = EmbeddingBags([Table("a", 10, 4)], SGD(0.1), generator=torch.Generator().manual_seed(0))
model = nn.parallel.DistributedDataParallel(nn.Sequential(bags, nn.Linear(4, 1)))
before = bags.weight.clone()
try:
    model(torch.tensor([[1]])).sum().backward()
    print("trained", not torch.equal(before, bags.weight))
except InputError as error:
    print("refused", error, torch.equal(before, bags.weight))
with torch.no_grad():
    print("evaluated", tuple(model(torch.tensor([[1]])).shape))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [1, 2])
def test_several_processes_are_refused_one_is_not(world: int, tmp_path: object) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", DDP, str(rank), str(world), f"{tmp_path}/store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        if world == 1:
            assert "trained True" in out
        else:
            assert "2 processes would each change their own copy" in out
            assert "; train in one process" in out
            assert "True" in out
        assert "evaluated (1, 1, 1)" in out


def test_extra_state_of_unknown_optimizer_is_refused(refuses: Refuses) -> None:
    bags = make()
    state = bags.get_extra_state()
    state["optimizer"]["name"] = "lion"
    with refuses("lion"):
        bags.set_extra_state(state)
    with pytest.raises(InputError):
        bags.lr = -1.0
