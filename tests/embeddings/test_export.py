"""An exported model gives the same logits in a process that has never heard of this library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitalfew.embeddings import DLRM, SGD, Adagrad, EmbeddingBags, Table, TieredEmbeddings, TorchBags, exporting
from vitalfew.embeddings.exporting import export_model
from vitalfew.embeddings.models import MODELS, TBSM, ClickModel
from vitalfew.tiers import Dram, File

Refuses = Callable[..., AbstractContextManager[None]]

TABLES = [Table("a", 7, 4), Table("b", 20, 4, "mean"), Table("c", 1, 4)]
HISTORY = 3
_RUN = """
import sys, numpy, torch
for folder in sys.argv[1:]:
    program = torch.export.load(folder + "/model.pt2").module()
    given = numpy.load(folder + "/inputs.npz")
    for turn in range(3):
        names = [f"{name}{turn}" for name in ("dense", "ids", "offsets") if f"{name}{turn}" in given]
        logits = program(*(torch.from_numpy(given[name]) for name in names))
        assert not logits.requires_grad
        numpy.save(f"{folder}/logits{turn}.npy", logits.numpy())
assert not any(name.startswith("vitalfew") for name in sys.modules)
"""


def make(name: str, tables: Any, dense_in: int) -> ClickModel:
    draw = torch.Generator().manual_seed(1)
    if name == "tbsm":
        return TBSM(tables, history=HISTORY, dense_in=dense_in, bottom=(8, 4), generator=draw)
    layers = {"bottom": (8, 4)} if name in ("dlrm", "adrec") else {}
    return MODELS[name](tables, dense_in=dense_in, top=(9, 1), generator=draw, **layers)


def inputs(name: str, samples: int, dense_in: int, *, lists: bool) -> dict[str, torch.Tensor]:
    shape = (samples, HISTORY + 1) if name == "tbsm" else (samples,)
    rng = np.random.default_rng(samples)
    given = {"dense": rng.standard_normal((*shape, dense_in), dtype=np.float32)}
    limits = np.resize([7, 20, 1], int(np.prod(shape)) * 3)
    if lists:
        sizes = rng.integers(0, 4, len(limits))
        given["ids"] = (rng.random(sizes.sum()) * np.repeat(limits, sizes)).astype(np.int64)
        given["offsets"] = np.concatenate([[0], np.cumsum(sizes)])
    else:
        given["ids"] = (rng.random(len(limits)) * limits).astype(np.int64).reshape(*shape, 3)
    return {key: torch.from_numpy(value) for key, value in given.items()}


def own(model: ClickModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given)


def elsewhere(*folders: Path) -> None:
    subprocess.run([sys.executable, "-c", _RUN, *map(str, folders)], check=True)


@pytest.mark.parametrize(("lists", "dense_in"), [(False, 5), (True, 0)], ids=["one id", "lists"])
def test_the_same_logits_without_this_library(lists: bool, dense_in: int, tmp_path: Path) -> None:
    expected: dict[Path, list[torch.Tensor]] = {}
    for name in (*MODELS, "tbsm"):
        folder = tmp_path / name
        model = make(name, EmbeddingBags(TABLES, SGD(0.1)), dense_in)
        export_model(model, folder / "model.pt2", lists=lists)
        turns = [inputs(name, samples, dense_in, lists=lists) for samples in (1, 7, 0)]
        arrays = {f"{key}{i}": value.numpy() for i, turn in enumerate(turns) for key, value in turn.items()}
        np.savez(folder / "inputs.npz", **arrays)
        expected[folder] = [own(model, turn) for turn in turns]
        assert model.training
    elsewhere(*expected)
    for folder, logits in expected.items():
        for turn, mine in enumerate(logits):
            np.testing.assert_allclose(np.load(folder / f"logits{turn}.npy"), mine.numpy(), rtol=1e-6, atol=1e-6)


def run(file: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.export.load(file).module()(*given.values())


def test_tables_of_other_kinds(tmp_path: Path) -> None:
    given = inputs("dlrm", 5, 5, lists=False)
    with TieredEmbeddings(TABLES, Adagrad(0.1), tiers=[Dram(26), File(tmp_path / "rows")]) as tiered:
        model = make("dlrm", tiered, 5)
        model(**given).sum().backward()  # some rows have changed, others have not begun
        export_model(model, tmp_path / "tiered.pt2")
        torch.testing.assert_close(run(tmp_path / "tiered.pt2", given), own(model, given), rtol=0, atol=1e-6)
    for name, tables in {
        "plain": TorchBags(TABLES),
        "half": EmbeddingBags(TABLES, SGD(0.1), dtype=torch.bfloat16),
        "shared": EmbeddingBags([Table("x", 20, 4, features=("a", "b")), Table("c", 1, 4)], SGD(0.1)),
    }.items():
        model = make("dlrm", tables, 5)
        given["ids"][:, 0] %= 7
        export_model(model, tmp_path / f"{name}.pt2")
        torch.testing.assert_close(run(tmp_path / f"{name}.pt2", given), own(model, given), rtol=0, atol=1e-6)


def test_an_id_outside_its_table_finds_no_other_row(tmp_path: Path) -> None:
    export_model(make("dcn", EmbeddingBags(TABLES, SGD(0.1)), 0), tmp_path / "model.pt2")
    for bad in ([[7, 0, 0]], [[0, 0, 1]], [[-1, 0, 0]]):
        with pytest.raises(RuntimeError, match="outside its table"):
            run(tmp_path / "model.pt2", {"dense": torch.zeros(1, 0), "ids": torch.tensor(bad)})


def test_offsets_that_do_not_rise_move_no_id_to_another_bag(tmp_path: Path) -> None:
    export_model(make("dcn", EmbeddingBags(TABLES, SGD(0.1)), 0), tmp_path / "model.pt2", lists=True)
    given = {"dense": torch.zeros(1, 0), "ids": torch.zeros(3, dtype=torch.int64)}
    for bad in ([0, 2, 1, 3], [0, 1, 2, 2], [1, 1, 2, 3], [0, 1, 2, 4]):
        with pytest.raises(RuntimeError, match="offsets do not rise"):
            run(tmp_path / "model.pt2", given | {"offsets": torch.tensor(bad)})
    run(tmp_path / "model.pt2", given | {"offsets": torch.tensor([0, 0, 3, 3])})


def test_the_file_names_its_features(tmp_path: Path) -> None:
    export_model(make("dcn", EmbeddingBags(TABLES, SGD(0.1)), 2), tmp_path / "model.pt2")
    extra = {"vitalfew.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["vitalfew.json"]) == {
        "features": ["a", "b", "c"], "num_rows": [7, 20, 1], "dense_in": 2, "lists": False,
    }  # fmt: skip


def test_what_cannot_be_exported_is_refused(tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("dlrm", EmbeddingBags(TABLES, SGD(0.1), update="step"), 5)
    with refuses(".onnx"):
        export_model(model, tmp_path / "model.onnx")
    model(**inputs("dlrm", 2, 5, lists=False)).sum().backward()
    with refuses("gradients wait"):
        export_model(model, tmp_path / "model.pt2")

    class Other(torch.nn.Module):
        features, dim = ("a", "b"), 4

    with refuses("Other"):
        export_model(DLRM(Other(), dense_in=0, top=(1,)), tmp_path / "model.pt2")
    monkeypatch.setattr(exporting, "free_memory", lambda: 3 * 28 * 16 - 1)
    with refuses("28 rows"):
        export_model(make("dlrm", EmbeddingBags(TABLES, SGD(0.1)), 5), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
