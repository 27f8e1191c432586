"""Training, cut off and resumed, in every setting; and what the receipt then says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vitalfew.core import InputError, Receipt
from vitalfew.data import EncodedLog
from vitalfew.embeddings import account, jobs
from vitalfew.embeddings.fitting import evaluate, predict
from vitalfew.embeddings.metrics import binary_metrics
from vitalfew.embeddings.options import LogOptions
from vitalfew.embeddings.preparing import check_memory
from vitalfew.embeddings.settings import Settings
from vitalfew.embeddings.tiering import Tiering

OPTIONS = LogOptions("click", time="ts")
SMALL = Settings(dim=4, bottom=(8,), top=(8,), batch_size=64, epochs=3)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    rows = 700
    user = rng.zipf(1.5, rows) % 100
    columns = {
        "ts": np.arange(rows),
        "click": (((user % 3 == 0) * 0.5 + rng.random(rows)) > 0.8).astype(np.int64),
        "user": user,
        "tags": [list(rng.integers(0, 20, rng.integers(0, 4))) for _ in range(rows)],
        "price": rng.normal(size=rows),
    }
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no memory: each measurement starts a process."""
    monkeypatch.setattr(account, "peak_memory", lambda *args, plain, **rest: 300 if plain else 100)


def stop_at(share: float, stage: str = "train") -> Callable[[str, float], None]:
    def progress(now: str, done: float) -> None:
        if now == stage and done >= share:
            raise KeyboardInterrupt

    return progress


def weights(run: Path) -> bytes:
    return (run / "model" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    "storage",
    ["bfloat16", pytest.param("float32", marks=pytest.mark.slow), pytest.param("float16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_resumed_equals_uninterrupted(log: str, tmp_path: Path, optimizer: str, storage: str) -> None:
    settings = dataclasses.replace(SMALL, optimizer=optimizer, storage=storage, batch_size=160, epochs=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    jobs.train_log(log, OPTIONS, settings, whole, pairs=0)
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(log, OPTIONS, settings, cut, pairs=0, checkpoint_seconds=0, progress=stop_at(0.3))
    with pytest.raises(KeyboardInterrupt):
        jobs.resume_log(cut, checkpoint_seconds=0, progress=stop_at(0.8))
    receipt = jobs.resume_log(cut)
    assert weights(cut) == weights(whole)
    assert "resumed at step 6 of 8; the times count the last sitting only" in receipt.notes
    assert receipt.to_dict() == Receipt.load(cut / "receipt.json").to_dict()


def test_stopped_between_the_last_step_and_the_model(log: str, tmp_path: Path) -> None:
    """Rows over a disk are committed then, and the next sitting has no step left to do."""
    tiers = Tiering("8MiB")
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=0, tiers=tiers, progress=stop_at(0.0, "test"))
    receipt = jobs.resume_log(tmp_path / "a")
    whole = jobs.train_log(log, OPTIONS, SMALL, tmp_path / "b", pairs=0, tiers=tiers)
    quality = [[line.after for line in each.lines if "AUC" in line.what] for each in (receipt, whole)]
    assert quality[0] == quality[1] != []
    assert any("resumed at step 27 of 27" in note for note in receipt.notes)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.filterwarnings("error")
def test_every_optimizer_is_compared(log: str, tmp_path: Path, optimizer: str) -> None:
    settings = dataclasses.replace(SMALL, optimizer=optimizer)
    receipt = jobs.train_log(log, OPTIONS, settings, tmp_path / "a", pairs=2, trial_steps=3)
    assert len(receipt.pairs) == 2
    assert receipt.rule.startswith("At equal work")
    assert [quality.metric for quality in receipt.quality] == ["AUC", "log loss", "calibration error"]
    # The same rule gives the same quality, up to the order of sums; another rule is named.
    same = all(abs(pair.base_quality - pair.few_quality) < 1e-3 for pair in receipt.pairs)
    assert same or optimizer == "rowwise_adagrad"
    assert any("rows by adagrad" in note for note in receipt.notes) == (optimizer == "rowwise_adagrad")
    lines = {line.what: line for line in receipt.lines}
    assert lines["peak memory"].ratio == 3
    assert lines["whole run, rows trained"].after == 3 * 560
    assert lines["table rows written"].after


def test_no_pairs_and_one_pair_are_undecided(log: str, tmp_path: Path) -> None:
    receipt = jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=0)
    assert (receipt.verdict, receipt.pairs_needed) == ("undecided", None)
    receipt = jobs.train_log(log, OPTIONS, SMALL, tmp_path / "b", pairs=1, trial_steps=2)
    assert (receipt.verdict, receipt.pairs_needed) == ("undecided", 2)


def test_memory_that_could_not_be_measured_is_said(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "peak_memory", lambda *args, plain, **rest: None if plain else 100)
    receipt = jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=1, trial_steps=2)
    assert "peak memory" not in [line.what for line in receipt.lines]
    assert any(note.startswith("peak memory was not measured") for note in receipt.notes)


def test_stopped_in_the_comparison(log: str, tmp_path: Path) -> None:
    """The model is finished and can be used; resuming makes the comparison alone, by the rule of the beginning."""
    run = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(
            log, OPTIONS, SMALL, run, pairs=2, trial_steps=4, tolerance=0.25, progress=stop_at(0.5, "compare")
        )
    before = weights(run)
    model, encoder, about = jobs.load_model(run)
    assert about["settings"]["dim"] == 4
    assert encoder.schema.label == "click"
    assert not model.tables.rows.state  # type: ignore[attr-defined]
    stages: set[str] = set()
    receipt = jobs.resume_log(run, progress=lambda stage, share: stages.add(stage))
    assert stages == {"compare"}
    assert weights(run) == before
    assert len(receipt.pairs) == 2
    assert "less than 0.25" in receipt.rule


def test_the_account_is_of_the_saved_model(log: str, tmp_path: Path) -> None:
    """AUC, log loss and calibration on the receipt are those of the model in the folder, on the rows held back."""
    run = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(log, OPTIONS, SMALL, run, pairs=1, trial_steps=1, progress=stop_at(0, "compare"))
    test = EncodedLog.open(run / "data" / "test")
    model, _, _ = jobs.load_model(run)
    block = test.block(0, len(test))
    assert block.label is not None
    assert evaluate(model, test) == binary_metrics(block.label, predict(model, [block]))
    lines = {line.what: line.after for line in jobs.resume_log(run).lines}
    from sklearn.metrics import roc_auc_score

    assert lines["whole run, AUC"] == pytest.approx(roc_auc_score(block.label, predict(model, [block])), abs=1e-9)


def test_threads_are_those_of_the_beginning_and_given_back(log: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen = set()
    try:
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt):
            jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=0, progress=stop_at(0.5))
        torch.set_num_threads(2)
        jobs.resume_log(tmp_path / "a", progress=lambda stage, share: seen.add((stage, torch.get_num_threads())))
        assert ("train", 1) in seen
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_prediction_needs_a_model(log: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=0, progress=stop_at(0.5))
    with pytest.raises(InputError, match="holds no trained model; finish it with --resume"):
        jobs.predict_log(tmp_path / "a", log, tmp_path / "scores.csv")


def test_memory_counts_weights_state_and_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    settings = Settings(dim=16, optimizer="adam", storage="bfloat16")
    rows = {"user": 600, "item": 400}
    ours, plain = 1000 * (2 * 16 + 8 * 16), 1000 * (4 * 16 + 8 * 16)
    for free, compared, refused in (
        (ours - 1, False, "160 B, the most for `user`"),
        (ours, False, None),
        (ours + plain - 1, True, "more to compare with plain PyTorch"),
        (ours + plain, True, None),
    ):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda free=free: type("M", (), {"available": free, "total": 2**40})
        )
        if refused is None:
            check_memory(rows, settings, compared=compared)
        else:
            with pytest.raises(InputError, match=refused):
                check_memory(rows, settings, compared=compared)
