"""A remote tier gives back what it took, from memory or from its last commit, and says so when it cannot."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError, MissingExtra, StorageError
from vitalfew.tiers._ray import Remote
from vitalfew.tiers._shard import Shard

ray = pytest.importorskip("ray", reason="ray is not installed: the remote tier is NOT tested")

NUM_ROWS = 1000


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="CRITICAL",
        object_store_memory=128 << 20,
    )
    yield
    ray.shutdown()


def records(rng: np.random.Generator, rows: int, record_bytes: int) -> np.ndarray:
    return rng.integers(0, 256, (rows, record_bytes), np.uint8)


def no_places(start: int, stop: int) -> np.ndarray:
    raise AssertionError("the shards know which rows were written")


def pids() -> list[int]:
    """Return the actors of this process's Ray; another test run may have its own."""
    return [p.pid for p in psutil.Process().children(recursive=True) if _line(p).startswith("ray::Shard")]


def _line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def content(tier, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.flatnonzero(places >= 0)
    out = np.empty((len(ids), tier.record_bytes), np.uint8)
    tier.read(ids, places[ids], out)
    return ids, out


BATCH = st.lists(st.integers(0, 39), unique=True, max_size=40)

ACTIONS = ["write", "write", "read", "release", "commit"]


def steps_of(actions: list[str]) -> st.SearchStrategy[list[tuple[str, list[int]]]]:
    return st.lists(st.tuples(st.sampled_from(actions), BATCH), max_size=12)


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    shards=st.integers(1, 3),
    record_bytes=st.sampled_from([1, 2, 7, 268]),
    steps=steps_of(ACTIONS),
)
def test_it_behaves_like_a_dict(shards: int, record_bytes: int, steps: list[tuple[str, list[int]]]) -> None:
    _behaves_like_a_dict(shards, record_bytes, steps)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(shards=st.integers(1, 4), record_bytes=st.integers(1, 300), steps=steps_of([*ACTIONS, "resume"]))
def test_it_behaves_like_a_dict_at_length(shards: int, record_bytes: int, steps: list[tuple[str, list[int]]]) -> None:
    _behaves_like_a_dict(shards, record_bytes, steps)


def _behaves_like_a_dict(shards: int, record_bytes: int, steps: list[tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    model: dict[int, bytes] = {}
    committed: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        remote = Remote(shards=shards, folder=folder)
        tier = remote.open(40, record_bytes).tier
        try:
            tier.commit(no_places, {"step": -1})
            for step, (action, chosen) in enumerate([*steps, ("resume", [])]):
                ids = np.array(chosen, np.int64)
                if action == "write":
                    batch = records(rng, len(ids), record_bytes)
                    assert (tier.write(ids, batch) == 0).all()
                    model.update(zip(chosen, map(bytes, batch), strict=True))
                elif action == "read":
                    ids = ids[[i in model for i in chosen]] if chosen else ids
                    out = np.empty((len(ids), record_bytes), np.uint8)
                    tier.read(ids, np.zeros(len(ids), np.int32), out)
                    assert [model[i] for i in ids.tolist()] == list(map(bytes, out))
                elif action == "release":
                    tier.release(np.zeros(len(ids), np.int32))
                elif action == "commit":
                    tier.commit(no_places, {"step": step})
                    committed = dict(model)
                else:
                    tier.close()
                    opened = remote.open(40, record_bytes, resume=True)
                    tier, model = opened.tier, dict(committed)
                    ids, out = content(tier, opened.places)
                    assert model == dict(zip(ids.tolist(), map(bytes, out), strict=True))
                assert tier.moved() is None
        finally:
            tier.close()


@pytest.mark.parametrize("record_bytes", [268, 5 << 20])
def test_order_is_kept_over_many_rounds(record_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitalfew.tiers._ray._ROUND_BYTES", 3000)
    rng = np.random.default_rng(1)
    ids = rng.permutation(NUM_ROWS)[: 5 if record_bytes > 1000 else 100]
    batch = records(rng, len(ids), record_bytes)
    with closing(Remote(shards=2).open(NUM_ROWS, record_bytes).tier) as tier:
        tier.write(ids, batch)
        asked = rng.permutation(len(ids))
        out = np.zeros_like(batch)
        tier.read(ids[asked], np.zeros(len(ids), np.int32), out)
        np.testing.assert_array_equal(out, batch[asked])
        traffic = tier.traffic
        assert traffic.rows_read == traffic.rows_written == len(ids)
        assert traffic.bytes_read == traffic.bytes_written == len(ids) * (record_bytes + 8)
        rounds = -(-len(ids) // max(1, 3000 // (record_bytes + 8)))
        assert rounds <= traffic.writes <= 2 * rounds
        assert traffic.seconds > 0


def test_an_empty_batch_and_a_release_cost_no_call() -> None:
    with closing(Remote(shards=2).open(NUM_ROWS, 8).tier) as tier:
        before = tier.traffic.seconds
        none = np.empty(0, np.int64)
        assert tier.write(none, np.empty((0, 8), np.uint8)).shape == (0,)
        tier.read(none, np.empty(0, np.int32), np.empty((0, 8), np.uint8))
        tier.release(np.zeros(5, np.int32))
        assert (tier.traffic.reads, tier.traffic.writes, tier.traffic.seconds) == (0, 0, before)


def test_a_killed_shard_is_named_and_the_last_commit_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    ids, batch = rng.permutation(NUM_ROWS)[:300], records(rng, 300, 268)
    remote = Remote(shards=2, folder=tmp_path)
    with closing(remote.open(NUM_ROWS, 268).tier) as tier:
        tier.write(ids[:200], batch[:200])
        tier.commit(no_places, {"step": 1})
        tier.write(ids[150:], batch[150:])
        tier.commit(no_places, {"step": 2, "name": "a"})
        tier.write(ids, np.zeros_like(batch))  # lost with the shard
        kill(_pid_of(tier, 1))
        start = time.perf_counter()
        with pytest.raises(StorageError, match="shard 1 of 2 is gone") as caught:
            tier.read(ids, np.zeros(300, np.int32), np.empty_like(batch))
        assert time.perf_counter() - start < 10
        assert caught.value.hint == "resume from the last commit"
        # Shard 0 lives, but what it took of a failed batch is unknown: it is not asked any more.
        with pytest.raises(StorageError, match="shard 1 of 2 is gone"):
            tier.write(np.array([0]), batch[:1])
    opened = remote.open(NUM_ROWS, 268, resume=True)
    with closing(opened.tier) as tier:
        assert opened.note == {"step": 2, "name": "a"}
        found, out = content(tier, opened.places)
        order = np.argsort(ids)
        np.testing.assert_array_equal(found, ids[order])
        np.testing.assert_array_equal(out, batch[order])


def _pid_of(tier, shard: int) -> int:
    actor = tier._actors._actors[shard]
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def test_a_shard_that_dies_while_it_writes_its_file_leaves_the_last_commit(tmp_path: Path) -> None:
    remote = Remote(shards=2, folder=tmp_path)
    with closing(remote.open(NUM_ROWS, 4).tier) as tier:
        tier.write(np.arange(10), np.full((10, 4), 1, np.uint8))
        tier.commit(no_places, {"step": 1})
        tier.write(np.arange(10), np.full((10, 4), 2, np.uint8))
        kill(_pid_of(tier, 0))
        with pytest.raises(StorageError, match="shard 0 of 2 is gone"):
            tier.commit(no_places, {"step": 2})
    opened = remote.open(NUM_ROWS, 4, resume=True)
    with closing(opened.tier) as tier:
        assert opened.note == {"step": 1}
        assert (content(tier, opened.places)[1] == 1).all()


def test_commits_write_what_changed_and_clean_up(tmp_path: Path) -> None:
    remote = Remote(shards=2, folder=tmp_path)
    with closing(remote.open(NUM_ROWS, 8).tier) as tier:
        tier.write(np.arange(100), np.zeros((100, 8), np.uint8))
        tier.commit(no_places, {})
        base = {path.name: path.stat().st_size for path in tmp_path.glob("*.rows")}
        assert sorted(base.values()) == [50 * 16, 50 * 16]
        tier.write(np.array([4]), np.ones((1, 8), np.uint8))
        tier.commit(no_places, {})
        delta = {path.name: path.stat().st_size for path in tmp_path.glob("*.rows") if path.name not in base}
        assert list(delta.values()) == [16]  # one row of shard 0, nothing of shard 1
        assert next(iter(delta)).startswith("shard-0-")
        for _ in range(100):
            tier.write(np.arange(0, 100, 2), np.ones((50, 8), np.uint8))
            tier.commit(no_places, {})
            assert len(list(tmp_path.glob("shard-0-*"))) <= 3
        assert len(list(tmp_path.glob("shard-1-*"))) == 1
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_starts_over_keeps_the_old_commit_until_its_own(tmp_path: Path) -> None:
    remote = Remote(shards=1, folder=tmp_path)
    with closing(remote.open(10, 4).tier) as tier:
        tier.write(np.arange(2), np.full((2, 4), 2, np.uint8))
        tier.commit(no_places, {"run": 1})
    before = sorted(tmp_path.iterdir())
    with closing(remote.open(10, 4).tier) as tier:
        tier.write(np.arange(10), np.full((10, 4), 9, np.uint8))
        assert sorted(tmp_path.iterdir()) == before
    opened = remote.open(10, 4, resume=True)
    with closing(opened.tier) as tier:
        assert opened.note == {"run": 1}
        assert opened.places.tolist() == [0, 0] + [-1] * 8
        assert (content(tier, opened.places)[1] == 2).all()


def test_a_commit_that_cannot_be_written_can_be_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.write_text("a file where the folder should be")
    remote = Remote(shards=2, folder=folder)
    with closing(remote.open(10, 4).tier) as tier:
        tier.write(np.arange(10), np.ones((10, 4), np.uint8))
        with pytest.raises(StorageError, match="could not be written") as caught:
            tier.commit(no_places, {})
        assert str(folder) in caught.value.message
        folder.unlink()
        tier.commit(no_places, {})
    opened = remote.open(10, 4, resume=True)
    opened.tier.close()
    assert (opened.places == 0).all()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    shard = Shard(10, 4)
    shard.write(np.arange(10), np.ones((10, 4), np.uint8))
    path = tmp_path / "a.rows"
    saved = shard.save(str(path), True)
    whole = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else b"\x01" + whole[1:])
    with pytest.raises(StorageError) as caught:
        Shard(10, 4).load(str(tmp_path), [saved])
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_resume_that_fails_names_the_file_and_leaves_no_actor(tmp_path: Path) -> None:
    remote = Remote(shards=2, folder=tmp_path)
    with closing(remote.open(10, 4).tier) as tier:
        tier.write(np.arange(10), np.ones((10, 4), np.uint8))
        tier.commit(no_places, {})
    (path,) = tmp_path.glob("shard-1-*")
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="is damaged") as caught:
        remote.open(10, 4, resume=True)
    assert str(path) in caught.value.message
    assert not _soon_empty()


def _soon_empty() -> list[int]:
    end = time.monotonic() + 10
    while pids() and time.monotonic() < end:
        time.sleep(0.05)
    return pids()


def test_close_leaves_no_actor_and_a_foreign_ray_running() -> None:
    tier = Remote(shards=2).open(NUM_ROWS, 4).tier
    tier.write(np.arange(2), np.ones((2, 4), np.uint8))
    assert len(pids()) == 2
    tier.close()
    tier.close()
    assert not _soon_empty()
    assert ray.is_initialized()
    with pytest.raises(StorageError, match="closed"):
        tier.write(np.arange(2), np.ones((2, 4), np.uint8))


def test_a_shard_that_does_not_answer_is_lost() -> None:
    with closing(Remote(shards=2).open(NUM_ROWS, 4).tier) as tier:
        tier._actors._timeout = 1.0  # a busy machine may take longer to start them
        pid = _pid_of(tier, 0)
        os.kill(pid, signal.SIGSTOP)
        try:
            start = time.perf_counter()
            with pytest.raises(StorageError, match=r"shard 0 of 2 is gone \(no answer within 1 s"):
                tier.write(np.arange(2), np.ones((2, 4), np.uint8))
            assert time.perf_counter() - start < 8
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_latency_is_paid_once_per_call_and_shards_answer_together() -> None:
    ids, out = np.arange(100), np.empty((100, 8), np.uint8)
    tiers = [Remote(shards=shards, latency=0.05).open(NUM_ROWS, 8).tier for shards in (1, 2)]
    seconds: list[list[float]] = [[], []]
    for tier in tiers:
        tier.write(ids, out)
    for _ in range(7):
        for tier, taken in zip(tiers, seconds, strict=True):
            before = tier.traffic.seconds
            tier.read(ids, np.zeros(100, np.int32), out)
            taken.append(tier.traffic.seconds - before)
    assert [tier.traffic.reads for tier in tiers] == [7, 14]
    assert min(seconds[0] + seconds[1]) >= 0.05
    assert statistics.median(two / one for one, two in zip(*seconds, strict=True)) < 1.6
    for tier in tiers:
        tier.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"shards": 0},
        {"shards": True},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"latency": -1.0},
        {"address": "ray://a:1"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(InputError) as caught:
        Remote(**settings)
    assert repr(next(iter(settings.values()))) in caught.value.message
    assert caught.value.hint


def test_what_cannot_be_opened_or_committed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        Remote().open(10, 4, resume=True)
    with pytest.raises(InputError, match=r"no such file: .*commit\.json"):
        Remote(folder=tmp_path).open(10, 4, resume=True)
    with pytest.raises(InputError, match=r"not to 127\.0\.0\.1:1"):
        Remote(address="127.0.0.1:1").open(10, 4)
    with closing(Remote(shards=1).open(10, 4).tier) as tier, pytest.raises(InputError, match="folder"):
        tier.commit(no_places, {})
    remote = Remote(shards=1, folder=tmp_path)
    with closing(remote.open(10, 4).tier) as tier:
        tier.commit(no_places, {})
    for other, rows, size in ((remote, 11, 4), (remote, 10, 5), (Remote(shards=2, folder=tmp_path), 10, 4)):
        with pytest.raises(InputError, match="was written with"):
            other.open(rows, size, resume=True)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"vitalfew\[remote\]"):
        Remote().open(10, 4)


def test_a_shard_grows_as_rows_come() -> None:
    shard = Shard(1_000_000, 64)
    rng = np.random.default_rng(3)
    for start in range(0, 5000, 500):
        ids = np.arange(start, start + 500) * 7
        shard.write(ids, np.repeat((ids % 251).astype(np.uint8)[:, None], 64, axis=1))
    asked = rng.permutation(5000) * 7
    assert (shard.read(asked) == (asked % 251)[:, None]).all()
    assert len(shard._records) < 7000


SCRIPT = """
import signal, sys
import numpy as np
from vitalfew.core import StorageError
from vitalfew.tiers._ray import Remote

def on_term(*_): ...

before = signal.signal(signal.SIGTERM, on_term)
try:
    Remote(address="127.0.0.1:9").open(10, 4)
except StorageError as error:
    assert "127.0.0.1:9" in error.message
else:
    raise AssertionError("nobody is there")
import ray
tier = Remote(address="auto" if sys.argv[1] == "join" else None).open(10, 4).tier
assert signal.getsignal(signal.SIGTERM) is on_term
tier.write(np.arange(10), np.ones((10, 4), np.uint8))
tier.close()
assert not ray.is_initialized()
if sys.argv[1] == "start":
    tier = Remote().open(10, 4).tier
    ray.shutdown()
    try:
        tier.write(np.arange(10), np.ones((10, 4), np.uint8))
    except StorageError as error:
        assert "session" in error.message
    else:
        raise AssertionError("a write without Ray")
    tier.close()
    assert not ray.is_initialized()
"""


@pytest.mark.parametrize("how", ["start", "join"])
def test_a_program_without_ray_is_left_without_ray(how: str) -> None:
    name, value = "VITALFEW_TEST", f"{os.getpid()} {how}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, how],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Warning" not in done.stderr
    end = time.monotonic() + 10
    while (left := _processes_with(name, value)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def _processes_with(name: str, value: str) -> list[str]:
    """Return the processes that were started, at any remove, with this in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process.name())
    return found
