"""Several worker processes: the rows are those of one process, and an error in one of them ends all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.embeddings import SGD, EmbeddingBags, Table
from vitalfew.embeddings._owner import Owned, Owner
from vitalfew.embeddings._peers import pack, unpack
from vitalfew.embeddings.parallel import ShardedEmbeddings, sync_classes
from vitalfew.embeddings.parallel_ahead import ShardedPrefetch
from vitalfew.tiers import Dram

WORKER = Path(__file__).with_name("parallel_worker.py")
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TOGETHER = ("rules", "places", "half", "bag_case", "dlrm", "versions", "leaving", "resumes", "refuses")


def start(world: int, folder: Path, *cases: str, seconds: int = 240) -> list[dict[str, Any]]:
    """Run cases in so many workers; return what each found, nothing for one that was killed."""
    (folder / "store").unlink(missing_ok=True)
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(WORKER), str(folder), *cases],
            env={**os.environ, **ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = []
    try:
        outputs += [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    print(*outputs, sep="\n")
    return [read(folder, rank, *cases) for rank in range(world)]


def read(folder: Path, rank: int, *cases: str) -> dict[str, Any]:
    path = folder / f"{'-'.join(cases)}-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(request.param, tmp_path_factory.mktemp("workers"), *TOGETHER)


@pytest.mark.parametrize("case", [case for case in TOGETHER if case != "refuses"])
def test_as_one_process(case: str, workers: list[dict[str, Any]]) -> None:
    for found in workers:
        assert "error" not in found, found["error"]
        mine = {what: value for what, value in found.items() if what.startswith(f"{case}:")}
        assert len(mine) >= 1
        assert all(value is True for value in mine.values()), mine


def test_wrong_use_is_refused_in_all_workers(workers: list[dict[str, Any]]) -> None:
    last = len(workers) - 1
    for rank, found in enumerate(workers):
        said = {what.removeprefix("refuses: "): value for what, value in found.items() if what.startswith("refuses:")}
        assert "loop over ShardedPrefetch" in said["no loop"]
        assert "the loader of rank 1 ended after 2 batches, that of rank 0 has more" in said["lengths"]
        assert "of mine" in said["loader"]
        assert rank == last or f"the loader of rank {last} has failed" in said["loader"]
        assert "gradient of rank 1 is NaN or infinite; no row was changed" in said["nan"]
        assert "one backward for each batch" in said["twice"]
        assert "not those of the batch" in said["others"]
        assert said["nothing changed"] is True
        assert f"{len(workers)} processes would each change their own copy" in said["plain"]
        assert "has optimizer" in said["differs"]


def test_started_by_torchrun_and_with_too_little_memory(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(tmp_path)]
    subprocess.run(
        [sys.executable, *command, "dlrm", "small"], env={**os.environ, **ENVIRONMENT}, capture_output=True, timeout=200
    )
    found = [read(tmp_path, rank, "dlrm", "small") for rank in range(2)]
    assert any(found)  # torchrun ends the others when the first one has failed
    for each in filter(None, found):
        assert each["dlrm: rows"] is True
        assert re.search("InputError.* batch.* rows .*at a time, and .* memory holds 4", each["error"])


def test_killed_worker_ends_the_others_with_one_error(tmp_path: Path) -> None:
    found = start(3, tmp_path, "killed")
    assert found[1] == {}
    for rank in (0, 2):
        assert found[rank]["error"].startswith("StorageError: rank 1 of 3 is gone")
        assert found[rank]["seconds"] < 20


@pytest.mark.slow
def test_error_in_the_loop_of_one_worker_reaches_the_others(tmp_path: Path) -> None:
    found = start(3, tmp_path, "raises")
    assert found[1]["error"] == "ZeroDivisionError('of mine')"
    for rank in (0, 2):
        assert found[rank]["error"].startswith("StorageError: rank 1 has failed: ZeroDivisionError('of mine')")


@pytest.mark.slow
def test_worker_that_hangs_counts_as_lost(tmp_path: Path) -> None:
    found = start(2, tmp_path, "hangs")
    assert found[0]["error"].startswith("StorageError: rank 1 of 2 has not answered for 3 s")
    assert found[0]["seconds"] < 10


@pytest.mark.slow
def test_kill_between_the_commits_of_two_shards_goes_back_to_the_one_before(tmp_path: Path) -> None:
    found = start(3, tmp_path, "torn")
    assert found[2] == {}
    assert "rank 2 of 3 is gone" in found[0]["error"]
    serials = [json.loads((tmp_path / f"torn-{k}" / "commit.json").read_text()) for k in range(3)]
    assert [document["note"]["note"]["shard"]["serial"] for document in serials] == [2, 2, 1]
    for rank, mended in enumerate(start(3, tmp_path, "mended")):
        assert all(value is True for what, value in mended.items() if what != "seconds"), (rank, mended)
    fewer = start(2, tmp_path, "mended")
    assert "shard 0 of 2: " in fewer[0]["error"]
    assert "as many workers as before" in fewer[0]["error"]


@pytest.mark.slow
def test_remote_tier(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for found in start(2, tmp_path, "remote"):
        assert found["remote: same"] is True
        assert found["remote: resumed"] is True


# -- without other processes

ids = st.lists(st.integers(0, 12), max_size=30)


@given(ids, ids, ids)
def test_classes_divide_the_batch(current: list[int], following: list[int], later: list[int]) -> None:
    now, delayed, none = sync_classes(current, following, later)
    assert sorted([*now, *delayed, *none]) == sorted(set(current))
    assert set(now) == set(current) & set(following)
    assert all(current.count(row) == 1 and row not in {*following, *later} for row in none)
    assert all(current.count(row) > 1 or row in later for row in delayed)


@given(st.lists(st.tuples(st.sampled_from(["u1", "i4", "i8", "f4"]), st.integers(0, 9)), max_size=5))
def test_messages_come_apart_as_they_were_put_together(parts: list[tuple[str, int]]) -> None:
    arrays = [np.arange(size).astype(kind) for kind, size in parts]
    found = unpack(pack(*arrays), *(array.dtype for array in arrays))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, found, strict=True))


def test_stale_read_is_noticed() -> None:
    owned = Owned([10], 2, SGD(0.1), rank=0, world=1, first_seed=0, tiers=[Dram(10)], dtype=torch.float32)
    owner = Owner(owned, 0, 1)
    assert owner.enter(0, [np.array([1, 2])])
    assert owner.enter(1, [np.array([2, 3])])
    owner.load(1)
    owner.begin(0, ahead=True)
    assert owner.now(0).tolist() == [2]
    owner.give([np.array([1, 2])])
    with pytest.raises(AssertionError, match="before its update"):
        owner.give([np.array([2, 3])])
    owner.settled(owner.now(0))
    owner.give([np.array([2])])
    owned.close()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="no process group"):
        ShardedEmbeddings([Table("a", 4, 2)], SGD(0.1), tiers=[Dram(4)])
    with pytest.raises(InputError, match="timeout"):
        ShardedEmbeddings([Table("a", 4, 2)], SGD(0.1), tiers=[Dram(4)], timeout=0)
    with pytest.raises(InputError, match="EmbeddingBags"):
        ShardedPrefetch(EmbeddingBags([Table("a", 4, 2)], SGD(0.1)), [])  # type: ignore[arg-type]
