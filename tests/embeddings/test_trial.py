"""The paired trial compares like with like: the same start, the same rows in the same order, taking turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vitalfew.core import Rule
from vitalfew.data import Encoded, EncodedLog, Encoder, infer_schema, open_log, write_log
from vitalfew.embeddings import course, peak, trial
from vitalfew.embeddings.payoff import predict_payoff
from vitalfew.embeddings.peak import peak_memory
from vitalfew.embeddings.settings import Settings, build_arm
from vitalfew.embeddings.trial import paired_trial

SMALL = Settings(dim=4, bottom=(8,), top=(8,), batch_size=32)
RULE = Rule("equal work", tolerance=0.01)

Logs = tuple[EncodedLog, EncodedLog, dict[str, int]]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    rows = [f"{int(rng.random() < 0.3 + 0.4 * (u % 2))},u{u},i{rng.integers(20)},{rng.random()}" for u in
            rng.integers(0, 30, 600)]  # fmt: skip
    (folder / "log.csv").write_text("\n".join(["click,user,item,price", *rows]))
    reader = open_log(folder / "log.csv")
    encoder = Encoder.fit(reader, infer_schema(reader, label="click"), test_share=0.2)
    train, test = write_log(folder / "encoded", reader, encoder)
    return train, test, encoder.num_rows


def test_two_equal_arms_have_equal_quality(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain PyTorch in both arms every figure of quality is the same bit for bit."""
    monkeypatch.setattr(trial, "build_arm", lambda *args, plain, **rest: build_arm(*args, plain=True))
    found = paired_trial(*logs, SMALL, RULE, pairs=2)
    for base, few in zip(found.runs["base"], found.runs["few"], strict=True):
        assert base.metrics == few.metrics
    assert found.runs["base"][0].metrics != found.runs["base"][1].metrics  # other seeds, other runs
    assert found.comparison.quality.difference == 0


def test_both_arms_see_the_same_rows_and_take_turns(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []
    step = course.train_step

    def watched(model: Any, optimizers: Any, batch: Encoded) -> Any:
        seen.append((type(model.tables).__name__, batch.ids.tobytes()))
        return step(model, optimizers, batch)

    monkeypatch.setattr(trial, "_warm_up", lambda *args: None)
    monkeypatch.setattr(course, "train_step", watched)
    steps: list[int] = []
    found = paired_trial(*logs, SMALL, RULE, pairs=1, max_steps=11, progress=steps.append)
    ours = [ids for name, ids in seen if name == "EmbeddingBags"]
    assert [ids for name, ids in seen if name == "TorchBags"] == ours
    assert len(ours) == found.steps == 11
    assert [name for name, _ in seen] == ["TorchBags"] * 8 + ["EmbeddingBags"] * 8 + ["TorchBags"] * 3 + [
        "EmbeddingBags"
    ] * 3
    assert steps == [8, 8, 3, 3]


def test_the_account(logs: Logs) -> None:
    train, _, num_rows = logs
    found = paired_trial(*logs, SMALL, RULE, pairs=2)
    assert found.steps == -(-len(train) // 32)
    lines = {line.what: line for line in found.lines()}
    assert lines["training time"].how == "measured"
    assert lines["sparse gradient built"].before == 32 * 2 * (4 * 4 + 8)
    assert lines["sparse gradient built"].after == 0
    written = lines["table rows written"].after
    assert written
    assert found.steps < written <= found.steps * sum(num_rows.values())
    auc, log_loss, calibration = found.qualities()
    assert auc.metric == "AUC"
    assert log_loss.before > 0
    assert calibration.before >= 0
    for quality in (log_loss, calibration):
        assert quality.difference == pytest.approx(quality.after - quality.before)
        assert quality.low is not None
        assert quality.high is not None
        assert quality.low <= quality.difference <= quality.high


def test_the_payoff_is_positive(logs: Logs) -> None:
    _, _, num_rows = logs
    counts = {name: np.arange(rows).astype(np.uint64) for name, rows in num_rows.items()}
    counts["user"][:] = 0  # a table nobody looks up
    payoff = predict_payoff(num_rows, counts, 1, SMALL, max_rows=10)
    assert payoff.plain > 0
    assert payoff.ours > 0
    assert payoff.ratio == payoff.plain / payoff.ours
    assert payoff.lookups == 20  # no batch is larger than the log
    assert 2 <= payoff.distinct <= 20


def test_the_payoff_of_tables_larger_than_the_sample() -> None:
    counts = {"user": np.ones(300_000, np.uint64)}
    payoff = predict_payoff({"user": 300_000, "hashed": 2**40}, counts, 1, SMALL, steps=2)
    assert payoff.distinct <= payoff.lookups == 64


def test_peak_memory_is_that_of_another_process(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _, num_rows = logs
    assert 2**24 < (peak_memory(train.folder, num_rows, SMALL, plain=True) or 0) < 2**40
    monkeypatch.setattr(peak, "_CHILD", "import os; os.abort()")
    assert peak_memory(train.folder, num_rows, SMALL, plain=False) is None
