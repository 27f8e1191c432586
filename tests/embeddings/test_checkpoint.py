"""Checkpoints: what goes in comes out, and what is not whole is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitalfew.core import InputError
from vitalfew.data import Encoded
from vitalfew.embeddings.checkpoint import about_weights, load_newest, load_weights, save_checkpoint, save_model
from vitalfew.embeddings.fitting import train_step
from vitalfew.embeddings.models import DLRM
from vitalfew.embeddings.settings import Settings, build, dense_optimizer

SMALL = Settings(dim=4, bottom=(8,), top=(8,))
ROWS = {"user": 20, "item": 30}


def batch(seed: int) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    return Encoded(
        torch.randn(16, 2, generator=generator).numpy(),
        torch.randint(0, 20, (16, 2), generator=generator).numpy(),
        label=torch.randint(0, 2, (16,), generator=generator).float().numpy(),
    )


def trained(settings: Settings = SMALL, steps: int = 3) -> tuple[DLRM, torch.optim.Optimizer]:
    model = build(ROWS, 2, settings)
    optimizer = dense_optimizer(model, settings)
    for step in range(steps):
        train_step(model, [optimizer], batch(step))
    return model, optimizer


def same(a: DLRM, b: DLRM) -> bool:
    mine, yours = a.state_dict(), b.state_dict()
    return all(
        torch.equal(mine[k], yours[k]) if isinstance(mine[k], torch.Tensor) else mine[k] == yours[k] for k in mine
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_a_checkpoint_brings_back_everything(tmp_path: Path, optimizer: str) -> None:
    settings = Settings(dim=4, bottom=(8,), top=(8,), optimizer=optimizer, storage="bfloat16")
    model, dense = trained(settings)
    save_checkpoint(tmp_path, model, dense, 3, {"step": 3})
    other, other_dense = trained(settings, steps=1)
    assert not same(model, other)
    assert load_newest(tmp_path, other, other_dense) == ({"step": 3}, ())
    assert same(model, other)
    for step in (3, 4):
        train_step(model, [dense], batch(step))
        train_step(other, [other_dense], batch(step))
    assert same(model, other)


def test_the_newest_two_are_kept_and_the_disk_never_holds_more(tmp_path: Path) -> None:
    model, dense = trained()
    for step in range(1, 5):
        save_checkpoint(tmp_path, model, dense, step, {"step": step})
        assert len(list(tmp_path.iterdir())) <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000003", "checkpoint-000000004"]


def test_nothing_there(tmp_path: Path) -> None:
    assert load_newest(tmp_path, *trained()) == (None, ())


def test_damage_is_found_removed_and_gone_around(tmp_path: Path) -> None:
    model, dense = trained()
    for step in (1, 2):
        save_checkpoint(tmp_path, model, dense, step, {"step": step})
    (tmp_path / "checkpoint-000000002" / "weights.json").write_text("{")
    assert load_newest(tmp_path, *trained()) == ({"step": 1}, ("checkpoint-000000002",))
    assert not (tmp_path / "checkpoint-000000002").exists()
    (tmp_path / "checkpoint-000000001" / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot be read .*; to train from the first step again, remove"):
        load_newest(tmp_path, *trained())
    assert (tmp_path / "checkpoint-000000001").exists()


def test_a_model_is_for_predictions(tmp_path: Path) -> None:
    model, _ = trained()
    save_model(tmp_path / "model", model, {"note": "ours"})
    assert about_weights(tmp_path / "model") == {"note": "ours"}
    other = build(ROWS, 2, Settings(dim=4, bottom=(8,), top=(8,), optimizer="sgd"))
    assert load_weights(tmp_path / "model", other) == {"note": "ours"}
    assert torch.equal(other.tables.rows.weight, model.tables.rows.weight)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="exists already"):
        save_model(tmp_path / "model", model)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, dense = trained()
    save_checkpoint(tmp_path, model, dense, 1, {"step": 1})
    folder = tmp_path / "checkpoint-000000001"
    wider = Settings(dim=8, bottom=(8,), top=(8,))
    with pytest.raises(InputError, match="does not fit the model"):
        load_weights(folder, build(ROWS, 2, wider))
    deeper = Settings(dim=4, bottom=(8, 8), top=(8,))
    with pytest.raises(InputError, match="lacks the weights 'bottom"):
        load_weights(folder, build(ROWS, 2, deeper))
    adam = Settings(dim=4, bottom=(8,), top=(8,), optimizer="adam")
    with pytest.raises(InputError, match="lacks the weights"):
        load_weights(folder, *trained(adam))
    with pytest.raises(InputError, match="holds the tables"):
        load_weights(folder, build({"item": 30, "user": 20}, 2, SMALL), dense)
