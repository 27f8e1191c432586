"""Runs that are stopped, killed, or meet a full disk: what is whole stays whole, and --resume ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vitalfew.core import InputError, Receipt
from vitalfew.embeddings.preparing import alone

from .conftest import TRAIN, Cli, Start, listing, write_clicks

LONG = (*TRAIN, "--epochs", 30, "--checkpoint-seconds", 0.02)
RESUME = ("train", "--out", "a", "--resume", "--checkpoint-seconds", 0.02)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "weights.safetensors").read_bytes()


def wait_for(seen: Callable[[], object]) -> None:
    """Wait until something is there."""
    end = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.001)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole_once(start_in: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result = start_in(folder, "train", write_clicks(folder / "clicks.parquet"), *LONG, "--out", "whole").wait()
    assert result.code == 0, result.err
    return folder / "whole"


@pytest.fixture
def whole(whole_once: Path, tmp_path: Path) -> Path:
    """An uninterrupted run on the same log."""
    return Path(shutil.copytree(whole_once, tmp_path / "whole"))


@pytest.fixture
def killed(start: Start, whole: Path, log: Path) -> Path:
    """A run killed behind its second checkpoint."""
    folder = whole.parent / "a"
    running = start("train", log, *LONG, "--out", "a")
    wait_for(lambda: len(checkpoints(folder)) > 1)
    running.kill()
    assert running.wait().code == -signal.SIGKILL
    assert not (folder / "model").exists()
    return folder


def test_kill_and_resume(cli: Cli, killed: Path, whole: Path, log: Path) -> None:
    assert len(checkpoints(killed)) == 2
    log.unlink()  # its encoding is in the folder
    result = cli(*RESUME)
    assert result.code == 0, result.err
    assert weights(killed) == weights(whole)
    receipt = Receipt.load(killed / "receipt.json")
    assert any(note.startswith("resumed at step ") for note in receipt.notes)
    assert receipt.command.endswith("--out a")
    assert sorted(listing(killed)) == sorted(listing(whole))


def test_predictions_after_kill_and_resume(cli: Cli, killed: Path, whole: Path, log: Path) -> None:
    assert cli(*RESUME).code == 0
    for run in (killed, whole):
        assert cli("predict", run, log, "--out", f"{run.name}.csv").code == 0
    assert (whole.parent / "a.csv").read_bytes() == (whole.parent / "whole.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_until_done(start: Start, whole: Path, log: Path, seed: int) -> None:
    """Whenever the kill comes, the next sitting goes on; the first may have left nothing at all."""
    rng = random.Random(seed)
    folder = whole.parent / "a"
    for sitting in range(9):
        argv = RESUME if (folder / "run.json").exists() else ("train", log, *LONG, "--out", "a")
        running = start(*argv)
        if sitting < 8:
            time.sleep(rng.uniform(0, 0.8))
            if not (folder / "receipt.json").exists():
                running.kill()
        result = running.wait()
        assert result.code in (0, -signal.SIGKILL), result.err
    assert result.code == 0
    assert weights(folder) == weights(whole)


def test_a_run_killed_as_it_began_left_nothing(cli: Cli, log: Path) -> None:
    folder = log.parent / "a"
    folder.mkdir()
    (folder / ".run.json.0123.part").write_bytes(b"{")
    assert cli("train", log, *TRAIN, "--out", "a").code == 0
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("what", ["encode", "count ids"])
def test_kill_before_the_training(start: Start, cli: Cli, whole: Path, log: Path, what: str) -> None:
    folder = whole.parent / "a"
    write_clicks(log, 200_000)  # long enough to be met in the middle
    before = {path.name for path in whole.parent.iterdir()}
    running = start("train", log, *TRAIN, "--batch-size", 4096, "--out", "a")
    wait_for(lambda: list(folder.glob(".data*" if what == "encode" else "run.json")))
    running.kill()
    running.wait()
    assert not (folder / "encoder").exists()
    assert cli("train", log, *TRAIN, "--out", "a").err.startswith("error: a holds a run already\nhint: go on with it")
    result = cli(*RESUME)
    assert result.code == 0, result.err
    assert not list(folder.glob(".*"))
    assert {path.name for path in whole.parent.iterdir()} == before | {"a"}


def test_stopped_by_ctrl_c(start: Start, cli: Cli, whole: Path, log: Path) -> None:
    folder = whole.parent / "a"
    running = start("train", log, *LONG, "--out", "a")
    wait_for(lambda: len(checkpoints(folder)) > 1)
    running.kill(signal.SIGINT)
    result = running.wait()
    assert result.code == 130
    assert result.out == ""
    assert result.err == "stopped\nhint: go on with: vitalfew train --out a --resume\n"
    assert not list(folder.glob(".*"))
    assert cli(*RESUME).code == 0
    assert weights(folder) == weights(whole)


def test_ctrl_c_while_encoding_leaves_nothing(start: Start, log: Path, tmp_path: Path) -> None:
    write_clicks(log, 200_000)
    before = listing(tmp_path)
    running = start("train", log, *TRAIN, "--out", "runs/a")
    wait_for(lambda: (tmp_path / "runs" / "a" / "run.json").exists())
    running.kill(signal.SIGINT)
    result = running.wait()
    assert (result.code, result.err) == (130, "stopped\n")
    assert listing(tmp_path) == before


def damage(checkpoint: Path) -> None:
    file = checkpoint / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(cli: Cli, killed: Path, whole: Path) -> None:
    older, newest = checkpoints(killed)
    damage(newest)
    result = cli(*RESUME)
    assert result.code == 0, result.err
    assert weights(killed) == weights(whole)
    notes = Receipt.load(killed / "receipt.json").notes
    assert f"{newest.name} was damaged: the one before it was taken" in notes
    assert f"resumed at step {int(older.name[-9:]):,} of " in " ".join(notes)


def test_no_whole_checkpoint(refused: Callable[..., str], cli: Cli, killed: Path, whole: Path) -> None:
    for checkpoint in checkpoints(killed):
        damage(checkpoint)
    assert "is damaged" in refused(*RESUME)
    for checkpoint in checkpoints(killed):
        shutil.rmtree(checkpoint)
    assert cli(*RESUME).code == 0
    assert weights(killed) == weights(whole)


def test_the_encoding_is_gone(cli: Cli, killed: Path, whole: Path) -> None:
    shutil.rmtree(killed / "data")
    assert cli(*RESUME).code == 0
    assert weights(killed) == weights(whole)


def test_the_encoding_is_gone_and_the_log_has_changed(refused: Callable[..., str], killed: Path, log: Path) -> None:
    shutil.rmtree(killed / "encoder")
    os.utime(log, (1, 1))
    assert refused(*RESUME) == f"`{log}` has changed since the run began"
    log.unlink()
    assert refused(*RESUME) == "the log has lost or gained files since the run began"


def test_the_encoding_is_damaged(refused: Callable[..., str], killed: Path) -> None:
    file = killed / "data" / "train" / "label.f32"
    file.write_bytes(file.read_bytes()[:-4])
    assert "label.f32` has " in refused(*RESUME)


def test_resume_from_another_folder(cli: Cli, killed: Path, whole: Path) -> None:
    about = json.loads((killed / "run.json").read_text())
    assert about["folder"] == str(whole.parent)
    away = killed.parent / "elsewhere"
    away.mkdir()
    killed.rename(away / "a")
    shutil.rmtree(away / "a" / "data")
    assert cli("train", "--out", "elsewhere/a", "--resume").code == 0
    assert weights(away / "a") == weights(whole)


def test_resume_of_a_finished_run_prints_its_receipt(cli: Cli, whole: Path) -> None:
    before = weights(whole), (whole / "receipt.json").read_bytes()
    (whole / "report.html").unlink()
    (whole / "data").mkdir()  # a kill may come before the last of it is tidied up
    result = cli("train", "--out", "whole", "--resume", "--format", "json")
    assert result.code == 0
    assert result.json() == Receipt.load(whole / "receipt.json").to_dict()
    assert (weights(whole), (whole / "receipt.json").read_bytes()) == before
    assert (whole / "report.html").exists()
    assert not (whole / "data").exists()


def test_kill_behind_the_training(cli: Cli, whole: Path, log: Path) -> None:
    """The model is there, its receipt is not: nothing is trained again."""
    (whole / "receipt.json").rename(whole.parent / "former.json")
    before = listing(whole / "model")
    assert cli("predict", "whole", log, "--out", "scores.csv").code == 0
    about = json.loads((whole / "run.json").read_text())
    assert about["notes"] == []
    assert cli("train", "--out", "whole", "--resume").code == 0
    assert listing(whole / "model") == before
    former, receipt = Receipt.load(whole.parent / "former.json"), Receipt.load(whole / "receipt.json")
    assert receipt.lines == former.lines


def test_resume_takes_no_other_settings(refused: Callable[..., str], killed: Path, log: Path) -> None:
    del killed
    assert refused(*RESUME, "--lr", 0.5) == "--resume goes on with the run as it began, and got --lr"
    assert refused(*RESUME, "--pairs", 0) == "--resume goes on with the run as it began, and got --pairs"
    assert refused(*RESUME, log) == "--resume goes on with the run as it began, and got a log"
    assert refused("train", "--out", "nowhere", "--resume") == "nowhere holds no run to go on with"


def test_two_at_once(start: Start, refused: Callable[..., str], killed: Path, whole: Path) -> None:
    running = start("train", "--out", "a", "--resume")
    wait_for(lambda: locked(killed))
    running.kill(signal.SIGSTOP)
    assert refused(*RESUME) == "another process is at work in a"
    running.kill(signal.SIGCONT)
    assert running.wait().code == 0
    assert weights(killed) == weights(whole)


def locked(folder: Path) -> bool:
    try:
        with alone(folder):
            return False
    except InputError:
        return True


def test_full_disk_while_encoding(refused: Callable[..., str], log: Path) -> None:
    refused("train", log, *TRAIN, "--out", "runs/a", file_bytes=2000)


def test_full_disk_at_a_checkpoint(cli: Cli, start: Start, killed: Path, whole: Path) -> None:
    before = checkpoints(killed)
    size = (before[-1] / "weights.safetensors").stat().st_size
    result = cli(*RESUME, file_bytes=size // 2)
    assert result.code == 2
    assert re.fullmatch(r"error: .+\nhint: check the path, its permissions and the free space\n", result.err)
    assert checkpoints(killed) == before[-1:]
    assert not list(killed.glob(".*"))
    assert cli(*RESUME).code == 0
    assert weights(killed) == weights(whole)
