"""The kernels for GPUs give the bits of the CPU's plain twins.

Without a CUDA device the Triton kernels run in Triton's interpreter, and are compiled for one all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, LazyAdam, RowwiseAdagrad, Table
from vitalfew.embeddings import _kernels_reference as reference
from vitalfew.embeddings import _kernels_torch as plain
from vitalfew.embeddings.optim import Optimizer

CUDA = torch.cuda.is_available()
if not CUDA and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

RUNS = [
    ("torch", "cpu"),
    ("triton", "cpu"),
    pytest.param(("torch", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
]
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = ["one", "sum", "mean", "weighted"]
RULES = [
    SGD(0.1),
    SGD(0.1, weight_decay=0.01),
    RowwiseAdagrad(0.1, weight_decay=0.01, eps=1e-3),
    Adagrad(0.1),
    Adagrad(0.1, weight_decay=0.01),
    LazyAdam(0.01),
    LazyAdam(0.01, weight_decay=0.01, beta1=0.0),
]


@pytest.fixture(params=RUNS, ids="-".join, scope="module")
def run(request: pytest.FixtureRequest) -> tuple[ModuleType, torch.device]:
    name, device = request.param
    if device == "cuda" and not CUDA:
        pytest.skip("no CUDA device")
    if name == "torch":
        return plain, torch.device(device)
    pytest.importorskip("triton", reason="triton is not installed")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter was not asked for before triton was imported")
    from vitalfew.embeddings import _kernels_triton

    return _kernels_triton, torch.device(device)


class Case:
    """Rows spread over a larger slab, and bags of lookups into them."""

    def __init__(self, seed: int, dtype: torch.dtype, rule: Optimizer, *, bags: str, device: torch.device) -> None:
        self.rng = np.random.default_rng(seed)
        self.device, self.dtype, self.rule = device, dtype, rule
        rows, self.dim = int(self.rng.integers(1, 12)), int(self.rng.choice([1, 3, 8, 33]))
        self.slot_of = self.rng.permutation(rows + 5)[:rows]
        start = torch.from_numpy(self.rng.standard_normal((rows, self.dim)).astype(np.float32)).to(dtype)
        self.expected = start.numpy() if dtype == torch.float32 else start.view(torch.int16).numpy().view(np.uint16)
        self.weight = torch.zeros(rows + 5, self.dim, dtype=dtype, device=device)
        self.weight[self.on(self.slot_of)] = start.to(device)
        self.wide = [torch.zeros(rows + 5, self.dim, device=device) for _ in range(rule.wide_states)]
        self.narrow = [torch.zeros(rows + 5, 1, device=device) for _ in range(rule.row_states)]
        self.stats = torch.zeros(rows + 5, 2, dtype=torch.int32, device=device)
        self.state = {f"wide{i}": np.zeros((rows, self.dim), np.float32) for i in range(rule.wide_states)}
        self.state |= {f"narrow{i}": np.zeros((rows, 1), np.float32) for i in range(rule.row_states)}
        sizes = self.rng.integers(0, 7, int(self.rng.integers(0, 9))) if bags != "one" else np.ones(11, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.ids = self.rng.integers(0, rows, sizes.sum())
        self.scales = self.rng.standard_normal(len(self.ids)).astype(np.float32) if bags == "weighted" else None
        # In the twin the bags take turns among the features; with a feature per bag each has a flag of its own.
        self.mean = self.rng.random(len(sizes)) < 0.5 if bags == "mean" else np.zeros(len(sizes), np.bool_)

    def on(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    @property
    def names(self) -> torch.Tensor:
        return self.on(self.ids)

    @property
    def slots(self) -> torch.Tensor:
        return self.on(self.slot_of[self.ids])

    def lookups(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales = None if self.scales is None else self.on(self.scales)
        mean = self.on(self.mean) if self.mean.any() else None
        return plain.spread(self.on(self.offsets), scales, mean, len(self.ids))

    def check(self, got: torch.Tensor, expected: np.ndarray, *, exact: bool = True) -> None:
        mine = got[self.on(self.slot_of)].float().cpu().numpy()
        if expected.dtype == np.uint16:
            expected = reference.widen(expected.reshape(-1), STORAGE[self.dtype]).reshape(mine.shape)
        np.testing.assert_allclose(mine, expected, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@given(seed=st.integers(0, 2**32), rule=st.sampled_from(RULES), bags=st.sampled_from(KINDS))
@settings(max_examples=12)
def test_kernels_equal_the_plain_twins(
    run: tuple[ModuleType, torch.device], dtype: torch.dtype, seed: int, rule: Optimizer, bags: str
) -> None:
    kernels, device = run
    case = Case(seed, dtype, rule, bags=bags, device=device)
    storage, base = STORAGE[dtype], np.zeros(max(1, len(case.mean)), np.int64)
    mean = case.mean if len(case.mean) else np.zeros(1, np.bool_)
    bag_of, scale_of = case.lookups()
    # The kernel sums the squares of a row in another order than the twin; all else is the same to the bit.
    exact = kernels is plain or not isinstance(rule, RowwiseAdagrad)
    if not exact and dtype != torch.float32:
        return  # one bit of a state may push a rounding over; a test below compares the state alone
    seen = [(0, 0)] * len(case.slot_of)
    for step in (1, 2):
        pooled, rows, bag, scale = reference.pool(
            case.expected, storage, case.ids, case.offsets, case.scales, mean, base
        )
        if step == 1 or exact:
            out = torch.full(pooled.shape, torch.nan, device=device)
            kernels.pool(case.weight, case.slots, case.on(case.offsets), scale_of, out)
            np.testing.assert_array_equal(out.cpu().numpy(), pooled)
        grad = case.rng.standard_normal(pooled.shape).astype(np.float32)
        total = reference.gradients(rows, bag, scale, grad, 0.3)
        norm = kernels.squared_norm(case.slots, bag_of, scale_of, case.on(grad), 0.3)
        assert float(norm) == pytest.approx(reference.squared_norm(total), rel=1e-12)
        reference.update(rule, case.expected, storage, case.state, total, step=step, seed=seed)
        touched = kernels.update(
            rule.kind, case.weight, case.wide, case.narrow, case.slots, bag_of, scale_of, case.on(grad),
            (*rule.scalars(step), rule.weight_decay), names=case.names, grad_scale=0.3,
            dice=seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95, stats=case.stats, step=step,
        )  # fmt: skip
        assert int(touched) == len(total)
        for row, slot in enumerate(case.slot_of.tolist()):
            times, last = seen[row] = (seen[row][0] + 1, step) if row in total else seen[row]
            assert case.stats[slot].tolist() == [times, last]
        case.check(case.weight, case.expected, exact=exact)
        for name, tensor in zip(case.state, [*case.wide, *case.narrow], strict=True):
            case.check(tensor, case.state[name], exact=exact)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_rowwise_state_of_16_bit_rows(run: tuple[ModuleType, torch.device], dtype: torch.dtype) -> None:
    kernels, device = run
    rule = RowwiseAdagrad(0.1)
    case = Case(3, dtype, rule, bags="one", device=device)
    grad = case.rng.standard_normal((len(case.ids), case.dim)).astype(np.float32)
    one = np.ones(len(case.ids), np.float32)
    total = reference.gradients(case.ids, np.arange(len(case.ids)), one, grad)
    reference.update(rule, case.expected, STORAGE[dtype], case.state, total, step=1)
    rates = (*rule.scalars(1), 0.0)
    kernels.update(
        rule.kind, case.weight, case.wide, case.narrow, case.slots, None, None, case.on(grad), rates, names=case.names
    )
    case.check(case.narrow[0], case.state["narrow0"], exact=False)


def test_gather_and_gradients_of_scales(run: tuple[ModuleType, torch.device]) -> None:
    kernels, device = run
    for dtype in STORAGE:
        case = Case(5, dtype, SGD(0.1), bags="weighted", device=device)
        out = torch.empty(len(case.ids), case.dim, device=device)
        kernels.gather(case.weight, case.slots, out)
        assert torch.equal(out, case.weight[case.slots].float())
        bag_of, _ = case.lookups()
        grad = case.on(case.rng.standard_normal((len(case.offsets) - 1, case.dim)).astype(np.float32))
        divisor = torch.full((len(case.ids),), 3.0, device=device)
        got = kernels.scale_gradients(case.weight, case.slots, bag_of, divisor, grad)
        torch.testing.assert_close(got, (out * grad[bag_of]).sum(1) / 3, rtol=1e-5, atol=1e-6)
        alone = kernels.scale_gradients(case.weight, case.slots, None, None, out)
        torch.testing.assert_close(alone, out.square().sum(1), rtol=1e-5, atol=1e-6)


def test_nothing_to_do_is_done(run: tuple[ModuleType, torch.device]) -> None:
    kernels, device = run
    weight, none = torch.ones(3, 4, device=device), torch.empty(0, dtype=torch.int64, device=device)
    grad = torch.empty(0, 4, device=device)
    kernels.gather(weight, none, grad)
    kernels.pool(weight, none, none.new_zeros(1), None, grad)
    assert int(kernels.update(0, weight, [], [], none, None, None, grad, (0.1, 0, 0, 0, 0))) == 0
    assert float(kernels.squared_norm(none, None, None, grad)) == 0
    assert len(kernels.scale_gradients(weight, none, None, None, grad)) == 0
    assert bool((weight == 1).all())


@pytest.mark.parametrize("rule", [SGD(0.1), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.01)], ids=lambda r: r.name)
def test_training_equals_the_tables_on_the_cpu(run: tuple[ModuleType, torch.device], rule: Optimizer) -> None:
    """Three steps of both, from the same rows: the CPU kernels find rows by hashing, these by sorting."""
    kernels, device = run
    tables = EmbeddingBags([Table("a", 7, 8), Table("b", 5, 8)], rule, generator=torch.Generator().manual_seed(1))
    weight = tables.rows.weight.clone().to(device)
    wide = [torch.zeros(12, 8, device=device) for _ in range(rule.wide_states)]
    narrow = [torch.zeros(12, 1, device=device) for _ in range(rule.row_states)]
    draw = torch.Generator().manual_seed(2)
    for step in (1, 2, 3):
        ids = torch.stack([torch.randint(0, n, (9,), generator=draw) for n in (7, 5)], dim=1)
        out = tables(ids)
        slots = (ids + torch.tensor([0, 7])).reshape(-1).to(device)
        mine = torch.empty(18, 8, device=device)
        kernels.gather(weight, slots, mine)
        grad = torch.randn(out.shape, generator=draw)
        out.backward(grad)
        rates = (*rule.scalars(step), rule.weight_decay)
        kernels.update(rule.kind, weight, wide, narrow, slots, None, None, grad.reshape(-1, 8).to(device), rates)
    if kernels is plain or rule.kind != RowwiseAdagrad.kind:
        assert torch.equal(weight.cpu(), tables.rows.weight)
    torch.testing.assert_close(weight.cpu(), tables.rows.weight, rtol=1e-6, atol=1e-7)


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vitalfew.embeddings import _kernels_triton as kernels

def build(kernel, types, constants):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    code = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options=options).asm
    assert "cubin" in code
    assert not re.search(r"\\b(fma\\.rn|atom\\.|red\\.|div\\.full|sqrt\\.approx)|\\.ftz", code["ptx"])
    print(kernel.__name__)

i, f = "*i64", "*fp32"
shape = {"DIM": 33, "BLOCK": 64}
rates = dict.fromkeys(("rate", "eps", "rest1", "rest2", "decay", "grad_scale"), "fp32")
pointers = {"slots": i, "ends": i, "names": i, "bags": i, "scales": f, "grad": f}
sums = shape | {"AHEAD": 4, "SCALED": True}
for kind, stored in enumerate(("*fp32", "*fp32", "*bf16", "*fp16")):
    state = {"weight": stored, "wide1": f, "wide2": f, "narrow": f, "stats": "*i32", "dice": "i64", "step": "i32"}
    build(kernels._update, pointers | rates | state, sums | {"KIND": kind, "DECAY": True, "STATS": True})
rows = {"weight": "*bf16", "slots": i, "out": f}
build(kernels._gather, rows | {"num": "i32"}, shape | {"ROWS": 16})
build(kernels._pool, rows | {"offsets": i, "scales": f}, sums)
build(kernels._scale_gradient, rows | {"bags": i, "grad": f, "num": "i32"}, shape | {"BAGS": True, "ROWS": 16})
build(kernels._square, pointers | {"grad_scale": "fp32", "out": "*fp64"}, sums)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_fused_or_unordered_arithmetic(tmp_path: os.PathLike[str]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    (tmp_path / "build.py").write_text(COMPILE)  # Triton reads the source of its kernels from files
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "build.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 8
