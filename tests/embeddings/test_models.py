"""Each model against a forward written down in numpy, numerical gradients, and itself over other tables."""

from __future__ import annotations

import gzip
import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitalfew.core import InputError
from vitalfew.embeddings import DLRM, SGD, Adagrad, EmbeddingBags, Prefetch, Table, TieredEmbeddings, TorchBags
from vitalfew.embeddings.metrics import binary_metrics
from vitalfew.embeddings.models import TBSM, ClickModel, DCNv2, DeepFM, WideDeep
from vitalfew.embeddings.settings import Settings, build
from vitalfew.tiers import Dram, File

Refuses = Callable[..., AbstractContextManager[None]]
Make = Callable[..., ClickModel]

DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "recsys"
SAMPLES, HISTORY = 6, 3
MAKES: dict[str, Make] = {
    "dlrm": lambda t, d, g=None: DLRM(t, dense_in=d, bottom=(8, 4), top=(9, 1), generator=g),
    "wide-deep": lambda t, d, g=None: WideDeep(t, dense_in=d, top=(9, 1), generator=g),
    "deepfm": lambda t, d, g=None: DeepFM(t, dense_in=d, top=(9, 1), generator=g),
    "dcn": lambda t, d, g=None: DCNv2(t, dense_in=d, crosses=2, top=(9, 1), generator=g),
    "dcn stacked": lambda t, d, g=None: DCNv2(t, dense_in=d, rank=2, top=(9, 1), structure="stacked", generator=g),
    "dcn crosses": lambda t, d, g=None: DCNv2(t, dense_in=d, crosses=1, top=(1,), structure="stacked", generator=g),
} | {
    f"tbsm {kind}": lambda t, d, g=None, kind=kind: TBSM(
        t, history=HISTORY, dense_in=d, bottom=(8, 4), top=(6, 5), similarity=kind, final=(7, 1), generator=g
    )
    for kind in ("dot", "indefinite", "semidefinite")
}
every = pytest.mark.parametrize("name", MAKES)
dense_or_not = pytest.mark.parametrize("dense_in", [0, 5])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tables() -> list[Table]:
    return [Table("a", 7, 4), Table("b", 20, 4, "mean"), Table("c", 1, 4)]


def inputs(name: str, dense_in: int, *, lists: bool = False, samples: int = SAMPLES) -> tuple[Any, ...]:
    """Return dense inputs, ids and offsets."""
    shape = (samples, HISTORY + 1) if name.startswith("tbsm") else (samples,)
    rng = np.random.default_rng(samples + dense_in)
    dense = torch.from_numpy(rng.standard_normal((*shape, dense_in), dtype=np.float32)) if dense_in else None
    limits = np.resize([7, 20, 1], int(np.prod(shape)) * 3)
    if not lists:
        return dense, torch.from_numpy((rng.random(len(limits)) * limits).astype(np.int64).reshape(*shape, 3)), None
    sizes = rng.integers(0, 4, len(limits))
    ids = (rng.random(sizes.sum()) * np.repeat(limits, sizes)).astype(np.int64)
    return dense, torch.from_numpy(ids), torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))


class Fixed(nn.Module):
    """Tables that return what they are told, so that gradients can be checked in float64."""

    features, dim = ("a", "b", "c"), 4

    def __init__(self) -> None:
        super().__init__()
        self.fields = torch.empty(0)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        return self.fields


def exact(name: str, dense_in: int) -> tuple[ClickModel, Any, torch.Tensor, torch.Tensor]:
    """Return a model in float64 over such tables, and dense inputs, ids and fields for it."""
    model = MAKES[name](Fixed(), dense_in, seeded()).double()
    with torch.no_grad():
        for parameter in model.parameters():  # no weight is zero
            parameter.add_(torch.randn(parameter.shape, generator=seeded(9), dtype=torch.float64), alpha=0.1)
    dense, ids, _ = inputs(name, dense_in, samples=2)
    lines = ids.numel() // 3
    fields = torch.randn(lines, 3, 4, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    return model, None if dense is None else dense.double().requires_grad_(), ids, fields


# -- the forward, by hand


def through(chain: nn.Module, x: np.ndarray, *, last_linear: bool = True) -> np.ndarray:
    found = [layer for layer in chain.modules() if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(found):
        x = x @ layer.weight.detach().numpy().T + (0 if layer.bias is None else layer.bias.detach().numpy())
        if not last_linear or i < len(found) - 1:
            x = np.maximum(x, 0)
    return x


def by_hand(model: ClickModel, dense: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Return the logits, with loops where the model has none."""
    if isinstance(model, TBSM):
        low = [] if model.bottom is None else [through(model.bottom, dense.reshape(len(fields), -1), last_linear=False)]
        every = np.concatenate([*(x[:, None] for x in low), fields], 1)
        dots = [(every[:, i] * every[:, j]).sum(1) for i in range(every.shape[1]) for j in range(i)]
        vectors = through(model.top, np.concatenate([*low, np.stack(dots, 1)], 1))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).reshape(-1, HISTORY + 1, 5)
        metric = np.eye(5) if model.metric is None else model.metric.detach().numpy()
        if model.similarity == "semidefinite":
            metric = metric.T @ metric
        logits = []
        for *before, last in vectors:
            weights = through(model.coefficients, np.array([v @ metric @ last for v in before]))
            context = sum(w * v for w, v in zip(weights, before, strict=True))
            logits.append(through(model.final, np.concatenate([context, last]))[0])
        return np.array(logits)
    if isinstance(model, DCNv2):
        first = x = np.concatenate([dense, fields.reshape(len(fields), -1)], 1)
        for cross in model.crosses:
            x = first * through(cross.full, x if cross.narrow is None else through(cross.narrow, x)) + x
        if model.deep is not None and model.structure == "stacked":
            x = through(model.deep, x, last_linear=False)
        elif model.deep is not None:
            x = np.concatenate([x, through(model.deep, first, last_linear=False)], 1)
        return through(model.last, x)[:, 0]
    logit = fields[:, :, 0].sum(1) + (0 if model.wide is None else dense @ model.wide.detach().numpy())
    factors = fields[:, :, 1:]
    if isinstance(model, DeepFM):
        logit = logit + sum((factors[:, i] * factors[:, j]).sum(1) for i, j in itertools.combinations(range(3), 2))
    return logit + through(model.top, np.concatenate([dense, factors.reshape(len(factors), -1)], 1))[:, 0]


@pytest.mark.parametrize("name", [name for name in MAKES if name != "dlrm"])  # which has a file of its own
@dense_or_not
def test_forward_equals_one_written_by_hand(name: str, dense_in: int) -> None:
    model, dense, ids, fields = exact(name, dense_in)
    model.tables.fields = fields
    found = model(dense, ids).detach().numpy()
    given = np.zeros((*ids.shape[:-1], 0)) if dense is None else dense.detach().numpy()
    np.testing.assert_allclose(found, by_hand(model, given, fields.detach().numpy()), rtol=1e-12, atol=1e-13)
    assert found.shape == (2,)


@every
@dense_or_not
def test_gradients_equal_numerical_ones(name: str, dense_in: int) -> None:
    model, dense, ids, fields = exact(name, dense_in)
    weights = list(model.parameters())

    def run(fields: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        model.tables.fields = fields
        return model(others[0] if dense_in else None, ids)

    given = [fields, *([dense] if dense_in else []), *weights]
    assert torch.autograd.gradcheck(run, given)


@every
@dense_or_not
def test_parameters_are_as_many_as_the_formula_says(name: str, dense_in: int) -> None:
    def chain(*sizes: int) -> int:
        return sum((a + 1) * b for a, b in itertools.pairwise(sizes))

    fields, width = 3 + (dense_in > 0), dense_in + 12
    low = chain(dense_in, 8, 4) if dense_in else 0
    pairs = fields * (fields - 1) // 2 + (4 if dense_in else 0)
    expected = {
        "dlrm": low + chain(pairs, 9, 1),
        "wide-deep": dense_in + chain(dense_in + 9, 9, 1),
        "deepfm": dense_in + chain(dense_in + 9, 9, 1),
        "dcn": 2 * chain(width, width) + chain(width, 9) + chain(width + 9, 1),
        "dcn stacked": 3 * (2 * width + chain(2, width)) + chain(width, 9, 1),
        "dcn crosses": chain(width, width) + chain(width, 1),
    }
    tbsm = low + chain(pairs, 6, 5) + chain(HISTORY, 15, 15, HISTORY) + chain(10, 7, 1)
    expected |= {"tbsm dot": tbsm, "tbsm indefinite": tbsm + 25, "tbsm semidefinite": tbsm + 25}
    model = MAKES[name](EmbeddingBags(tables(), SGD(0.1)), dense_in)
    assert sum(p.numel() for p in model.parameters()) == expected[name]


# -- over tables of any kind


def train(model: ClickModel, optimizers: list[torch.optim.Optimizer], name: str, steps: int, *, lists: bool) -> float:
    label = torch.randint(0, 2, (SAMPLES,), generator=seeded(5)).float()
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(*inputs(name, 5, lists=lists)), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return float(loss.detach())


@every
@pytest.mark.parametrize("lists", [False, True], ids=["one id", "lists"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_training_equals_that_over_plain_tables(name: str, lists: bool) -> None:
    ours = MAKES[name](EmbeddingBags(tables(), Adagrad(0.05), generator=seeded()), 5, seeded(1))
    plain = MAKES[name](TorchBags(tables(), generator=seeded()), 5, seeded(1))
    others = [p for key, p in plain.named_parameters() if not key.startswith("tables.")]
    losses = [
        train(ours, [torch.optim.SGD(ours.parameters(), 0.05)], name, 4, lists=lists),
        train(plain, [torch.optim.SGD(others, 0.05), plain.tables.optimizer(Adagrad(0.05))], name, 4, lists=lists),
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for table, bag in zip(ours.tables.tables, plain.tables.bags, strict=True):
        torch.testing.assert_close(ours.tables.rows_of(table.name), bag.weight.detach(), rtol=1e-4, atol=1e-5)


@every
def test_rows_over_tiers_train_to_the_same_bits(name: str, tmp_path: Path) -> None:
    ours = MAKES[name](EmbeddingBags(tables(), Adagrad(0.05), generator=seeded()), 5, seeded(1))
    with TieredEmbeddings(
        tables(), Adagrad(0.05), tiers=[Dram(26), File(tmp_path / "rows")], generator=seeded()
    ) as tiered:
        over = MAKES[name](tiered, 5, seeded(1))
        for model in (ours, over):
            train(model, [torch.optim.SGD(model.parameters(), 0.05)], name, 3, lists=False)
        for table in ours.tables.tables:
            assert torch.equal(tiered.rows_of(table.name), ours.tables.rows_of(table.name))
    for mine, other in zip(ours.parameters(), over.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_history_is_read_ahead(tmp_path: Path) -> None:
    with TieredEmbeddings(tables(), SGD(0.05), tiers=[Dram(26), File(tmp_path / "rows")]) as tiered:
        model = MAKES["tbsm semidefinite"](tiered, 0)
        batches = [inputs("tbsm", 0)[1] for _ in range(3)]
        with Prefetch(tiered, batches, ids=lambda batch: batch.flatten(0, 1)) as ahead:
            for ids in ahead:
                model(None, ids).sum().backward()
        assert tiered.counts.steps == 3


@every
@pytest.mark.parametrize("lists", [False, True], ids=["one id", "lists"])
@pytest.mark.parametrize("kind", [EmbeddingBags, TorchBags], ids=["ours", "plain"])
def test_no_sample_gives_no_logit(name: str, lists: bool, kind: type) -> None:
    bags = EmbeddingBags(tables(), SGD(0.1)) if kind is EmbeddingBags else TorchBags(tables())
    model = MAKES[name](bags, 5)
    found = model(*inputs(name, 5, lists=lists, samples=0))
    assert found.shape == (0,)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for k, p in model.named_parameters() if not k.startswith("tab"))


@every
def test_every_weight_learns_and_none_is_made_while_running(name: str) -> None:
    model = MAKES[name](EmbeddingBags(tables(), SGD(0.0), generator=seeded()), 5, seeded(1))
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    first, again = (model(*inputs(name, 5)) for _ in range(2))
    assert torch.equal(first, again)
    first.square().sum().backward()
    assert set(before) == {key for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_a_saved_dlrm_has_the_names_it_had() -> None:
    model = MAKES["dlrm"](EmbeddingBags(tables(), SGD(0.1)), 5)
    layers = [f"{part}.{i}.{what}" for part in ("bottom", "top") for i in (0, 2) for what in ("weight", "bias")]
    assert list(model.state_dict()) == ["tables.weight", "tables._extra_state", *layers]


def test_the_history_decides() -> None:
    """The order of the items before the last one matters, and so does each of them."""
    model = MAKES["tbsm semidefinite"](EmbeddingBags(tables(), SGD(0.1), generator=seeded()), 0, seeded(1))
    ids = torch.stack([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8]), torch.zeros(4, dtype=torch.int64)], 1)
    turned, other = ids[[1, 0, 2, 3]], ids.clone()
    other[0, 0] = 6
    found = model(None, torch.stack([ids, turned, other])).detach()
    assert len(found.unique()) == 3


# -- what is refused


@pytest.mark.parametrize(("value", "make"), [
    ("-1", lambda t: WideDeep(t, dense_in=-1)),
    ("(5, 2)", lambda t: WideDeep(t, dense_in=3, top=(5, 2))),
    ("()", lambda t: DeepFM(t, dense_in=3, top=())),
    ("(5, 2)", lambda t: DCNv2(t, dense_in=3, top=(5, 2))),
    ("0", lambda t: DCNv2(t, dense_in=3, crosses=0)),
    ("rank 0", lambda t: DCNv2(t, dense_in=3, rank=0)),
    ("rank 15", lambda t: DCNv2(t, dense_in=3, rank=15)),
    ("'mixed'", lambda t: DCNv2(t, dense_in=3, structure="mixed")),
    ("0", lambda t: TBSM(t, history=0, dense_in=0)),
    ("()", lambda t: TBSM(t, history=2, dense_in=0, top=())),
    ("'cosine'", lambda t: TBSM(t, history=2, dense_in=0, similarity="cosine")),
    ("(60, 2)", lambda t: TBSM(t, history=2, dense_in=0, final=(60, 2))),
    ("(16,)", lambda t: TBSM(t, history=2, dense_in=3)),
])  # fmt: skip
def test_bad_shapes_are_refused(value: str, make: Callable[[Any], ClickModel], refuses: Refuses) -> None:
    with refuses(value):
        make(EmbeddingBags(tables(), SGD(0.1)))


@pytest.mark.parametrize("model", [WideDeep, DeepFM])
def test_rows_without_factors_are_refused(model: type[ClickModel], refuses: Refuses) -> None:
    with refuses("width 1"):
        model(EmbeddingBags([Table("a", 3, 1)], SGD(0.1)), dense_in=0)
    with refuses("width 1"):
        Settings(dim=1, model="deepfm" if model is DeepFM else "wide-deep")


@every
def test_inputs_that_do_not_fit_are_refused(name: str, refuses: Refuses) -> None:
    model = MAKES[name](EmbeddingBags(tables(), SGD(0.1)), 5)
    dense, ids, _ = inputs(name, 5)
    for wrong in (None, dense[..., :4], dense[:, 0], dense[:5]):
        with refuses("None" if wrong is None else str(tuple(wrong.shape))):
            model(wrong, ids)
    with refuses(tuple(ids[..., :2].shape)):
        model(dense, ids[..., :2])


def test_histories_of_another_length_are_refused(refuses: Refuses) -> None:
    model = MAKES["tbsm dot"](EmbeddingBags(tables(), SGD(0.1)), 0)
    with refuses("(6, 3, 3)"):
        model(None, inputs("tbsm", 0)[1][:, 1:])


@every
def test_nan_input_trains_no_row(name: str) -> None:
    bags = EmbeddingBags(tables(), SGD(0.1), generator=seeded())
    model = MAKES[name](bags, 5, seeded(1))
    before = bags.weight.clone()
    dense, ids, _ = inputs(name, 5)
    logits = model(torch.full_like(dense, float("nan")), ids)
    loss = F.binary_cross_entropy_with_logits(logits, torch.ones(SAMPLES))
    with pytest.raises(InputError, match="no row was changed"):
        loss.backward()
    assert torch.equal(bags.weight, before)


# -- by settings


@pytest.mark.parametrize("name", ["dlrm", "dcn", "deepfm", "wide-deep"])
@dense_or_not
def test_settings_build_each_model(name: str, dense_in: int) -> None:
    settings = Settings(dim=4, top=(8,), model=name)
    model = build({"a": 5, "b": 6}, dense_in, settings)
    assert type(model) is {"dlrm": DLRM, "dcn": DCNv2, "deepfm": DeepFM, "wide-deep": WideDeep}[name]
    dense = torch.zeros(3, dense_in) if dense_in else None
    assert model(dense, torch.zeros(3, 2, dtype=torch.int64)).shape == (3,)
    assert Settings.from_dict(settings.to_dict()) == settings


@dense_or_not
def test_items_of_a_history_may_lie_side_by_side(dense_in: int) -> None:
    settings = Settings(dim=4, top=(8,), bottom=(6,), model="tbsm", history=2)
    model = build({"a": 5, "b": 6}, dense_in, settings)
    assert isinstance(model, TBSM)
    assert Settings.from_dict(settings.to_dict()) == settings
    draw = seeded(3)
    ids = torch.randint(0, 5, (7, 3, 2), generator=draw)
    dense = torch.randn(7, 3, dense_in, generator=draw) if dense_in else None
    flat = model(None if dense is None else dense.flatten(1), ids.flatten(1))
    assert torch.equal(model(dense, ids), flat)


def test_settings_of_an_older_run_are_those_of_a_dlrm() -> None:
    old = {key: value for key, value in Settings().to_dict().items() if key not in ("model", "history")}
    assert Settings.from_dict(old).model == "dlrm"


def test_settings_that_no_model_can_keep_are_refused(refuses: Refuses) -> None:
    with refuses("'gbdt'"):
        Settings(model="gbdt")
    with refuses("(8,)"):
        Settings(bottom=(8,), model="dcn")
    with refuses("got 0"):
        Settings(model="tbsm")
    with refuses("one of 3"):
        Settings(history=3)


# -- on real logs


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"no log at {DATA / name}: set VITALFEW_DATA")
    return DATA / name


def frappe(part: str) -> tuple[np.ndarray, torch.Tensor]:
    with gzip.open(real(f"frappe/{part}.libfm.gz"), "rt") as file:
        rows = [line.split() for line in file]
    ids = np.array([[int(cell.partition(":")[0]) for cell in row[1:]] for row in rows], np.int64)
    return np.array([row[0] == "1" for row in rows], np.float32), torch.from_numpy(ids)


def fit(model: ClickModel, ids: torch.Tensor, label: np.ndarray, *, epochs: int, batch: int, lr: float) -> None:
    dense, y, order = torch.optim.Adagrad(model.parameters(), lr=lr), torch.from_numpy(label), seeded(3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(batch):
            dense.zero_grad()
            F.binary_cross_entropy_with_logits(model(None, ids[rows]), y[rows]).backward()
            dense.step()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dlrm", "dcn", "deepfm", "wide-deep"])
def test_models_learn_frappe(name: str) -> None:
    """Trained on the validation part, since the training part is not there."""
    (label, ids), (test_label, test_ids) = frappe("validation"), frappe("test")
    rows = int(max(ids.max(), test_ids.max())) + 1
    bags = EmbeddingBags(
        [Table("all", rows, 16, features=tuple(f"f{i}" for i in range(10)))], Adagrad(0.05), generator=seeded()
    )
    model = {
        "dlrm": lambda: DLRM(bags, dense_in=0, top=(64, 1), generator=seeded(1)),
        "dcn": lambda: DCNv2(bags, dense_in=0, crosses=2, top=(64, 1), structure="stacked", generator=seeded(1)),
        "deepfm": lambda: DeepFM(bags, dense_in=0, top=(64, 1), generator=seeded(1)),
        "wide-deep": lambda: WideDeep(bags, dense_in=0, top=(64, 1), generator=seeded(1)),
    }[name]()
    fit(model, ids, label, epochs=3, batch=512, lr=0.05)
    with torch.no_grad():
        auc = binary_metrics(test_label, model(None, test_ids).numpy()).auc
    print(f"Frappe, {name}: AUC {auc:.4f}")
    assert auc >= 0.93


@pytest.mark.data
@pytest.mark.slow
def test_histories_tell_the_next_item_from_another_as_popular() -> None:
    """Video games: the last item of each user, held out, against one drawn as often as items are bought."""
    with gzip.open(real("video-games/Video.txt.gz"), "rt") as file:
        user, item = np.loadtxt(file, dtype=np.int64).T
    history, draw = 8, np.random.default_rng(0)
    end = np.flatnonzero(np.append(user[1:] != user[:-1], True)) + 1
    start = np.append(0, end[:-1])
    place = np.arange(len(user)) - np.repeat(start, end - start)
    last = np.zeros(len(user), bool)
    last[end - 1] = True
    bought = item[~last]

    def pairs(positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Return each history twice, with the true item and with another; in front, missing ones are 0."""
        back = np.arange(history, -1, -1)
        true = np.where(place[positions, None] >= back, item[positions[:, None] - back], 0)
        other = true.copy()
        other[:, -1] = draw.choice(bought, len(other))
        label = np.repeat(np.array([1, 0], np.float32), len(true))
        return torch.from_numpy(np.concatenate([true, other]))[:, :, None].expand(-1, -1, 6).contiguous(), label

    ids, label = pairs(np.flatnonzero(~last & (place >= 3)))
    test_ids, test_label = pairs(np.flatnonzero(last & (place >= 4)))
    # Six rows for an item: all that a vector knows of it are the products of its rows.
    bags = EmbeddingBags([Table(f"item{i}", item.max() + 1, 8) for i in range(6)], Adagrad(0.05), generator=seeded())
    model = TBSM(bags, history=history, dense_in=0, top=(32, 16), similarity="dot", generator=seeded())
    fit(model, ids, label, epochs=3, batch=1024, lr=0.02)
    with torch.no_grad():
        auc = binary_metrics(test_label, model(None, test_ids).numpy()).auc
    counts = np.log1p(np.bincount(bought, minlength=item.max() + 1)).astype(np.float32)
    popular = binary_metrics(test_label, counts[test_ids[:, -1, 0]]).auc
    print(f"Video games: AUC {auc:.4f}, by popularity {popular:.4f}")
    assert auc > max(popular, 0.5) + 0.05
