from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.files import atomic_folder, atomic_write, read_document, write_document, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def umask(mask):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


# Whole or absent.


def test_a_file_appears_whole_in_folders_that_are_made(tmp_path):
    target = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(target) as file:
        file.write(b"one ")
        file.flush()
        assert not target.exists()
        file.write(b"two")
    assert target.read_bytes() == b"one two"
    assert names(target.parent) == ["file.txt"]
    write_text(str(target), "naïve\n")
    assert target.read_bytes() == "naïve\n".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_leaves_the_old_file_and_nothing_else(error, old, tmp_path):
    target = tmp_path / "file.txt"
    if old:
        target.write_bytes(old)

    def write():
        with atomic_write(target) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["file.txt"] if old else [])
    assert not old or target.read_bytes() == old


def fail_with(number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(number, tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    write_document(target, "plan", 1, {"gap": 0.5})
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_document(target, "plan", 1, {"gap": 0.25})
    with pytest.raises(OSError, match=os.strerror(number)), atomic_folder(tmp_path / "folder") as part:
        (part / "file.txt").write_bytes(b"new")
    monkeypatch.undo()
    assert names(tmp_path) == ["plan.json"]
    assert read_document(target, "plan", 1) == {"gap": 0.5}


def test_a_write_the_kernel_cuts_short_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)), atomic_write(target) as file:
            file.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["file.bin"]
    assert target.read_bytes() == b"old"


KILLED = """
import os, sys, time
from pathlib import Path
from vitalfew.core import files

def stop(*args):
    print("ready", flush=True)
    time.sleep(60)

what, folder = sys.argv[1], Path(sys.argv[2])
if what == "write":
    with files.atomic_write(folder / "plan.json") as file:
        file.write(b"half of the new")
        file.flush()
        stop()
elif what == "document":
    os.fsync = stop
    files.write_document(folder / "plan.json", "plan", 1, {"gap": 0.25})
else:
    with files.atomic_folder(folder / "folder") as part:
        (part / "file.txt").write_bytes(b"half")
        stop()
"""


@pytest.mark.parametrize("what", ["write", "document", "folder"])
def test_a_run_killed_in_the_middle_leaves_the_old_and_at_most_a_hidden_part(what, tmp_path):
    target = tmp_path / "plan.json"
    write_document(target, "plan", 1, {"gap": 0.5})
    with subprocess.Popen([sys.executable, "-c", KILLED, what, tmp_path], stdout=subprocess.PIPE) as run:
        try:
            assert run.stdout.readline() == b"ready\n"
        finally:
            run.kill()
    assert run.returncode == -signal.SIGKILL
    assert read_document(target, "plan", 1) == {"gap": 0.5}
    left = [name for name in names(tmp_path) if name != "plan.json"]
    assert len(left) == 1
    assert left[0].startswith(".")
    assert left[0].endswith(".part")
    write_document(target, "plan", 1, {"gap": 0.25})  # what is left is in nobody's way
    with atomic_folder(tmp_path / "folder") as part:
        (part / "file.txt").write_bytes(b"whole")
    assert read_document(target, "plan", 1) == {"gap": 0.25}
    assert (tmp_path / "folder" / "file.txt").read_bytes() == b"whole"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_honour_the_umask(mask, tmp_path):
    with umask(mask):
        write_text(tmp_path / "file.txt", "new")
        with atomic_folder(tmp_path / "folder") as part:
            (part / "inner.txt").write_text("new")
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "file.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "file.txt").read_text() == "new"
    assert names(tmp_path / "real") == ["file.txt"]


def test_what_is_no_regular_file_is_never_replaced(tmp_path, refuses):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "folder", "null"):
        with refuses(str(tmp_path / name)):
            write_text(tmp_path / name, "new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert names(tmp_path) == ["folder", "null", "pipe"]


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "folder"
    with atomic_folder(target) as part:
        (part / "inner").mkdir()
        (part / "inner" / "file.txt").write_text("new")
        (part / "dangling").symlink_to("nowhere")
        assert part.parent == target.parent
        assert not target.exists()
    assert names(target) == ["dangling", "inner"]
    assert (target / "inner" / "file.txt").read_text() == "new"
    assert names(target.parent) == ["folder"]


def test_an_exception_leaves_no_folder(tmp_path):
    def fill():
        with atomic_folder(tmp_path / "folder") as part:
            (part / "file.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert names(tmp_path) == []


def test_a_folder_is_never_written_over(tmp_path, refuses):
    target = tmp_path / "folder"
    with atomic_folder(target) as part:
        (part / "file.txt").write_text("old")
    with refuses(str(target)), atomic_folder(target):
        pytest.fail("the block must not run")
    assert (target / "file.txt").read_text() == "old"


def test_of_two_that_fill_one_folder_the_first_stays(tmp_path):
    def fill():
        with atomic_folder(tmp_path / "folder") as part:
            (part / "file.txt").write_text("second")
            with atomic_folder(tmp_path / "folder") as other:
                (other / "file.txt").write_text("first")

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "file.txt").read_text() == "first"


# Documents with a schema and a version.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_a_document_comes_back_as_it_was(tmp_path_factory, body):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_document(path, "plan", 3, body)
    assert read_document(path, "plan", 3) == body
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["schema", "version", *body]


def test_older_versions_are_brought_up_step_by_step(tmp_path, refuses):
    steps = {
        1: lambda body: {"gap": body["gap_percent"] / 100},
        2: lambda body: body | {"places": {}},
        3: lambda body: pytest.fail("never called: the caller understands 3"),
    }
    path = tmp_path / "plan.json"
    write_document(path, "plan", 1, {"gap_percent": 50})
    assert read_document(path, "plan", 3, steps) == {"gap": 0.5, "places": {}}
    assert read_document(path, "plan", 2, steps) == {"gap": 0.5}
    assert read_document(path, "plan", 1, steps) == {"gap_percent": 50}
    write_document(path, "plan", 2, {"gap": 0.25})
    assert read_document(path, "plan", 3, steps) == {"gap": 0.25, "places": {}}
    with refuses("version 2 can no longer be read"):
        read_document(path, "plan", 3, {1: steps[1]})
    with refuses("version 2 can no longer be read"):
        read_document(path, "plan", 3)


def test_a_newer_version_and_another_schema_are_refused(tmp_path, refuses):
    path = tmp_path / "plan.json"
    write_document(path, "plan", 5, {})
    with refuses("plan version 5, this vitalfew reads up to 4"):
        read_document(path, "plan", 4)
    with refuses("'vitalfew/plan', not a vitalfew receipt"):
        read_document(path, "receipt", 5)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "not a JSON document"),
        ("{", "not a JSON document"),
        ('{"schema": "vitalfew/plan", "version": 1, "gap": NaN}', "NaN"),
        ('{"schema": "vitalfew/plan", "version": 1, "gap": 1e999}', "1e999"),
        ('{"schema": "vitalfew/plan", "version": 1, "gap": [-Infinity]}', "-Infinity"),
        ('{"schema": "vitalfew/plan", "version": 1, "a": {"gap": 1, "gap": 2}}', "'gap' twice"),
        ("[1]", "'list'"),
        ("null", "'NoneType'"),
        ('{"version": 1}', "None"),
        ('{"schema": 4, "version": 1}', "4"),
        ('{"schema": "vitalfew/plan"}', "version None"),
        ('{"schema": "vitalfew/plan", "version": 0}', "version 0"),
        ('{"schema": "vitalfew/plan", "version": "1"}', "version '1'"),
        ('{"schema": "vitalfew/plan", "version": true}', "version True"),
        ('{"schema": "vitalfew/plan", "version": 1.5}', "version 1.5"),
    ],
)
def test_what_is_no_document_is_refused(text, shown, tmp_path, refuses):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with refuses(shown):
        read_document(path, "plan", 1)
    with refuses(str(path)):
        read_document(path, "plan", 1)


def test_a_path_that_holds_no_text_is_refused(tmp_path, refuses):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "bytes.json"):
        with refuses(str(path)):
            read_document(path, "plan", 1)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_not_written(number, tmp_path):
    write_document(tmp_path / "plan.json", "plan", 1, {"gap": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_document(tmp_path / "plan.json", "plan", 1, {"gaps": [0.1, {"x": number}]})
    assert names(tmp_path) == ["plan.json"]
    assert read_document(tmp_path / "plan.json", "plan", 1) == {"gap": 0.5}


@pytest.mark.parametrize("key", ["schema", "version"])
def test_the_body_cannot_pose_as_another_document(key, tmp_path):
    with pytest.raises(AssertionError):
        write_document(tmp_path / "plan.json", "plan", 1, {key: 2})
