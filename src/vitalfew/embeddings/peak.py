"""Peak memory of a way to train, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

from vitalfew.embeddings.settings import Settings

__all__ = ["peak_memory"]

_STEPS = 12
_CHILD = "from vitalfew.embeddings.peak import _answer; _answer()"


def _answer() -> None:
    """Read the request from stdin, train a few steps, write the peak to stdout."""
    from vitalfew.data.batches import Batches
    from vitalfew.data.log import EncodedLog
    from vitalfew.embeddings.fitting import train_step
    from vitalfew.embeddings.settings import build_arm
    from vitalfew.meter import peak_rss

    request = json.load(sys.stdin)
    settings = Settings.from_dict(request["settings"])
    log = EncodedLog.open(request["folder"])
    model, optimizers = build_arm(request["num_rows"], log.num_dense, settings, plain=request["plain"])
    for _, batch in zip(range(_STEPS), Batches(log, settings.batch_size, seed=settings.seed).epoch(0), strict=False):
        train_step(model, optimizers, batch)
    sys.stdout.write(str(int(peak_rss().value)))


def peak_memory(
    folder: str | os.PathLike[str], num_rows: Mapping[str, int], settings: Settings, *, plain: bool
) -> int | None:
    """Return the peak resident bytes of a fresh process that builds the model and trains a few steps.

    Parameters
    ----------
    folder
        The encoded train slice.
    plain
        Train the plain PyTorch way instead of ours.

    Returns
    -------
    int or None
        None where the process did not live to tell, as when the system has no memory for it.
    """
    request = {
        "folder": os.fspath(folder),
        "num_rows": dict(num_rows),
        "settings": settings.to_dict(),
        "plain": plain,
    }
    # In a session of its own a Ctrl-C on the terminal stops this process alone, which then ends the other one.
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    return int(child.stdout) if child.returncode == 0 else None
