"""Metrics against scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from vitalfew.embeddings import binary_metrics

Refuses = Callable[..., AbstractContextManager[None]]


@given(
    st.lists(st.tuples(st.booleans(), st.floats(-15, 15, width=32)), min_size=2, max_size=60).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_metrics_equal_scikit_learns(rows: list[tuple[bool, float]]) -> None:
    label, logit = np.array([r[0] for r in rows], np.float32), np.array([r[1] for r in rows])
    chance = 1 / (1 + np.exp(-logit))
    found = binary_metrics(label, logit)
    assert found.auc == pytest.approx(roc_auc_score(label, logit), abs=1e-12)
    assert found.log_loss == pytest.approx(log_loss(label, chance), rel=1e-6, abs=1e-9)
    assert found.calibration == pytest.approx(chance.sum() / label.sum(), rel=1e-6)
    assert found.num_rows == len(rows)


def test_ties_count_half_and_many_rows_keep_precision() -> None:
    rng = np.random.default_rng(0)
    logit = rng.integers(-3, 4, 200_000).astype(np.float32)
    label = rng.random(200_000) < 1 / (1 + np.exp(-logit))
    assert binary_metrics(label, logit).auc == pytest.approx(roc_auc_score(label, logit), abs=1e-12)
    assert binary_metrics([0, 1, 0, 1], [1.0, 1.0, 1.0, 1.0]).auc == 0.5


def test_extreme_logits_stay_finite() -> None:
    found = binary_metrics([1, 0], [-1e30, 1e30])
    assert found.auc == 0
    assert found.log_loss == pytest.approx(1e30, rel=1e-6)


@pytest.mark.parametrize(("value", "label", "logit"), [
    ("all 2 labels are 1", [1, 1], [0.0, 1.0]),
    ("all 3 labels are 0", [0, 0, 0], [0.0, 1.0, 2.0]),
    ("logit 1 is NaN", [0, 1], [0.0, float("nan")]),
    ("logit 0 is inf", [0, 1], [float("inf"), 1.0]),
    ("label 1 is 2", [0, 2, 1], [0.0, 1.0, 2.0]),
    ("label 0 is nan", [float("nan"), 1], [0.0, 1.0]),
    ("label 0 is -1", [-1, 1], [0.0, 1.0]),
    ("2 labels came with 1", [0, 1], [0.0]),
    ("0 labels", [], []),
])  # fmt: skip
def test_what_has_no_answer_is_refused(value: str, label: list[float], logit: list[float], refuses: Refuses) -> None:
    with refuses(value):
        binary_metrics(label, logit)
