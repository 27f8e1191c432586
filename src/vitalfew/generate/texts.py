"""Texts and prompts from files that people have: plain text, JSON lines, also compressed, or a folder of them."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

from vitalfew.core.errors import InputError

__all__ = ["read_prompt", "read_texts"]

_KEYS = ("text", "prompt", "article")
_HINT = 'a .txt file is one text; each line of a .jsonl file is an object with "text", "prompt" or "article"'


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Return the texts of a file, in order.

    Parameters
    ----------
    path
        A ``.txt`` file, which is one text; a ``.jsonl`` file, where each line is an object with the text under
        ``text``, ``prompt`` or ``article`` (the first of these that is there); either as ``.gz``; or a folder of such
        files, taken by name.

    Raises
    ------
    InputError
        If the file is absent, empty, of another kind, damaged, or not UTF-8.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.jsonl"
    >>> _ = file.write_text('{"text": "first"}' + chr(10) + '{"prompt": "second"}')
    >>> read_texts(file)
    ['first', 'second']
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(each for each in source.iterdir() if _kind(each) and not each.name.startswith("."))
        if not files:
            raise InputError(f"{source} holds no .txt or .jsonl file", hint=_HINT)
        return [text for file in files for text in read_texts(file)]
    if not source.exists():
        raise InputError(f"no such file: {source}", hint="check the path")
    kind = _kind(source)
    if not kind:
        raise InputError(f"{source} is neither .txt nor .jsonl", hint=f"{_HINT}; both may be .gz")
    text = _decode(source)
    texts = [text] if kind == ".txt" else _lines(source, text)
    if not any(text.strip() for text in texts):
        raise InputError(f"{source} holds no text", hint=_HINT)
    return texts


def read_prompt(path: str | os.PathLike[str]) -> str:
    """Return the one text of a file; ``-`` is standard input.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "long.txt"
    >>> _ = file.write_text("Once upon a time")
    >>> read_prompt(file)
    'Once upon a time'
    """
    if os.fspath(path) == "-":
        return sys.stdin.read()
    texts = read_texts(path)
    if len(texts) > 1:
        raise InputError(f"{path} holds {len(texts)} texts, one is needed", hint="name a .txt file")
    return texts[0]


def _kind(file: Path) -> str:
    """Return ``.txt`` or ``.jsonl``, or nothing for a file of another kind."""
    kind = Path(file.name.removesuffix(".gz")).suffix
    return kind if kind in (".txt", ".jsonl") else ""


def _decode(file: Path) -> str:
    content = file.read_bytes()
    try:
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError) as error:
        raise InputError(f"{file} cannot be unpacked ({error})", hint="is the file whole?") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start:,})", hint="convert it: iconv -t UTF-8") from None


def _lines(file: Path, content: str) -> list[str]:
    texts = []
    # Other ends of lines, such as U+2028, may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number} is no JSON ({error})", hint=_HINT) from None
        key = next((key for key in _KEYS if key in entry), None) if isinstance(entry, dict) else None
        if key is None or not isinstance(entry[key], str):
            found = f"has {', '.join(entry) or 'nothing'}" if isinstance(entry, dict) else f"is {line[:40]!r}"
            if key is not None:
                found = f'has no text under "{key}"'
            raise InputError(f"{file}, line {number} {found}", hint=_HINT)
        texts.append(entry[key])
    return texts
