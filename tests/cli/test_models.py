"""Other models through the command: train, go on, predict, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vitalfew.data import Encoded, Histories, open_log
from vitalfew.embeddings.jobs import load_model
from vitalfew.embeddings.models import MODELS

from .conftest import Cli, clicks

FLAGS = ("--label", "click", "--time", "ts", "--batch-size", 64, "--top", 8, "--dim", 4, "--pairs", 0)


def own_scores(run: Path, log: Path) -> tuple[np.ndarray[Any, Any], list[torch.Tensor]]:
    """Return the scores of a loaded model, and its inputs."""
    model, encoder, _ = load_model(run)
    rows = encoder.encode(next(encoder.batches(open_log(log), labels=False)), labels=False)
    arrays = [rows.dense, rows.ids, *([] if rows.offsets is None else [rows.offsets])]
    inputs = [torch.from_numpy(array) for array in arrays]
    with torch.no_grad():
        return torch.sigmoid(model(*inputs)).numpy(), inputs


@pytest.mark.parametrize("name", ["dcn", "deepfm", "wide-deep"])
def test_each_model_trains_predicts_and_is_exported(cli: Cli, log: Path, tmp_path: Path, name: str) -> None:
    result = cli("train", log, *FLAGS, "--model", name, "--out", "a")
    assert result.code == 0, result.err
    assert isinstance(load_model(tmp_path / "a")[0], MODELS[name])
    assert cli("predict", "a", log, "--out", "scores.parquet").code == 0
    expected, inputs = own_scores(tmp_path / "a", log)
    found = np.asarray(pq.read_table(tmp_path / "scores.parquet")["score"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    result = cli("export", "a", "--out", "model.pt2")
    assert (result.code, result.out) == (0, ""), result.err
    logits = torch.export.load(tmp_path / "model.pt2").module()(*inputs)
    np.testing.assert_allclose(torch.sigmoid(logits).numpy(), expected, atol=1e-6)


TBSM = ("--model", "tbsm", "--by", "user", "--history", 5, "--bottom", 6)


def test_a_model_of_histories_trains_goes_on_predicts_and_is_exported(cli: Cli, log: Path, tmp_path: Path) -> None:
    result = cli("train", log, *FLAGS, *TBSM, "--pairs", 1, "--trial-steps", 4, "--tolerance", 0.9, "--out", "a")
    assert result.code == 0, result.err
    assert cli("predict", "a", log, "--out", "scores.parquet").code == 0
    model, encoder, _ = load_model(tmp_path / "a")
    rows = encoder.encode(next(encoder.batches(open_log(log))))
    histories = Histories(encoder, "user", 5)
    trained = histories.widen(rows)  # what happened, which is the history of what is asked now
    asked = histories.widen(Encoded(rows.dense, rows.ids))
    with torch.no_grad():
        expected = torch.sigmoid(model(torch.from_numpy(asked.dense), torch.from_numpy(asked.ids))).numpy()
    found = np.asarray(pq.read_table(tmp_path / "scores.parquet")["score"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.array_equal(asked.ids, trained.ids)
    assert cli("export", "a", "--out", "model.pt2").code == 0
    shaped = torch.from_numpy(asked.dense).view(-1, 6, 1), torch.from_numpy(asked.ids).view(-1, 6, 2)
    logits = torch.export.load(tmp_path / "model.pt2").module()(*shaped)
    np.testing.assert_allclose(torch.sigmoid(logits).numpy(), expected, atol=1e-6)

    assert cli("train", log, *FLAGS, *TBSM, "--out", "b").code == 0
    weights = tmp_path / "b" / "model" / "weights.safetensors"
    assert weights.read_bytes() == (tmp_path / "a" / "model" / "weights.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "b" / "model")
    (tmp_path / "b" / "receipt.json").unlink()
    result = cli("train", "--out", "b", "--resume")
    assert result.code == 0, result.err
    assert weights.read_bytes() == (tmp_path / "a" / "model" / "weights.safetensors").read_bytes()


def test_histories_that_cannot_be_are_refused(refused: Any, log: Path, tmp_path: Path) -> None:
    asked = ("train", log, *FLAGS, "--out", "a")
    assert refused(*asked, "--by", "user") == "--by says nothing without --model"
    assert refused(*asked, "--model", "tbsm") == "tbsm reads histories of users, and no column names these"
    assert refused(*asked, *TBSM[:-4], "--history", 0) == "tbsm reads a history of 1 or more, got 0"
    assert refused(*asked, *TBSM, "--method", "auto") == "tbsm trains with fused rows in memory, got --method auto"
    assert refused(*asked, *TBSM, "--memory", "1MiB") == "tbsm trains with fused rows in memory, got --memory"
    assert refused(*asked, *TBSM, "--by", "nobody") == "there is no feature `nobody`"
    assert refused("look", log, "--label", "click", "--model", "tbsm").startswith("look foretells models of one row")
    pq.write_table(pq.read_table(log).sort_by([("ts", "descending")]), tmp_path / "clicks.parquet")
    assert refused(*asked, *TBSM) == "the log is not in the order of time: 1198 comes after 1199"


def test_lists_and_rows_on_disk_are_exported(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    columns = clicks()
    columns["tags"] = [[f"t{t}" for t in rng.integers(0, 20, rng.integers(0, 4))] for _ in columns["click"]]
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    result = cli("train", "log.parquet", *FLAGS, "--memory", "16MiB", "--out", "a")
    assert result.code == 0, result.err
    result = cli("export", "a", "--out", "model.pt2", "--format", "json")
    assert result.json() == {"features": ["user", "item", "tags"], "dense": ["price"], "out": "model.pt2"}
    assert cli("predict", "a", "log.parquet", "--out", "scores.parquet").code == 0
    _, encoder, _ = load_model(tmp_path / "a")
    rows = encoder.encode(next(encoder.batches(open_log(tmp_path / "log.parquet"), labels=False)), labels=False)
    assert rows.offsets is not None
    program = torch.export.load(tmp_path / "model.pt2").module()
    logits = program(*map(torch.from_numpy, (rows.dense, rows.ids, rows.offsets)))
    found = np.asarray(pq.read_table(tmp_path / "scores.parquet")["score"])
    np.testing.assert_allclose(torch.sigmoid(logits).numpy(), found, atol=1e-6)


def test_a_cut_off_run_goes_on_with_its_model(cli: Cli, log: Path, tmp_path: Path) -> None:
    for folder in "ab":
        assert cli("train", log, *FLAGS, "--model", "dcn", "--out", folder).code == 0
    (tmp_path / "b" / "receipt.json").unlink()
    weights = tmp_path / "b" / "model" / "weights.safetensors"
    whole = weights.read_bytes()
    for part in (tmp_path / "b" / "model").iterdir():
        part.unlink()
    (tmp_path / "b" / "model").rmdir()
    result = cli("train", "--out", "b", "--resume")
    assert result.code == 0, result.err
    assert weights.read_bytes() == whole
    assert whole == (tmp_path / "a" / "model" / "weights.safetensors").read_bytes()


def test_a_run_from_before_there_were_other_models_is_read(cli: Cli, log: Path, tmp_path: Path) -> None:
    assert cli("train", log, *FLAGS, "--out", "a").code == 0
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    settings = next(part["settings"] for part in (about, about.get("body", {})) if "settings" in part)
    del settings["model"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(about))
    assert cli("predict", "a", log, "--out", "scores.parquet").code == 0


def test_look_foretells_for_a_model(cli: Cli, log: Path) -> None:
    result = cli("look", log, "--label", "click", "--model", "dcn", "--format", "json")
    assert result.json()["settings"]["model"] == "dcn"


def test_what_no_model_has_is_refused(refused: Any, log: Path) -> None:
    assert refused("train", log, *FLAGS, "--model", "gbdt", "--out", "a") == "there is no model 'gbdt'"
    wrong = ("--model", "dcn", "--bottom", "8")
    assert refused("train", log, *FLAGS, *wrong, "--out", "a") == "dcn has no bottom layers to make (8,)"
    assert refused("export", "nowhere", "--out", "model.pt2") == "nowhere holds no trained model"
