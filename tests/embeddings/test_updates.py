"""What a backward pass does to the rows: once each, the same bits in any case, or nothing at all."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitalfew.core import InputError
from vitalfew.embeddings import (
    SGD,
    Adagrad,
    EmbeddingBags,
    LazyAdam,
    Optimizer,
    Rows,
    RowwiseAdagrad,
    Table,
    clip_grad_norm,
    wrap,
)

Refuses = Callable[..., AbstractContextManager[None]]
RULES = [SGD(0.1), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.1)]


def make(rule: Optimizer = RULES[1], num_rows: int = 50, dim: int = 8, **settings: object) -> EmbeddingBags:
    tables = [Table("a", num_rows, dim, features=("x", "y")), Table("b", 2 * num_rows, dim, "mean")]
    return EmbeddingBags(tables, rule, generator=torch.Generator().manual_seed(0), **settings)


def same_bits(one: EmbeddingBags, other: EmbeddingBags) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def one_id(samples: int, limit: int, seed: int = 0, features: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).zipf(1.2, (samples, features)) % limit)


class Break(torch.autograd.Function):
    """Passes through, and fails backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_bits_do_not_depend_on_threads_or_on_the_run(
    rule: Optimizer, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    def train(count: int) -> EmbeddingBags:
        threads(count)
        bags = make(rule, 500, dtype=dtype)
        rng = np.random.default_rng(0)
        for step in range(3):
            out = bags(one_id(700, 500, step))  # long enough for several buckets
            out.backward(torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32)))
            sizes = rng.integers(0, 40, 3 * 50)
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
            ids = torch.from_numpy(rng.integers(0, 500, sizes.sum()))
            out = bags(ids, offsets, torch.from_numpy(rng.random(len(ids), np.float32)))
            out.backward(torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32)))
        return bags

    first = train(1)
    assert all(same_bits(first, train(count)) for count in (1, 2, 4, 1))


def test_bits_of_separate_tables_do_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    def train(count: int) -> tuple[EmbeddingBags, float]:
        threads(count)
        tables = [Table(f"t{i}", 300, 16) for i in range(6)]
        bags = EmbeddingBags(tables, Adagrad(0.1), update="step", generator=torch.Generator().manual_seed(0))
        norm = 0.0
        for step in range(3):
            rng = np.random.default_rng(step)
            out = bags(one_id(900, 300, step, 6))
            out.backward(torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32)))
            norm = clip_grad_norm([], bags, 10.0)
            bags.step()
        return bags, norm

    first, norm = train(1)
    for count in (2, 3, 4):
        bags, same_norm = train(count)
        assert same_bits(first, bags)
        assert norm == same_norm


def test_processes_with_one_two_and_four_threads_find_the_same_bits() -> None:
    code = """
import hashlib, torch
from vitalfew.embeddings import *
bags = EmbeddingBags([Table("a", 99, 8), Table("b", 99, 8)], Adagrad(0.1), generator=torch.Generator().manual_seed(0))
ids = torch.randint(0, 99, (5000, 2), generator=torch.Generator().manual_seed(1))
bags(ids).square().sum().backward()
print(hashlib.sha256(bags.weight.numpy().tobytes()).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PATH": "", "NUMBA_NUM_THREADS": n, "OMP_NUM_THREADS": n},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "2", "4")
    }
    assert len(found) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("update", ["backward", "step"])
def test_one_forward_or_several_in_one_pass_are_the_same_bits(rule: Optimizer, update: str) -> None:
    whole, parts = make(rule, update=update), make(rule, update=update)
    for step in range(3):
        ids = one_id(90, 50, step)
        target = torch.randn(90, 3, 8, generator=torch.Generator().manual_seed(step))
        (whole(ids) * target).sum().backward()
        losses = [(parts(i) * t).sum() for i, t in zip(ids.split(30), target.split(30), strict=True)]
        sum(losses).backward()
        whole.step()
        parts.step()
        assert whole.counts.steps == parts.counts.steps == step + 1
    assert same_bits(whole, parts)


def test_forwards_of_all_shapes_join_in_one_pass() -> None:
    bags, reference = make(Adagrad(0.1)), make(Adagrad(0.1))
    ids = one_id(4, 50)
    offsets = torch.arange(13)
    weights = torch.ones(12)
    losses = bags(ids).sum() + bags(ids.flatten(), offsets).sum() + bags(ids.flatten(), offsets, weights).sum()
    losses.backward()
    reference(torch.cat([ids, ids, ids])).sum().backward()
    assert same_bits(bags, reference)


def test_a_pass_updates_each_row_once() -> None:
    bags = EmbeddingBags([Table("a", 3, 1)], Adagrad(1.0))
    out = bags(torch.tensor([[0], [0], [1]]))
    more = bags(torch.tensor([[0]]))
    (out.sum() + 2 * more.sum()).backward()
    # One update by the sum: (1 + 1 + 2) ** 2; two updates would have left 2 ** 2 + 2 ** 2.
    assert bags.rows.state["wide0"].flatten().tolist() == [16, 1, 0]
    assert (bags.counts.rows_updated, bags.counts.steps, bags.counts.lookups) == (2, 1, 4)


def test_two_slabs_in_one_pass_are_updated_together() -> None:
    narrow = EmbeddingBags([Table("a", 3, 1)], SGD(1.0))
    wide = EmbeddingBags([Table("a", 3, 2)], SGD(1.0))
    before = narrow.weight.clone(), wide.weight.clone()
    loss = narrow(torch.tensor([[0]])).sum() + (wide(torch.tensor([[1]])) * float("nan")).sum()
    with pytest.raises(InputError, match="no row was changed"):
        loss.backward()
    assert torch.equal(narrow.weight, before[0])
    assert torch.equal(wide.weight, before[1])
    (narrow(torch.tensor([[0]])).sum() + wide(torch.tensor([[1]])).sum()).backward()
    assert narrow.counts.steps == wide.counts.steps == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("update", ["backward", "step"])
def test_bad_gradient_changes_no_row(bad: float, update: str) -> None:
    bags = make(Adagrad(0.1), update=update)
    before = copy.deepcopy(bags)
    grad = torch.zeros(5, 3, 8)
    grad[2, 1, 3] = bad
    with pytest.raises(InputError, match="no row was changed"):
        [step() for step in (lambda: bags(one_id(5, 50)).backward(grad), bags.step)]
    assert same_bits(bags, before)
    assert bags.rows.pending == 0
    bags(one_id(5, 50)).sum().backward()
    bags.step()
    before(one_id(5, 50)).sum().backward()
    before.step()
    assert same_bits(bags, before)


def test_infinities_that_cancel_are_found() -> None:
    bags = make()
    before = bags.weight.clone()
    grad = torch.zeros(5, 3, 8)
    grad[0, 0, :2] = torch.tensor([float("inf"), float("-inf")])
    with pytest.raises(InputError):
        bags(one_id(5, 50)).backward(grad)
    assert torch.equal(bags.weight, before)


@pytest.mark.parametrize("first", [True, False])
def test_pass_that_breaks_off_leaves_nothing_behind(first: bool) -> None:
    bags, clean = make(Adagrad(0.1)), make(Adagrad(0.1))
    x = torch.ones((), requires_grad=True)
    if first:  # autograd runs the newest node first: the rows' gradient is in before the pass breaks
        broken = Break.apply(x)
        loss = bags(one_id(5, 50)).sum() + broken
    else:
        loss = bags(one_id(5, 50)).sum()
        loss = loss + Break.apply(x)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        loss.backward()
    assert bags.rows.pending == 0
    bags.step()
    assert same_bits(bags, clean)
    for each in (bags, clean):
        each(one_id(7, 50, 1)).square().sum().backward()
    assert same_bits(bags, clean)


def test_second_backward_through_the_same_lookups_is_refused(refuses: Refuses) -> None:
    bags = make()
    loss = bags(one_id(5, 50)).square().sum()
    loss.backward(retain_graph=True)
    once = copy.deepcopy(bags)
    with refuses("twice"):
        loss.backward()
    assert same_bits(bags, once)
    bags(one_id(5, 50)).sum().backward()


def test_double_backward_is_refused() -> None:
    bags = make()
    x = torch.ones(5, 3, 8, requires_grad=True)
    weights = torch.ones(15, requires_grad=True)
    out = bags(one_id(5, 50).flatten(), torch.arange(16), weights)
    (grad,) = torch.autograd.grad((out * x).square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_graph_for_higher_gradients_of_the_dense_part_is_allowed() -> None:
    bags, plain = make(SGD(0.1)), make(SGD(0.1))
    for each, higher in ((bags, True), (plain, False)):
        x = torch.ones(3, requires_grad=True)
        (out,) = torch.autograd.grad((each(one_id(5, 50)).sum() * x).sum(), x, create_graph=higher)
        assert each.counts.steps == 0
        loss = (each(one_id(5, 50)) * x.sum()).sum()
        torch.autograd.backward(loss, create_graph=False)
        del out
    assert same_bits(bags, plain)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_backward_with_create_graph_updates_once() -> None:
    bags, plain = make(), make()
    x = torch.ones(3, 8, requires_grad=True)
    (bags(one_id(5, 50)) * x).square().sum().backward(create_graph=True)
    (plain(one_id(5, 50)) * torch.ones(3, 8)).square().sum().backward()
    assert same_bits(bags, plain)
    x.grad = None


def test_gradients_asked_of_other_tensors_update_no_row() -> None:
    bags = make()
    before = copy.deepcopy(bags)
    weights = torch.ones(15, requires_grad=True)
    ids, offsets = one_id(5, 50).flatten(), torch.arange(16)
    torch.autograd.grad(bags(ids, offsets, weights).sum(), weights)
    bags(ids, offsets, weights).sum().backward(inputs=[weights])
    assert torch.equal(bags.weight, before.weight)
    assert bags.counts.steps == 0
    bags(ids, offsets, weights).sum().backward()
    assert bags.counts.steps == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_updates_the_same(reentrant: bool) -> None:
    bags, plain = make(SGD(0.1)), make(SGD(0.1))
    layer = nn.Linear(8, 8)

    def block(each: EmbeddingBags, x: torch.Tensor) -> torch.Tensor:
        return layer(each(one_id(5, 50)) + x)

    x = torch.zeros(5, 3, 8, requires_grad=True)
    (checkpoint(block, bags, x, use_reentrant=reentrant).sum() + bags(one_id(5, 50, 1)).sum()).backward()
    (block(plain, x).sum() + plain(one_id(5, 50, 1)).sum()).backward()
    assert bags.rows.pending == 0
    # The reentrant kind runs a pass inside the pass: two updates, none lost.
    assert bags.counts.steps == (2 if reentrant else 1)
    torch.testing.assert_close(bags.weight, plain.weight)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_the_weights(pooling: str, dtype: torch.dtype) -> None:
    bags = EmbeddingBags([Table("a", 20, 4, pooling)], SGD(0.1))
    table = bags.weight.clone()
    ids, offsets = torch.tensor([3, 3, 4, 7, 1, 3]), torch.tensor([0, 3, 3, 4, 6])
    weights = torch.tensor([0.5, 0.0, -1.0, 0.0, 1e-42, 2.0], dtype=dtype, requires_grad=True)
    target = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))
    (bags(ids, offsets, weights) * target).sum().backward()
    plain = weights.detach().clone().float().requires_grad_()
    out = nn.functional.embedding_bag(ids, table, offsets[:-1], mode="sum", per_sample_weights=plain)
    if pooling == "mean":
        out = out / offsets.diff().clamp(min=1).unsqueeze(1)
    (out.unsqueeze(1) * target).sum().backward()
    assert weights.grad.dtype == dtype
    torch.testing.assert_close(weights.grad.float(), plain.grad)


def test_gradients_of_weights_without_offsets_and_of_frozen_rows() -> None:
    bags = EmbeddingBags([Table("a", 20, 4)], SGD(0.1))
    bags.rows.trainable = False
    weights = torch.ones(3, 1, requires_grad=True)
    before = bags.weight.clone()
    bags(torch.tensor([[3], [4], [3]]), None, weights).sum().backward()
    torch.testing.assert_close(weights.grad, before[[3, 4, 3]].sum(1, keepdim=True))
    assert torch.equal(bags.weight, before)


def test_gradient_of_weights_after_an_update_is_refused(refuses: Refuses) -> None:
    bags = make()
    weights = torch.ones(15, requires_grad=True)
    first = bags(one_id(5, 50).flatten(), torch.arange(16), weights).sum()
    second = bags(one_id(5, 50)).sum()
    second.backward()
    with refuses("changed since"):
        first.backward()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_micro_batches_gather_to_one_big_batch(rule: Optimizer) -> None:
    big, small = make(rule, update="step"), make(rule, update="step")
    for step in range(3):
        ids = one_id(64, 50, step)
        big(ids).square().mean().backward()
        big.step()
        for part in ids.split(16):
            (small(part).square().mean() / 4).backward()
        assert small.rows.pending == 4
        small.step()
        assert small.rows.pending == 0
    assert big.counts.rows_updated == small.counts.rows_updated
    torch.testing.assert_close(big.weight, small.weight, rtol=1e-4, atol=1e-5)


def test_step_without_gradients_and_dropped_gradients_do_nothing() -> None:
    bags = make(LazyAdam(0.1), update="step")
    before = copy.deepcopy(bags)
    bags.step()
    bags(one_id(5, 50)).sum().backward()
    bags.zero_grad()
    bags.step()
    assert same_bits(bags, before)


def test_scaling_acts_on_what_waits_and_not_on_what_comes_after() -> None:
    bags = EmbeddingBags([Table("a", 1, 1)], SGD(1.0), update="step")
    bags.weight.zero_()
    bags(torch.tensor([[0]])).sum().backward()
    bags.rows.scale_grad(0.25)
    bags(torch.tensor([[0]])).sum().backward()
    bags.rows.scale_grad(2.0)
    assert bags.rows.grad_norm() == 2.5
    bags.step()
    assert float(bags.weight) == -2.5


def test_gradients_that_wait_are_not_changed_from_outside() -> None:
    bags = EmbeddingBags([Table("a", 3, 2)], SGD(1.0), update="step")
    x = torch.zeros(1, 1, 2, requires_grad=True)
    out = bags(torch.tensor([[0]])) + x  # the same gradient goes to the rows and to x
    start = bags.weight[0].clone()
    out.sum().backward()
    x.grad.mul_(100)
    bags.step()
    torch.testing.assert_close(start - bags.weight[0], torch.ones(2))


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping_is_exact(max_norm: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 1)
    bags = make(SGD(0.1), update="step")
    other = EmbeddingBags([Table("c", 5, 3)], SGD(0.1), update="step")
    dense = [nn.Parameter(bags.weight.clone()), nn.Parameter(other.weight.clone())]
    twin = copy.deepcopy(linear)
    ids, more = one_id(8, 50), torch.arange(8).unsqueeze(1) % 5
    (linear(bags(ids).flatten(1)).square().sum() + other(more).square().sum()).backward()
    base = torch.from_numpy(bags.layout.base)
    fields = nn.functional.embedding(ids + base, dense[0]).flatten(1)
    (twin(fields).square().sum() + nn.functional.embedding(more, dense[1]).square().sum()).backward()
    norm = clip_grad_norm(linear.parameters(), [bags, other.rows], max_norm)
    expected = nn.utils.clip_grad_norm_([*twin.parameters(), *dense], max_norm)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(linear.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-6)
    bags.step()
    other.step()
    torch.optim.SGD(dense, lr=0.1).step()
    torch.testing.assert_close(bags.weight, dense[0].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.weight, dense[1].detach(), rtol=1e-5, atol=1e-6)


def test_clipping_in_backward_mode_and_bad_factors_are_refused(refuses: Refuses) -> None:
    bags = make()
    bags(one_id(5, 50)).sum().backward()
    with refuses("update='backward'"):
        clip_grad_norm([], bags, 1.0)
    with refuses("-1"):
        clip_grad_norm([], bags, -1.0)
    with refuses("nan"):
        bags.rows.scale_grad(float("nan"))


def test_wrapped_slabs_are_clipped_and_stepped_together() -> None:
    model = nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(4, 3)])
    few = wrap(model, SGD(1.0), update="step")
    loss = model[0](torch.tensor(1)).sum() + model[1](torch.tensor(1)).sum()
    loss.backward()
    assert clip_grad_norm([], few.rows, 1.0) == pytest.approx(5**0.5)
    before = [m.weight[1].clone() for m in model]
    few.step()
    moved = torch.cat([b - m.weight[1] for b, m in zip(before, model, strict=True)])
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-5)
    (model[0](torch.tensor(1)).sum() + model[1](torch.tensor(1)).sum() * float("nan")).backward()
    before = [m.weight.clone() for m in model]
    with pytest.raises(InputError, match="no row was changed"):
        few.step()
    assert all(torch.equal(b, m.weight) for b, m in zip(before, model, strict=True))
    assert all(rows.pending == 0 for rows in few.rows)


def test_autocast_trains() -> None:
    torch.manual_seed(0)
    bags = make(RowwiseAdagrad(0.2))
    layers = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    ids = one_id(64, 50)
    target = (ids[:, 0] % 2).float()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = bags(ids)
            logit = layers(out).squeeze(1)
        assert out.dtype == torch.float32
        assert logit.dtype == torch.bfloat16
        loss = nn.functional.binary_cross_entropy_with_logits(logit.float(), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_loss_scaling_looks_for_infinities_before_any_row_changes() -> None:
    """The recipe for torch.amp.GradScaler: unscale both sides, look, then step both or neither."""
    torch.manual_seed(0)
    bags, plain = make(SGD(0.1), update="step"), make(SGD(0.1))
    layer = nn.Linear(24, 1)
    twin = copy.deepcopy(layer)
    optimizer, peer = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (layer, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped = 0
    for step in range(6):
        ids = one_id(16, 50, step)
        overflow = step == 2
        optimizer.zero_grad()
        loss = layer(bags(ids).flatten(1)).square().mean()
        scaler.scale(loss * float("inf") if overflow else loss).backward()

        scaler.unscale_(optimizer)
        finite = bags.rows.grad_is_finite() and all(bool(p.grad.isfinite().all()) for p in layer.parameters())
        if finite:
            bags.rows.scale_grad(1 / scaler.get_scale())
            bags.step()
            scaler.step(optimizer)
            scaler.update()
        else:
            before = bags.weight.clone()
            bags.zero_grad()
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            assert torch.equal(bags.weight, before)
            skipped += 1
            continue
        peer.zero_grad()
        twin(plain(ids).flatten(1)).square().mean().backward()
        peer.step()
    assert skipped == 1
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(bags.weight, plain.weight)
    torch.testing.assert_close(layer.weight, twin.weight)


def test_evaluation_changes_nothing_and_notes_no_graph() -> None:
    bags = make()
    before = copy.deepcopy(bags)
    with torch.no_grad():
        assert not bags(one_id(5, 50)).requires_grad
    with torch.inference_mode():
        bags(one_id(5, 50))
    bags.rows.trainable = False
    assert not bags(one_id(5, 50)).requires_grad
    assert same_bits(bags, before)
    bags.rows.trainable = True
    bags.eval()  # as with nn.Embedding, eval() alone does not freeze
    bags(one_id(5, 50)).sum().backward()
    assert not same_bits(bags, before)


def test_dropped_outputs_and_empty_batches_are_fine() -> None:
    bags = make(LazyAdam(0.1))
    before = bags.weight.clone()
    bags(one_id(5, 50))
    bags(torch.zeros(0, 3, dtype=torch.int64)).sum().backward()
    bags(torch.zeros(0, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)).sum().backward()
    out = bags(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert out.shape == (0, 3, 8)
    out.sum().backward()
    assert torch.equal(bags.weight, before)
    out = bags(torch.zeros(0, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 3, 8))


def test_two_threads_may_train_different_models() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def train(seed: int) -> EmbeddingBags:
        bags = make(Adagrad(0.1))
        for step in range(20):
            bags(one_id(200, 50, seed + step)).square().sum().backward()
        return bags

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    assert all(same_bits(bags, train(seed)) for seed, bags in enumerate(together))


def test_step_allocates_nothing_as_large_as_the_table() -> None:
    rows = Rows(10_000_000, 4, SGD(0.1))  # 160 MB
    bags = EmbeddingBags([Table("a", 8, 4)], SGD(0.1))
    layout = bags.layout
    layout.num_rows[:] = 10_000_000

    def step(seed: int) -> None:
        ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 5000, 2000))
        rows.bags(layout, ids).sum().backward()

    step(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for seed in range(20):
        step(seed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_ids_beyond_two_to_the_31_reach_their_rows() -> None:
    from vitalfew.embeddings import _kernels_numba as kernels

    order, in_order, starts = np.empty(3, np.int32), np.empty(3, np.int64), np.empty(2, np.int64)
    kernels.partition(np.array([2**40, 5, 2**40]), order, in_order, starts, 1)
    assert in_order.tolist() == [2**40, 5, 2**40]


@pytest.mark.slow
def test_table_of_more_than_two_to_the_31_rows_trains() -> None:
    num_rows = 2**31 + 10
    if psutil.virtual_memory().available < 8 * 2**30:
        pytest.skip("the table takes 4 GiB")
    rows = Rows(num_rows, 1, SGD(1.0), dtype=torch.bfloat16)
    layout = EmbeddingBags([Table("a", 1, 1)], SGD(1.0)).layout
    layout.num_rows[:] = num_rows
    rows.bags(layout, torch.tensor([num_rows - 1, 3, num_rows - 1])).sum().backward()
    assert float(rows.weight[num_rows - 1]) == -2.0
    assert float(rows.weight[3]) == -1.0
    assert rows.counts.rows_updated == 2
