"""Methods in a whole run: cut off and resumed, composed, chosen by trial; and what the receipt then says."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vitalfew.core import InputError, Rule, judge
from vitalfew.core.receipt import Pair, Receipt
from vitalfew.data.encoded import Encoded
from vitalfew.embeddings import account, auto, jobs, tiering
from vitalfew.embeddings.course import Course, MemorySource
from vitalfew.embeddings.fitting import train_step
from vitalfew.embeddings.options import LogOptions, silent
from vitalfew.embeddings.packing import pack, unpack
from vitalfew.embeddings.preparing import prepare
from vitalfew.embeddings.settings import Settings, build_arm
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiering import Tiering
from vitalfew.embeddings.way import Way, way_named

OPTIONS = LogOptions("click", time="ts")
SMALL = Settings(dim=4, bottom=(8,), top=(8,), batch_size=64, epochs=40, lr=0.05)
WAYS = ("hot-rows", "skip-rows", "skip-inputs", "hot-rows+skip-rows", "hot-rows+skip-inputs")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    rows = 700
    user = rng.zipf(1.5, rows) % 100
    columns = {
        "ts": np.arange(rows),
        "click": (((user % 3 == 0) * 0.5 + rng.random(rows)) > 0.8).astype(np.int64),
        "user": user,
        "shop": rng.zipf(2.0, rows) % 10,
        "price": rng.normal(size=rows),
    }
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no memory: each measurement starts a process."""
    monkeypatch.setattr(account, "peak_memory", lambda *args, plain, **rest: 300 if plain else 100)


def stop_after(share: float) -> Any:
    def progress(stage: str, done: float) -> None:
        if stage == "train" and done >= share:
            raise KeyboardInterrupt

    return progress


def weights(run: Path) -> dict[str, torch.Tensor]:
    model, *_ = jobs.load_model(run)
    found = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    if isinstance(model.tables, TieredEmbeddings):
        found |= {table.name: model.tables.rows_of(table.name) for table in model.tables.tables}
        model.tables.close()
    return found


@pytest.mark.parametrize("tiers", [None, Tiering("90%")], ids=["memory", "tiers"])
@pytest.mark.parametrize("method", WAYS)
def test_resumed_equals_uninterrupted(log: str, tmp_path: Path, method: str, tiers: Tiering | None) -> None:
    def train(out: str, **rest: Any) -> Receipt:
        return jobs.train_log(log, OPTIONS, SMALL, tmp_path / out, pairs=0, tiers=tiers, method=method, **rest)

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("a", checkpoint_seconds=0, progress=stop_after(0.4))
    with pytest.raises(KeyboardInterrupt):
        jobs.resume_log(tmp_path / "a", checkpoint_seconds=0, progress=stop_after(0.83))
    resumed = jobs.resume_log(tmp_path / "a")
    mine, theirs = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert any(note.startswith("resumed at step") for note in resumed.notes)
    assert all(part in whole.method for part in method.split("+"))
    if "skip" in method:
        what = "updates of rows" if "rows" in method.partition("skip")[2] else "inputs trained"
        saved = next(line for line in whole.lines if line.what == what)
        assert saved.before is not None
        assert saved.after is not None
        assert saved.before > saved.after, "the test says nothing where nothing is skipped"


def test_stopped_between_the_last_step_and_the_model(log: str, tmp_path: Path) -> None:
    """The bias is corrected once, also where the run was over and only the model was not yet written."""
    tiers, method = Tiering("90%"), "skip-inputs"

    def stop(stage: str, done: float) -> None:
        if stage == "test":
            raise KeyboardInterrupt

    jobs.train_log(log, OPTIONS, SMALL, tmp_path / "whole", pairs=0, tiers=tiers, method=method)
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=0, tiers=tiers, method=method, progress=stop)
    receipt = jobs.resume_log(tmp_path / "a")
    assert "inputs trained" in {line.what for line in receipt.lines}
    mine, theirs = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def samples(count: int = 300) -> Encoded:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.zipf(1.5, count) % 40, rng.zipf(1.3, count) % 60], axis=1).astype(np.int64)
    label = (rng.random(count) < 0.3).astype(np.float32)
    return Encoded(rng.normal(size=(count, 1)).astype(np.float32), ids, label=label)


def run(way: str, data: Encoded, **rest: Any) -> tuple[dict[str, torch.Tensor], Course]:
    settings = dataclasses.replace(SMALL, epochs=1, batch_size=32)
    named = way_named(way)
    model, optimizers = build_arm({"user": 40, "shop": 60}, 1, settings, plain=not named.fused, **rest)
    course = Course(named, model, optimizers, MemorySource(data, 32, 0), epochs=3)
    assert sum(course) <= course.total
    return {name: v for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}, course


@pytest.mark.parametrize("way", WAYS)
def test_cut_off_after_any_step(way: str) -> None:
    """Also at the end of a phase, where samples may wait and the loss is not told yet."""
    data, settings = samples(), dataclasses.replace(SMALL, batch_size=32)

    def begin(state: Any = None) -> tuple[Any, Any, Course]:
        model, optimizers = build_arm({"user": 40, "shop": 60}, 1, settings, plain=False)
        course = Course(way_named(way), model, optimizers, MemorySource(data, 32, 0), epochs=40, state=state)
        return model, optimizers[0], course

    model, optimizer, course = begin()
    cuts = []
    for _ in course:
        if 340 <= course.steps < 362:
            plain, tensors = pack(course.state_dict())
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), plain, tensors))
            cuts.append((course.steps, saved))
    whole = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert len(cuts) == 22
    for step, (weights, dense, plain, tensors) in cuts:
        model, optimizer, resumed = begin(unpack(plain, tensors))
        model.load_state_dict(weights)
        optimizer.load_state_dict(dense)
        assert resumed.steps == step
        for _ in resumed:
            pass
        assert (resumed.steps, resumed.samples) == (course.steps, course.samples), step
        assert all(torch.equal(model.state_dict()[name], whole[name]) for name in whole), step


def test_without_methods_it_is_the_plain_loop() -> None:
    data = samples()
    found, course = run("fused", data)
    settings = dataclasses.replace(SMALL, epochs=1, batch_size=32)
    model, optimizers = build_arm({"user": 40, "shop": 60}, 1, settings, plain=False)
    source = MemorySource(data, 32, 0)
    for epoch in range(3):
        for batch in source.epoch(epoch):
            train_step(model, optimizers, batch)
    assert all(torch.equal(found[n], v) for n, v in model.state_dict().items() if isinstance(v, torch.Tensor))
    assert (course.steps, course.samples, course.total) == (30, 900, 900)


@pytest.mark.parametrize("way", ["skip-rows", "skip-inputs"])
def test_where_nothing_is_stale_nothing_changes(way: str) -> None:
    plain, _ = run("fused", samples())
    found, course = run(way, samples())
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert course.samples == course.total
    assert way in course.receipts


def test_every_sample_once_with_hot_rows() -> None:
    _, course = run("hot-rows", samples(301))
    assert course.samples == course.total == 903


def test_split_batches_over_tiers(log: str, tmp_path: Path) -> None:
    receipt = jobs.train_log(
        log, OPTIONS, dataclasses.replace(SMALL, epochs=2), tmp_path / "a", pairs=0, tiers=Tiering("90%"),
        method="split-batches",
    )  # fmt: skip
    said = [line.what for line in receipt.lines]
    assert "batches split" in said
    assert len(set(said)) == len(said)
    jobs.train_log(log, OPTIONS, dataclasses.replace(SMALL, epochs=2), tmp_path / "b", pairs=0, tiers=Tiering("90%"))
    mine, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-5) for name in mine)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cold-rows", "there is no method 'cold-rows'"),
        ("skip-rows+skip-inputs", "two methods of one kind"),
        ("split-batches", "needs rows over memory and disk"),
        ("plain", "is what runs are compared to"),
    ],
)
def test_refused_before_anything_is_read(tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        jobs.train_log("absent.csv", OPTIONS, SMALL, tmp_path / "a", method=method)
    assert not (tmp_path / "a").exists()


def test_memory_that_other_orders_may_not_fit_is_refused_at_once(log: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hot-rows makes batches of up to") as caught:
        jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", tiers=Tiering("60%"), method="hot-rows", pairs=0)
    assert not (tmp_path / "a").exists()
    least = re.search(r"--memory (\S+) is enough", caught.value.hint or "")
    assert least
    short = dataclasses.replace(SMALL, epochs=1)
    jobs.train_log(log, OPTIONS, short, tmp_path / "a", tiers=Tiering(least[1]), method="hot-rows", pairs=0)


def test_lists_of_other_samples_that_may_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = np.where(rng.random(400) < 0.03, 30, 1)  # few samples have long lists
    tags = [[f"t{t}" for t in rng.integers(0, 900, n)] for n in sizes]
    columns = {"click": rng.integers(0, 2, 400), "price": rng.normal(size=400), "tags": tags}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    options = LogOptions("click", numeric=("price",), lists=("tags",))
    settings = dataclasses.replace(SMALL, batch_size=20, epochs=1)

    def train(memory: str, method: str) -> Receipt:
        return jobs.train_log(
            str(tmp_path / "log.parquet"), options, settings, tmp_path / "a", tiers=Tiering(memory), method=method,
            pairs=0,
        )  # fmt: skip

    with pytest.raises(InputError, match="hot-rows makes batches of up to") as caught:
        train("55%", "hot-rows")
    assert not (tmp_path / "a").exists()
    least = re.search(r"--memory (\S+) is enough", caught.value.hint or "")
    assert least
    train(least[1], "hot-rows")


@pytest.mark.parametrize("jagged", [False, True])
def test_most_rows_of_a_batch(tmp_path: Path, jagged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiering, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, 100)
    tags = pa.array([[f"t{t}" for t in rng.integers(0, 50, n)] for n in sizes], pa.list_(pa.string()))
    columns = {"click": rng.integers(0, 2, 100), "user": rng.integers(0, 5, 100).astype(str), "tags": tags}
    columns["price"] = rng.normal(size=100)
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    options = LogOptions("click", lists=("tags",)) if jagged else LogOptions("click", ignore=("tags",))
    job = prepare(str(tmp_path / "log.parquet"), options, SMALL, tmp_path, silent)
    block = job.train.block(0, len(job.train))
    each = np.ones(len(block), int) if block.offsets is None else np.diff(block.offsets).reshape(-1, 2)[:, 1]
    rows = job.num_rows
    for size in (1, 3, len(block)):
        lists = min(int(np.sort(each)[-size:].sum()), rows["tags"]) if jagged else 0
        assert tiering.most_rows(job.train, rows, size) == min(size, rows["user"]) + lists


def test_killed_in_the_comparison_keeps_what_the_methods_say(log: str, tmp_path: Path) -> None:
    def stop(stage: str, done: float) -> None:
        if stage == "compare":
            raise KeyboardInterrupt

    short = dataclasses.replace(SMALL, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(log, OPTIONS, short, tmp_path / "a", pairs=1, method="hot-rows", progress=stop)
    receipt = jobs.resume_log(tmp_path / "a")
    assert "samples whose rows are all hot" in {line.what for line in receipt.lines}


def test_names() -> None:
    for name in ("fused", "plain", *WAYS, "hot-rows+split-batches+skip-rows"):
        assert way_named(name).name == name
    assert way_named("skip-rows+hot-rows").name == "hot-rows+skip-rows"
    assert Way(split=True).update == "step"


# -- auto


def test_auto_declines_with_reasons_and_chooses_once(log: str, tmp_path: Path) -> None:
    said: list[str] = []
    short = dataclasses.replace(SMALL, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        jobs.train_log(
            log, OPTIONS, short, tmp_path / "a", pairs=0, method="auto", say=said.append, progress=stop_after(0.5)
        )
    choice = json.loads((tmp_path / "a" / "run.json").read_text())["choice"]
    assert choice["way"] == "fused"
    assert {each["method"] for each in choice["declined"]} == {
        "hot-rows",
        "split-batches",
        "skip-rows",
        "skip-inputs",
    }
    assert any("declined" in line for line in said)
    said.clear()
    receipt = jobs.resume_log(tmp_path / "a", say=said.append)
    assert not said
    assert {left.method for left in receipt.declined} == {each["method"] for each in choice["declined"]}
    assert all(left.reason for left in receipt.declined)


def test_auto_over_tiers_looks_at_everything(log: str, tmp_path: Path) -> None:
    tiers = Tiering("90%", store=str(tmp_path / "rows"))
    receipt = jobs.train_log(
        log, OPTIONS, dataclasses.replace(SMALL, epochs=1), tmp_path / "a", pairs=0, tiers=tiers, method="auto"
    )
    taken = [part for part in ("hot-rows", "split-batches", "skip-rows", "skip-inputs") if part in receipt.method]
    assert len(taken) + len({left.method.split("+")[0] for left in receipt.declined}) >= 4
    assert [each.name for each in tmp_path.iterdir() if "trial" in each.name] == []


def _judged(factor: float, fall: float = 0.0) -> Any:
    pairs = [Pair(s, "base", 1.0 + s / 1e3, 1 / factor, 0.7, 0.7 - fall, 100.0, 100.0) for s in range(3)]
    return judge(Rule("equal work", 0.001), pairs, metric="AUC")


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"hot-rows": 1.5, "skip-rows": 1.2, "hot-rows+skip-rows": 1.8}, "hot-rows+skip-rows"),
        ({"hot-rows": 1.5, "skip-rows": 1.2, "hot-rows+skip-rows": 1.3}, "hot-rows"),
        ({"hot-rows": 1.01, "skip-rows": 1.2}, "skip-rows"),
        ({"skip-rows": 1.2, "skip-inputs": 1.4}, "skip-inputs"),
        ({"hot-rows": 0.5}, "fused"),
    ],
)
def test_auto_keeps_what_pays_and_what_adds_to_it(
    monkeypatch: pytest.MonkeyPatch, log: str, tmp_path: Path, speeds: dict[str, float], expected: str
) -> None:
    foretold = [auto.Tried(name, 2.0 if name in speeds else 1.0, "a guess") for name in auto.METHODS]
    monkeypatch.setattr(auto, "_foretold", lambda *args: iter(foretold))
    monkeypatch.setattr(auto, "_trial", lambda way, *args: _judged(speeds[way.name]))
    monkeypatch.setattr(auto, "_draw", lambda *args: (samples(), samples()))

    class Log:
        def __len__(self) -> int:
            return 1000

    choice = auto.choose_way(Log(), {"user": 40, "shop": 60}, SMALL, Rule("equal work", 0.001))  # type: ignore[arg-type]
    assert choice.way.name == expected
    assert len(choice.lines) == len(choice.way.methods)
    if "+" in expected:
        first, second = choice.lines
        assert first.after == pytest.approx(second.before)
        assert second.ratio is not None
    kept = {expected, *expected.split("+")}
    assert {left.method for left in choice.declined} == ({*auto.METHODS} | {*speeds}) - kept


def test_auto_drops_what_costs_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = auto.Tried("skip-inputs", 2.0, "a guess", _judged(2.0, fall=0.01))
    assert not tried.pays
    assert "quality lost" in tried.reason
    assert "2.00x" in tried.reason


# -- state on disk


def test_packed_state_comes_back() -> None:
    state = {
        "inf": float("inf"), "numbers": [1, 2.5, None, "a"], "pair": (np.int64(3), torch.arange(4)),
        "array": np.arange(3.0), "batch": samples(5), "nested": {"empty": {}, "none": None},
    }  # fmt: skip
    plain, tensors = pack(state, "course")
    back = unpack(json.loads(json.dumps(plain, allow_nan=False)), tensors)
    assert back["inf"] == float("inf")
    assert back["numbers"] == [1, 2.5, None, "a"]
    assert back["pair"][0] == 3
    assert torch.equal(back["pair"][1], torch.arange(4))
    assert np.array_equal(back["array"], np.arange(3.0))
    assert np.array_equal(back["batch"].ids, samples(5).ids)
    assert back["batch"].offsets is None
    assert back["nested"] == {"empty": {}, "none": None}
    assert all(name.startswith("course.") for name in tensors)
