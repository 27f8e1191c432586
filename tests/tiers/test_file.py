from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from vitalfew.core.errors import InputError, StorageError
from vitalfew.tiers import _direct, _pages, _space, file
from vitalfew.tiers._direct import DirectFile, aligned
from vitalfew.tiers.file import File

BACKENDS = ["asynchronous", "threads", "buffered"]
NO_CHANGE = "nothing that the owner can see has changed"


def choose(backend, patch):
    """Take from the system what the other ways of moving pages need."""
    if backend == "threads":
        patch.setattr(_direct, "_CALLS", {})
    if backend == "buffered":
        patch.delattr(os, "O_DIRECT")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture
def tiny(monkeypatch):
    """Limits so small that a few pages reach them."""
    shrink(monkeypatch)


def shrink(patch):
    patch.setattr(_space, "_SLACK_PAGES", 0)
    patch.setattr(_space, "_WINDOW", 8)
    patch.setattr(_space, "_GROW_BYTES", 1 << 16)
    patch.setattr(file, "BUFFER_BYTES", 3 * 4096)


class Owner:
    """Keeps the directory, as a tier's user does, and a plain copy of everything to compare with."""

    def __init__(self, setting, num_rows, record_bytes, resume=False):
        opened = setting.open(num_rows, record_bytes, resume=resume)
        self.setting, self.tier, self.note = setting, opened.tier, opened.note
        self.places = np.full(num_rows, -1, np.int32) if opened.places is None else opened.places
        self.rows = np.zeros((num_rows, record_bytes), np.uint8)

    def write(self, ids, records):
        """Write as one who first lets go of the former records, which is no more than a change of masks."""
        former = self.places[ids]
        self.tier.release(former[former >= 0])
        self.places[ids] = -1
        places = self.tier.write(ids, records)
        self.places[ids], self.rows[ids] = places, records
        self.drain()

    def drain(self):
        if (moved := self.tier.moved()) is not None:
            ids, places = moved
            assert np.unique(ids).size == ids.size
            assert (self.places[ids] >= 0).all()
            self.places[ids] = places
        assert self.tier.moved() is None

    def drop(self, ids):
        ids = ids[self.places[ids] >= 0]
        self.tier.release(self.places[ids])
        self.places[ids] = -1

    def check(self, ids=None):
        ids = np.arange(len(self.places)) if ids is None else ids
        ids = ids[self.places[ids] >= 0]
        out = np.full((len(ids), self.tier.record_bytes), 99, np.uint8)
        self.tier.read(ids, self.places[ids], out)
        assert (out == self.rows[ids]).all()

    def commit(self, note=None):
        self.tier.commit(lambda start, stop: self.places[start:stop], note or {})
        self.kept = self.places.copy(), self.rows.copy()

    def reopen(self):
        """Forget what was not committed."""
        self.tier.close()
        opened = self.setting.open(len(self.places), self.tier.record_bytes, resume=True)
        self.tier, self.note = opened.tier, opened.note
        assert (opened.places == self.kept[0]).all()
        self.places, self.rows = opened.places, self.kept[1].copy()

    def check_space(self):
        """What the tier counts as it goes is what the masks say."""
        space, per_page = self.tier._space, self.tier.layout.records_per_page
        live = np.zeros((space.pages, per_page), np.bool_)
        live.reshape(-1)[self.places[self.places >= 0]] = True
        bits = (space.live[:, None] >> np.arange(per_page, dtype=np.uint64)) & np.uint64(1)
        assert (bits == live).all()
        assert space.rows == live.sum()
        assert space.holding == live.any(axis=1).sum()
        assert space.free == (~live.any(axis=1) & ~space._committed[: space.pages]).sum()


def some(num_rows, seed, most=None):
    rng = np.random.default_rng(seed)
    return rng.permutation(num_rows)[: rng.integers(1, (most or num_rows) + 1)], rng


class Machine(RuleBasedStateMachine):
    @initialize(
        record_bytes=st.sampled_from([8, 60, 268, 1000, 2100, 4090]) | st.integers(8, 9000),
        num_rows=st.integers(1, 400),
        backend=st.sampled_from(BACKENDS),
        base=st.sampled_from([None, "/dev/shm"] if os.path.isdir("/dev/shm") else [None]),
    )
    def begin(self, record_bytes, num_rows, backend, base):
        self.patch = pytest.MonkeyPatch()
        shrink(self.patch)
        choose(backend, self.patch)
        self.folder = Path(tempfile.mkdtemp(dir=base))
        num_rows = max(1, num_rows * 300 // max(300, record_bytes))  # so that no example takes long
        self.owner, self.committed = Owner(File(self.folder, io_depth=8), num_rows, record_bytes), False

    @rule(seed=st.integers(0, 2**32), few=st.booleans())
    def write(self, seed, few):
        ids, rng = some(len(self.owner.places), seed, 3 if few else None)
        self.owner.write(ids, rng.integers(0, 256, (len(ids), self.owner.tier.record_bytes), dtype=np.uint8))

    @rule(seed=st.integers(0, 2**32))
    def drop(self, seed):
        self.owner.drop(some(len(self.owner.places), seed)[0])

    @rule(seed=st.integers(0, 2**32))
    def read(self, seed):
        self.owner.check(some(len(self.owner.places), seed)[0])

    @rule(number=st.integers())
    def commit(self, number):
        self.owner.commit({"number": number})
        self.committed, self.number = True, number

    @rule()
    def reopen(self):
        if self.committed:
            self.owner.reopen()
            assert self.owner.note == {"number": self.number}

    @invariant()
    def all_is_there(self):
        if hasattr(self, "owner"):
            self.owner.check_space()
            self.owner.check()

    def teardown(self):
        if hasattr(self, "owner"):
            if self.committed:
                self.owner.reopen()
                self.owner.check()
            self.owner.tier.close()
            self.patch.undo()
            shutil.rmtree(self.folder)


def explore(examples, steps):
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_it_holds_what_a_plain_copy_holds():
    explore(40, 20)


@pytest.mark.slow
def test_it_holds_what_a_plain_copy_holds_for_long():
    explore(400, 60)


@pytest.mark.parametrize("record_bytes", [8, 268, 1000, 5000])
def test_pages_stay_within_the_limit(tmp_path, tiny, record_bytes):
    owner, rng = Owner(File(tmp_path), 300, record_bytes), np.random.default_rng(record_bytes)
    owner.write(np.arange(300), np.zeros((300, record_bytes), np.uint8))
    moves = 0
    for step in range(400):
        ids = rng.permutation(300)[: rng.choice([1, 2, 30])]
        before = owner.tier.traffic.reads
        owner.write(ids, rng.integers(0, 256, (len(ids), record_bytes), dtype=np.uint8))
        moves += owner.tier.traffic.reads > before
        if step % 40 == 39:
            owner.commit()
        needed = -(-300 // owner.tier.layout.records_per_page)
        # While a call writes, its pages come on top of the limit; the next call sees to them.
        assert owner.tier.holding_pages <= 2 * needed + 30
        assert owner.tier.used_pages <= 4 * needed + 60
    # Two to a page: the pages can never be more than twice those that are needed.
    assert (moves > 0) == (owner.tier.layout.records_per_page > 2)
    owner.check_space()
    owner.check()
    owner.tier.close()


@pytest.mark.slow
def test_a_large_file_stays_within_twice_its_rows(tmp_path):
    num_rows, record_bytes = 400_000, 64
    owner, rng = Owner(File(tmp_path), num_rows, record_bytes), np.random.default_rng(0)
    for start in range(0, num_rows, 50_000):
        ids = np.arange(start, start + 50_000)
        owner.write(ids, rng.integers(0, 256, (len(ids), record_bytes), dtype=np.uint8))
    needed = -(-num_rows // owner.tier.layout.records_per_page)
    for step in range(600):
        ids = np.unique(rng.integers(0, num_rows, rng.choice([100, 5000])))
        owner.write(ids, rng.integers(0, 256, (len(ids), record_bytes), dtype=np.uint8))
        assert owner.tier.holding_pages <= 2 * needed + _space._SLACK_PAGES + 5000
        if step % 100 == 99:
            assert owner.tier.holding_pages <= 2.1 * needed
            owner.commit()
            assert owner.tier._file.size <= 4.4 * needed * owner.tier.layout.page_bytes
    owner.check()
    owner.reopen()
    owner.check()
    owner.tier.close()


# Layout and damage


@pytest.mark.parametrize("record_bytes", [1, 8, 60, 268, 1000, 1500, 2100, 4076, 4077, 9000, 1 << 20])
def test_pages_fit_their_records(record_bytes):
    layout = _pages.Layout.of(record_bytes)
    used = 16 + layout.records_per_page * (record_bytes + 4)
    assert used <= layout.page_bytes
    assert layout.page_bytes % 4096 == 0
    assert 1 <= layout.records_per_page <= 64
    assert used >= 0.74 * layout.page_bytes or layout.records_per_page == 64


def page_of(layout, number, count, seed=0):
    rng = np.random.default_rng(seed)
    ids, buffer = rng.permutation(1000)[:count], aligned(1, layout.page_bytes)
    buffer[:] = 99  # left by an earlier page
    records = rng.integers(0, 256, (count, layout.record_bytes), dtype=np.uint8)
    _pages.fill(buffer, np.array([number]), 3, ids, records, layout)
    places = (number * layout.records_per_page + np.arange(count)).astype(np.int32)
    return ids, records, places, buffer


def take(layout, number, ids, places, buffer):
    out, order = np.zeros((len(ids), layout.record_bytes), np.uint8), np.arange(len(ids))
    first = np.array([0, len(ids)])
    return _pages.take(buffer, np.array([number]), first, order, ids, places, out, layout), out


def test_every_single_flipped_bit_is_found():
    layout = _pages.Layout.of(268)
    ids, records, places, buffer = page_of(layout, 5, 11)
    assert not buffer[0, 16 + 15 * 4 + 11 * 268 :].any()
    assert (take(layout, 5, ids, places, buffer)[1] == records).all()
    octets = buffer.reshape(-1)
    for at in range(layout.page_bytes):
        for bit in range(8):
            octets[at] ^= 1 << bit
            (line, damage), out = take(layout, 5, ids, places, buffer)
            assert line == 0, (at, bit)
            assert damage == 1
            assert not out.any()
            octets[at] ^= 1 << bit
    assert take(layout, 5, ids, places, buffer)[0] == (-1, 0)


def test_words_that_changed_places_are_found():
    layout = _pages.Layout.of(60)
    ids, _, places, buffer = page_of(layout, 0, 64)
    words, rng = buffer.view(np.uint64)[0], np.random.default_rng(0)
    for _ in range(2000):
        i, j = rng.choice(len(words), 2, replace=False)
        if words[i] != words[j]:
            words[[i, j]] = words[[j, i]]
            assert take(layout, 0, ids, places, buffer)[0] == (0, 1)
            words[[i, j]] = words[[j, i]]


def filled(folder, num_rows=200, record_bytes=268, commit=True, **options):
    owner = Owner(File(folder, **options), num_rows, record_bytes)
    rng = np.random.default_rng(1)
    owner.write(np.arange(num_rows), rng.integers(0, 256, (num_rows, record_bytes), dtype=np.uint8))
    if commit:
        owner.commit({"step": 1})
    return owner


def data(owner):
    return owner.tier._file.path


def test_a_damaged_page_is_named_and_not_handed_out(tmp_path, backend):
    owner = filled(tmp_path)
    page = 3
    with data(owner).open("r+b") as raw:
        raw.seek(page * 4096 + 2000)
        was = raw.read(1)[0]
        raw.seek(page * 4096 + 2000)
        raw.write(bytes([was ^ 4]))
        raw.flush()
        os.fsync(raw.fileno())
    there = np.flatnonzero(owner.places // 15 == page)
    out = np.zeros((len(there), 268), np.uint8)
    with pytest.raises(StorageError, match=f"page {page} of .*{data(owner).name} is damaged: its checksum"):
        owner.tier.read(there, owner.places[there], out)
    assert not out.any()
    owner.check(np.flatnonzero(owner.places // 15 != page))
    owner.tier.close()


def test_pages_that_changed_places_and_rows_that_are_others_are_found(tmp_path):
    owner = filled(tmp_path, commit=False)
    out, one = np.zeros((1, 268), np.uint8), np.array([0])
    with pytest.raises(StorageError, match="it holds other rows"):
        owner.tier.read(one, owner.places[[1]], out)
    shutil.copyfile(data(owner), tmp_path / "copy")
    pages = (tmp_path / "copy").read_bytes()
    with data(owner).open("r+b") as raw:
        raw.write(pages[4096:8192])
        os.fsync(raw.fileno())
    with pytest.raises(StorageError, match=r"page 0 .* bears the number of another page"):
        owner.tier.read(one, owner.places[one], out)
    with data(owner).open("r+b") as raw:
        raw.write(bytes(4096))
        os.fsync(raw.fileno())
    with pytest.raises(StorageError, match=r"page 0 .* checksum"):
        owner.tier.read(one, owner.places[one], out)
    assert not out.any()
    owner.tier.close()


def test_a_damaged_page_among_those_to_be_moved_changes_nothing(tmp_path, tiny):
    owner = filled(tmp_path, commit=False)
    owner.drop(np.flatnonzero(owner.places % 15 > 1))
    with data(owner).open("r+b") as raw:
        raw.write(bytes(5 * 4096))
        os.fsync(raw.fileno())
    with pytest.raises(StorageError, match=r"page 0 .* is damaged"):
        owner.tier.write(np.array([199]), np.zeros((1, 268), np.uint8))
    assert owner.tier.moved() is None, NO_CHANGE
    owner.check_space()
    owner.check(np.flatnonzero(owner.places // 15 > 4))
    owner.tier.close()


def test_a_file_that_was_cut(tmp_path, backend):
    owner = filled(tmp_path)
    os.truncate(data(owner), 5 * 4096 + 100)
    out = np.zeros((200, 268), np.uint8)
    with pytest.raises(StorageError, match=r"rows.pages ends within the 4096 bytes at 20480"):
        owner.tier.read(np.arange(200), owner.places, out)
    inside = np.flatnonzero(owner.places < 5 * 15)
    owner.check(inside)
    owner.tier.close()
    with pytest.raises(StorageError, match="is cut: it has 20580 bytes of"):
        owner.setting.open(200, 268, resume=True)


@pytest.mark.parametrize("name", ["places-*.bin", "changes-*.bin", "commit.json"])
def test_a_damaged_table_is_named(tmp_path, name):
    owner = filled(tmp_path)
    owner.write(np.array([5]), np.ones((1, 268), np.uint8))
    owner.commit()
    owner.tier.close()
    (path,) = tmp_path.glob(name)
    content = path.read_bytes()
    for at in range(0, len(content), 41):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(StorageError) as caught:
            owner.setting.open(200, 268, resume=True)
        assert path.name in caught.value.message
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=path.name):
        owner.setting.open(200, 268, resume=True)
    path.write_bytes(content)
    owner.setting.open(200, 268, resume=True).tier.close()


# Moving pages


@pytest.fixture(params=[(True, True), (True, False), (False, False)], ids=BACKENDS)
def pages(request, tmp_path):
    direct, asynchronous = request.param
    made = DirectFile(tmp_path / "pages", 4096, 16, direct=direct, asynchronous=asynchronous)
    made.reserve(2048 * 4096)
    yield made
    made.close()


def random_lines(count, seed=0):
    buffer = aligned(count, 4096)
    buffer[:] = np.random.default_rng(seed).integers(0, 256, buffer.shape, dtype=np.uint8)
    return buffer


def test_pages_go_out_and_come_back(pages):
    rng = np.random.default_rng(0)
    runs = np.concatenate([np.arange(700), 700 + rng.permutation(1348)])[:2000]
    lines, back = random_lines(2000), aligned(2000, 4096)
    pages.write(runs * 4096, lines)
    order = rng.permutation(2000)
    pages.read(runs[order] * 4096, back)
    assert (back == lines[order]).all()
    content = np.fromfile(pages.path, np.uint8).reshape(-1, 4096)
    assert (content[runs] == lines).all()


def test_neighbours_travel_together():
    offsets = np.array([0, 1, 2, 7, 8, 5, *range(100, 700)]) * 4096
    assert _direct._runs(offsets, 4096).tolist() == [0, 3, 5, 6, 262, 518]


class _RangError(Exception):
    pass


# An exception of a signal may come up in a callback of the interpreter, which can only report it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("raising", [False, True])
def test_signals_do_no_harm(pages, raising):
    lines, back = random_lines(2048), aligned(2048, 4096)
    pages.write(np.arange(2048) * 4096, lines)
    rng, rings = np.random.default_rng(1), 0

    def ring(*_):
        nonlocal rings
        rings += 1
        if raising:
            raise _RangError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(15):
            order = rng.permutation(2048)
            with contextlib.suppress(_RangError):
                signal.setitimer(signal.ITIMER_REAL, 0.002, 0 if raising else 0.0005)
                pages.read(order * 4096, back)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert (back == lines[order]).all()
            # Nothing of a read that was cut off comes up in the next one.
            order, back[:] = rng.permutation(2048), 0
            pages.read(order * 4096, back)
            assert (back == lines[order]).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rings > 0


def test_an_error_of_the_system_is_told_and_changes_nothing(tmp_path, backend):
    owner = filled(tmp_path)
    handle = owner.tier._file._handle
    saved = os.dup(handle)
    with open(os.devnull, "rb") as closed:
        os.dup2(closed.fileno(), handle)  # whatever is written there is refused
        ids = np.arange(20)
        with pytest.raises(StorageError, match=r"writing .*rows.pages at byte \d+: Bad file descriptor"):
            owner.tier.write(ids, owner.rows[ids])
        os.dup2(saved, handle)
        os.close(saved)
    owner.check_space()
    owner.check()
    owner.write(ids, owner.rows[ids] + 1)
    owner.check()
    owner.tier.close()


def test_what_is_asked_of_the_disk_is_counted(tmp_path):
    owner = filled(tmp_path, commit=False)
    pages = -(-200 // 15)
    traffic = owner.tier.traffic
    assert (traffic.writes, traffic.bytes_written, traffic.rows_written) == (pages, 4096 * pages, 200)
    owner.check(np.array([0, 1, 16]))
    assert (traffic.reads, traffic.bytes_read, traffic.rows_read) == (2, 8192, 3)
    assert traffic.seconds > 0
    assert owner.tier.nbytes >= file.BUFFER_BYTES
    owner.tier.close()


# Full disks

FULL = """
import os, resource, subprocess, sys
from pathlib import Path
import numpy as np
from vitalfew.core.errors import StorageError
from vitalfew.tiers import _space
sys.path.insert(0, sys.argv[1])
from test_file import Owner, File

folder, way = Path(sys.argv[2]), sys.argv[3]
if way == "tmpfs":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(2 << 20))
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
rows = np.random.default_rng(0).integers(0, 256, (20000, 268), dtype=np.uint8)
owner = Owner(File(folder / "rows"), 20000, 268)
owner.write(np.arange(3000), rows[:3000])
owner.commit({"step": 1})
try:
    owner.tier.write(np.arange(3000, 12000), rows[3000:12000])
except StorageError as error:
    assert "the disk is full" in error.message and "free space" in error.hint, error
    assert str(folder) in error.message
else:
    raise AssertionError("there was room")
owner.check_space()
owner.check()
small = np.arange(3000, 3100)
owner.write(small, rows[small])  # a smaller one still fits
owner.check()
# Every page is taken, but for one. Pages that could be moved together are left when there is no room for that.
_space._SLACK_PAGES = 1 << 20
for row in range(12000, 20000):
    try:
        owner.write(np.array([row]), rows[[row]])
    except StorageError:
        break
else:
    raise AssertionError("there was room")
owner.drop(np.array([row - 1]))
assert owner.tier._space.free == 1
_space._SLACK_PAGES = 0
moves = owner.tier.traffic.reads
owner.write(np.array([row]), rows[[row]])
assert owner.tier.traffic.reads > moves
owner.check_space()
owner.check()
if way == "tmpfs":
    ballast.unlink()
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
owner.write(small, rows[small])
owner.commit({"step": 2})
owner.reopen()
owner.check()
owner.tier.close()
print("done")
"""


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_full_disk_changes_nothing(tmp_path, way):
    command = [sys.executable, "-c", FULL, str(Path(__file__).parent), str(tmp_path), way]
    if way == "tmpfs":
        alone = ["unshare", "-Urm"]
        if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
            pytest.skip("needs a namespace to mount a small disk in")
        command = [*alone, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr


def test_a_full_disk_makes_every_free_page_welcome(tmp_path, tiny):
    owner = filled(tmp_path, num_rows=3000)
    owner.drop(np.flatnonzero(owner.places // 15 == 100))
    owner.commit()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (owner.tier._space.pages * 4096, hard))
    os.truncate(data(owner), owner.tier._space.pages * 4096)
    owner.tier.close()
    owner.reopen()
    try:
        with pytest.raises(StorageError, match="the disk is full"):
            owner.tier.write(np.arange(100 * 15, 100 * 15 + 16), np.zeros((16, 268), np.uint8))
        owner.write(np.arange(100 * 15, 100 * 15 + 5), np.zeros((5, 268), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert owner.places[100 * 15] // 15 == 100
    owner.check_space()
    owner.check()
    owner.tier.close()


def test_a_commit_without_room_leaves_the_last_one(tmp_path):
    owner = filled(tmp_path, num_rows=5000, record_bytes=64)
    owner.write(np.arange(0, 5000, 2), owner.rows[::2] + 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"the disk is full: writing .*places-2.bin"):
            owner.tier.commit(lambda start, stop: owner.places[start:stop], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    owner.check()
    owner.check_space()
    owner.write(np.arange(100), owner.rows[:100] + 1)
    owner.reopen()
    owner.check()
    assert owner.note == {"step": 1}
    owner.write(np.arange(100), owner.rows[:100] + 1)
    owner.commit()
    owner.reopen()
    owner.check()
    owner.tier.close()


def test_a_commit_that_fails_after_its_document_is_named_keeps_both(tmp_path, monkeypatch):
    owner = filled(tmp_path / "rows")
    first, document = owner.kept, (tmp_path / "rows" / "commit.json").read_bytes()
    write = file._commits.write_commit

    def fail(*arguments):
        write(*arguments)
        raise StorageError("the folder could not be synced")

    owner.write(np.arange(60), owner.rows[:60] + 1)
    second = owner.places.copy(), owner.rows.copy()
    monkeypatch.setattr(file._commits, "write_commit", fail)
    with pytest.raises(StorageError, match="synced"):
        owner.tier.commit(lambda start, stop: owner.places[start:stop], {})
    monkeypatch.undo()
    for step in range(5):
        owner.write(np.arange(200), owner.rows + step)
    # After a crash, either document may be the one that is found.
    for name, kept in (("second", second), ("first", first)):
        shutil.copytree(tmp_path / "rows", tmp_path / name)
        if name == "first":
            (tmp_path / name / "commit.json").write_bytes(document)
        found = Owner(File(tmp_path / name), 200, 268, resume=True)
        assert (found.places == kept[0]).all()
        found.rows = kept[1]
        found.check()
        found.tier.close()
    owner.check()
    owner.commit()
    owner.reopen()
    owner.check()
    owner.tier.close()


# Crashes

LOOP = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_file import Owner, File, LOOP_ROWS, change
from vitalfew.tiers import _space
_space._SLACK_PAGES = 0
resume = sys.argv[3] == "resume"
owner = Owner(File(sys.argv[2]), LOOP_ROWS, 268, resume=resume)
step = owner.note["step"] if resume else 0
print("ready", flush=True)
while True:
    step += 1
    for ids, records in change(step):
        owner.write(ids, records)
    owner.commit({"step": step})
    print(step, flush=True)
"""
LOOP_ROWS = 3000


def change(step):
    """Return what a step writes, by batches."""
    rng = np.random.default_rng(step)
    for size in (1, 300, 40, 700):
        ids = rng.permutation(LOOP_ROWS)[:size]
        yield ids, rng.integers(0, 256, (size, 268), dtype=np.uint8)


@pytest.mark.parametrize("rounds", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_its_last_commit(tmp_path, rounds):
    dice, step = random.Random(rounds), 0
    rows, written = np.zeros((LOOP_ROWS, 268), np.uint8), np.zeros(LOOP_ROWS, np.bool_)
    for _ in range(rounds):
        command = [sys.executable, "-c", LOOP, str(Path(__file__).parent), str(tmp_path), "resume" if step else "fresh"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            acknowledged = [int(child.stdout.readline()) for _ in range(dice.randrange(4))]
            timer = threading.Timer(dice.uniform(0.0, 0.1), child.kill)
            timer.start()
            acknowledged += [int(line) for line in child.stdout if line.endswith("\n")]
            timer.join()
        assert child.returncode == -signal.SIGKILL
        last = max(acknowledged, default=step)
        if not (tmp_path / "commit.json").exists():
            assert last == 0
            continue
        owner = Owner(File(tmp_path), LOOP_ROWS, 268, resume=True)
        assert last <= owner.note["step"] <= last + 1
        while step < owner.note["step"]:
            step += 1
            for ids, records in change(step):
                rows[ids], written[ids] = records, True
        assert ((owner.places >= 0) == written).all()
        owner.rows = rows
        owner.check()
        owner.tier.close()
        assert not list(tmp_path.glob(".*.part"))
    assert step > 0


# The folder


def test_what_cannot_be_opened(tmp_path):
    setting = File(tmp_path / "rows")
    with pytest.raises(InputError, match="no commit to resume"):
        setting.open(10, 8, resume=True)
    assert not (tmp_path / "rows").exists()
    opened = setting.open(10, 8)
    with pytest.raises(InputError, match="is in use") as caught:
        setting.open(10, 8)
    assert caught.value.hint
    opened.tier.commit(lambda start, stop: np.full(stop - start, -1, np.int32), {"a": [1, None]})
    opened.tier.close()
    opened.tier.close()
    with pytest.raises(InputError, match="holds the rows of an earlier run"):
        setting.open(10, 8)
    with pytest.raises(InputError, match="num_rows 10, asked for 11"):
        setting.open(11, 8, resume=True)
    with pytest.raises(InputError, match="record_bytes 8, asked for 12"):
        setting.open(10, 12, resume=True)
    opened = setting.open(10, 8, resume=True)
    assert opened.note == {"a": [1, None]}
    assert (opened.places == -1).all()
    opened.tier.close()
    with pytest.raises(InputError, match="is no folder"):
        File(tmp_path / "rows" / "lock").open(10, 8)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other files, such as rows|thesis"):
        File(tmp_path).open(10, 8)
    for num_rows, record_bytes in ((0, 8), (1 << 30, 8), (5, 0), (5, 1 << 21)):
        with pytest.raises(InputError):
            setting.open(num_rows, record_bytes)
    with pytest.raises(InputError, match="io_depth"):
        File(tmp_path, io_depth=0)


def test_another_process_is_refused(tmp_path):
    owner = filled(tmp_path)
    script = f"from vitalfew.tiers.file import File; File({str(tmp_path)!r}).open(200, 268, resume=True)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "InputError" in done.stderr
    assert "is in use" in done.stderr
    owner.check()
    owner.tier.close()


def test_a_run_that_never_committed_is_taken_over(tmp_path):
    owner = filled(tmp_path, commit=False)
    owner.tier.close()
    (tmp_path / ".commit.json.1234.part").touch()
    (tmp_path / "places-1.bin").write_bytes(b"half")
    again = filled(tmp_path, num_rows=50, record_bytes=16)
    again.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commit.json", "lock", "places-1.bin", "rows.pages"]
    again.tier.close()


def test_a_folder_that_was_removed(tmp_path):
    owner = filled(tmp_path / "rows")
    shutil.rmtree(tmp_path / "rows")
    owner.check()
    with pytest.raises(StorageError, match=r"rows.pages is gone"):
        owner.commit()
    assert not (tmp_path / "rows").exists()
    owner.check()
    owner.tier.close()


def test_nothing_stays_behind(tmp_path, backend):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    owner = filled(tmp_path)
    owner.check()
    assert owner.tier.direct == (backend != "buffered")
    assert owner.tier._file.asynchronous == (backend == "asynchronous")
    owner.tier.close()
    owner.tier.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_few_changes_make_a_small_commit(tmp_path):
    owner = filled(tmp_path, num_rows=10_000, record_bytes=64)
    whole = (tmp_path / "places-1.bin").stat().st_size
    assert whole == 40_000
    for step in range(3):
        ids = np.arange(step * 50, step * 50 + 100)
        owner.write(ids, owner.rows[ids] + 1)
        owner.commit()
        (changes,) = tmp_path.glob("changes-*.bin")
        assert changes.stat().st_size == (100 + 50 * step) * 8
        assert (tmp_path / "places-1.bin").exists()
    owner.reopen()
    owner.check()
    ids = np.arange(0, 10_000, 2)
    owner.write(ids, owner.rows[ids] + 1)
    owner.commit()
    assert [path.name for path in tmp_path.glob("*.bin")] == ["places-5.bin"]
    owner.reopen()
    owner.check()
    owner.tier.close()


def test_a_note_must_be_plain(tmp_path):
    owner = filled(tmp_path)
    with pytest.raises(InputError, match="not plain JSON"):
        owner.commit({"when": float("nan")})
    owner.commit({"step": 2})
    owner.reopen()
    assert owner.note == {"step": 2}
    owner.tier.close()
