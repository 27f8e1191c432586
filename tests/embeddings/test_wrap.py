"""A wrapped model learns as it did, keeps its face, and gets its own modules back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from vitalfew.core import InputError
from vitalfew.embeddings import SGD, Adagrad, LazyAdam, Optimizer, RowwiseAdagrad, wrap

Refuses = Callable[..., AbstractContextManager[None]]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


class Tower(nn.Module):
    """Every way a model may hold embeddings: nested, padded, pooled, shared, of several widths."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.user = nn.Embedding(12, 4, sparse=sparse)
        self.item = nn.Embedding(9, 4, padding_idx=2, sparse=sparse)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Embedding(7, 3, sparse=sparse), nn.Flatten())])
        self.sums = nn.EmbeddingBag(11, 4, mode="sum", include_last_offset=True, sparse=sparse)
        self.means = nn.EmbeddingBag(11, 4, mode="mean", padding_idx=-1, sparse=sparse)
        self.twin = nn.Embedding(12, 4, sparse=sparse)
        self.twin.weight = self.user.weight
        self.same = self.item
        self.frozen = nn.Embedding.from_pretrained(torch.ones(3, 4))
        self.out = nn.Linear(5 * 4 + 2 * 3 + 4, 1)

    def forward(self, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)

        def ids(limit: int, *shape: int) -> torch.Tensor:
            return torch.randint(0, limit, shape, generator=draw)

        offsets = torch.tensor([0, 2, 2, 5, 6, 9])
        parts = [
            self.user(ids(12, 5)) + self.twin(ids(12, 5)),
            self.item(ids(9, 5, 3)).sum(1) + self.same(ids(9, 5)),
            self.blocks[0](ids(7, 5, 2)),
            self.sums(ids(11, 9), offsets, torch.randn(9, generator=draw)),
            self.means(ids(11, 9), offsets[:-1].clone()),
            self.means(ids(11, 5, 4)),
            self.frozen(ids(3, 5)),
        ]
        return self.out(torch.cat(parts, 1)).squeeze(1)


def model(*, sparse: bool = False) -> Tower:
    torch.manual_seed(0)
    return Tower(sparse=sparse)


def fit(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> list[float]:
    losses = []
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (net(step % 3) - torch.linspace(-1, 1, 5)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def plain_optimizer(rule: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if isinstance(rule, SGD):
        return torch.optim.SGD(parameters, lr=rule.lr)
    if isinstance(rule, Adagrad):
        return torch.optim.Adagrad(parameters, lr=rule.lr)
    return torch.optim.SparseAdam(parameters, lr=rule.lr)


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("rule", [SGD(0.05), Adagrad(0.1), LazyAdam(0.01)], ids=lambda r: r.name)
def test_losses_are_those_of_the_plain_model(rule: Optimizer, update: str) -> None:
    plain, ours = model(sparse=isinstance(rule, LazyAdam)), model()
    tables = [p for name, p in plain.named_parameters() if "out" not in name and p.requires_grad]
    expected = fit(plain, [plain_optimizer(rule, tables), torch.optim.SGD(plain.out.parameters(), lr=0.01)], range(20))
    dense = torch.optim.SGD(ours.out.parameters(), lr=0.01)
    with wrap(ours, rule, update=update) as few:
        assert few.names == ("user", "item", "blocks.0.0", "sums", "means", "twin", "same")
        found = fit(ours, [dense, few] if update == "step" else [dense], range(20))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert expected[-1] < expected[0]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_padding_row_keeps_its_value_and_its_place_in_the_output() -> None:
    layer = nn.ModuleList([nn.Embedding(5, 2, padding_idx=1), nn.EmbeddingBag(5, 2, mode="mean", padding_idx=1)])
    with torch.no_grad():
        layer[0].weight[1] = 7.0
    before = [each.weight.clone() for each in layer]
    expected = [layer[0](torch.tensor([1, 2])), layer[1](torch.tensor([[1, 2], [1, 1]]))]
    with wrap(layer, SGD(1.0)):
        found = [layer[0](torch.tensor([1, 2])), layer[1](torch.tensor([[1, 2], [1, 1]]))]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        sum(each.sum() for each in found).backward()
    for each, start in zip(layer, before, strict=True):
        assert torch.equal(each.weight[1], start[1])
        assert not torch.equal(each.weight[2], start[2])


@pytest.mark.parametrize("fail", [False, True])
def test_undo_gives_back_the_same_modules_with_the_trained_rows(fail: bool) -> None:
    net = model()
    modules, parameters = dict(net.named_modules(remove_duplicate=False)), dict(net.named_parameters())
    keys = {name: value.shape for name, value in net.state_dict().items()}
    start = copy.deepcopy(net.state_dict())
    try:
        with wrap(net, SGD(0.1)) as few:
            assert {name: value.shape for name, value in net.state_dict().items()} == keys
            assert net.same is net.item
            assert [name for name, _ in net.named_parameters()] == ["frozen.weight", "out.weight", "out.bias"]
            fit(net, [], range(3))
            net.eval()
            trained = copy.deepcopy(net.state_dict())
            if fail:
                raise KeyError("of the user")
    except KeyError:
        assert fail
    few.undo()  # twice does nothing
    assert dict(net.named_modules(remove_duplicate=False)) == modules
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert not any(module.training for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, trained[name])
    assert not torch.equal(start["user.weight"], net.user.weight)
    assert net.twin.weight is net.user.weight
    fit(net, [torch.optim.SGD(net.parameters(), lr=0.1)], range(2))


def test_only_the_named_modules_are_replaced() -> None:
    net = model()
    few = wrap(net, SGD(0.1), only=["blocks.0.0", "sums"])
    assert few.names == ("blocks.0.0", "sums")
    assert type(net.user) is nn.Embedding
    few.undo()
    assert type(net.sums) is nn.EmbeddingBag


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    return net


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 3))
    net[0].register_forward_hook(lambda module, args, out: out * 2)
    return net


def _weight_hooked() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 3))
    net[0].weight.register_hook(lambda grad: grad * 2)
    return net


def _computed() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 3))
    nn.utils.parametrizations.weight_norm(net[0])
    return net


def _shared() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Embedding(5, 3))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(("value", "make", "only"), [
    ("`0` is also `1.weight`", _tied, None),
    ("`0` is also `1.weight`", _shared, ["0"]),
    ("max_norm=1.0", lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), None),
    ("scale_grad_by_freq=True", lambda: nn.Sequential(nn.EmbeddingBag(5, 3, scale_grad_by_freq=True)), None),
    ("max", lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="max")), None),
    ("float64", lambda: nn.Sequential(nn.Embedding(5, 3)).double(), None),
    ("meta", lambda: nn.Sequential(nn.Embedding(5, 3, device="meta")), None),
    ("no trainable", lambda: nn.Sequential(nn.Linear(5, 3)), None),
    ("no trainable", lambda: nn.Sequential(nn.Embedding.from_pretrained(torch.ones(3, 4))), None),
    ("no trainable", lambda: nn.Embedding(5, 3), None),
    ("`items`", lambda: nn.Sequential(nn.Embedding(5, 3)), ["0", "items"]),
    ("`0` has a forward of its own", lambda: nn.Sequential(Scaled(5, 3)), None),
    ("`0` carries hooks", _hooked, None),
    ("`0` carries hooks", _weight_hooked, None),
    ("`0`", _computed, None),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_and_the_model_left(
    value: str, make: Callable[[], nn.Module], only: list[str] | None, refuses: Refuses
) -> None:
    net = make()
    before = list(net.modules())
    with refuses(value):
        wrap(net, SGD(0.1), only=only)
    assert list(net.modules()) == before


def test_subclass_without_a_forward_of_its_own_is_wrapped() -> None:
    class Named(nn.Embedding):
        pass

    net = nn.Sequential(Named(5, 3))
    with wrap(net, SGD(0.1)):
        net(torch.tensor([1])).sum().backward()
    assert type(net[0]) is Named


def test_wrapping_twice_is_refused(refuses: Refuses) -> None:
    net = model()
    with wrap(net, SGD(0.1)), refuses("no trainable"):
        wrap(net, SGD(0.1))


@pytest.mark.parametrize(("value", "arguments"), [
    ("need offsets", (torch.tensor([1, 2]),)),
    ("have no offsets", (torch.tensor([[1, 2]]), torch.tensor([0]))),
    ("3 dimensions", (torch.tensor([[[1]]]), torch.tensor([0]))),
    ("offsets", (torch.tensor([1, 2]), torch.tensor([0, 3]))),
    ("offsets", (torch.tensor([1, 2]), torch.tensor([0, -1]))),
    ("offsets", (torch.tensor([1, 2]), torch.tensor([1]))),
    ("offsets must be integers", (torch.tensor([1, 2]), torch.tensor([0.0]))),
    ("(3,)", (torch.tensor([1, 2]), torch.tensor([0]), torch.ones(3))),
    ("id 5", (torch.tensor([[1, 5]]),)),
    ("float32", (torch.tensor([[1.0, 2.0]]),)),
])  # fmt: skip
@pytest.mark.parametrize("padding", [None, 0])
def test_bad_calls_are_refused(
    value: str, arguments: tuple[torch.Tensor, ...], padding: int | None, refuses: Refuses
) -> None:
    net = nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum", padding_idx=padding))
    with wrap(net, SGD(0.1)) as few:
        with refuses(value):
            net[0](*arguments)
        assert few.counts.lookups == 0


def test_weights_with_means_are_refused(refuses: Refuses) -> None:
    net = nn.Sequential(nn.EmbeddingBag(5, 3, mode="mean"))
    with wrap(net, SGD(0.1)), refuses("'mean'"):
        net[0](torch.tensor([[1]]), None, torch.ones(1, 1))


def test_shapes_without_ids_match_pytorch() -> None:
    net = nn.ModuleList([nn.Embedding(5, 3), nn.EmbeddingBag(5, 3, mode="sum")])
    none = torch.zeros(0, dtype=torch.int64)
    expected = [net[0](torch.tensor(2)), net[0](none), net[0](none.reshape(0, 4)), net[1](none, torch.tensor([0, 0]))]
    with wrap(net, SGD(0.1)):
        found = [net[0](torch.tensor(2)), net[0](none), net[0](none.reshape(0, 4)), net[1](none, torch.tensor([0, 0]))]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert net[1](none.reshape(4, 0)).shape == (4, 3)
        sum(each.sum() for each in found).backward()


def test_gradients_of_sample_weights_equal_pytorch() -> None:
    net = nn.Sequential(nn.EmbeddingBag(6, 3, mode="sum", padding_idx=1))
    plain = copy.deepcopy(net)
    ids = torch.tensor([[1, 2, 3], [4, 1, 1]])
    target = torch.randn(2, 3)
    grads = []
    with wrap(net, SGD(0.1)):
        for each in (net, plain):
            weights = torch.full((2, 3), 0.5, requires_grad=True)
            (each[0](ids, None, weights) * target).sum().backward()
            grads.append(weights.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("rule", [SGD(0.05), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.01)], ids=lambda r: r.name)
def test_resumed_training_equals_uninterrupted(rule: Optimizer) -> None:
    whole, part = model(), model()
    few, half = wrap(whole, rule), wrap(part, rule)
    fit(whole, [], range(6))
    fit(part, [], range(3))
    file = io.BytesIO()
    torch.save({"model": part.state_dict(), "rows": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(9)
    other = Tower()
    resumed = wrap(other, type(rule)(3.0))
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["rows"])
    assert resumed.lr == rule.lr
    fit(other, [], range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for mine, theirs in zip(few.state_dict()["state"], resumed.state_dict()["state"], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_plain_checkpoint_fits_both_ways() -> None:
    net, other = model(), model()
    few = wrap(net, SGD(0.1))
    fit(net, [], range(2))
    other.load_state_dict(net.state_dict())
    fresh = model()
    again = wrap(fresh, SGD(0.1))
    fresh.load_state_dict(other.state_dict())
    fit(net, [], range(2, 4))
    fit(fresh, [], range(2, 4))
    few.undo()
    again.undo()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_state_that_does_not_fit_is_refused(refuses: Refuses) -> None:
    net = model()
    few = wrap(net, Adagrad(0.1))
    state = few.state_dict()
    with refuses("lazy_adam"):
        wrap(model(), LazyAdam(0.1)).load_state_dict(state)
    with refuses("1"):
        wrap(nn.Sequential(nn.Embedding(5, 4)), Adagrad(0.1)).load_state_dict(state)
    with refuses("assign=True"):
        net.load_state_dict(net.state_dict(), assign=True)
    for cast in (net.double, net.half, lambda: net.to("meta")):
        with pytest.raises(InputError):
            cast()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies_of_a_wrapped_model_train_on_their_own(how: str) -> None:
    net = model()
    few = wrap(net, Adagrad(0.1))
    fit(net, [], range(2))
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(other, [], range(2, 4))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    fit(net, [], range(2, 4))
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    few.undo()


def test_counts_and_receipt_are_those_of_an_independent_count() -> None:
    net = nn.Sequential(nn.Embedding(50, 4), nn.Flatten())
    batches = [torch.randint(0, 50, (6, 2), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with wrap(net, SGD(0.1)) as few:
        for ids in batches:
            net(ids).sum().backward()
        counts = few.counts
        receipt = few.receipt()
    assert counts.lookups == sum(ids.numel() for ids in batches)
    assert counts.rows_updated == sum(len(ids.unique()) for ids in batches)
    assert counts.steps == 4
    assert receipt.lines[0].before == 200
    assert receipt.lines[0].after == counts.rows_updated
    assert receipt.lines[1].before == 50 * 4 * 4


def test_rate_and_mode_go_through() -> None:
    net = model().eval()
    with wrap(net, SGD(0.1)) as few:
        assert not net.user.training
        few.lr = 0.0
        before = {name: value.clone() for name, value in net.state_dict().items()}
        fit(net, [], range(2))
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert few.lr == 0.0


def test_dropping_what_waits() -> None:
    net = model()
    start = copy.deepcopy(net.state_dict())
    few = wrap(net, SGD(0.1), update="step")
    net(0).sum().backward()
    few.zero_grad()
    few.step()
    few.undo()
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
