"""Texts come out of files as they were put in, and what is no text is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.generate.texts import read_prompt, read_texts


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_plain_file_is_one_text(tmp_path: Path, name: str) -> None:
    content = "two\n\nparagraphs \u2028 and a line separator\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_texts(tmp_path / name) == [content.decode()]
    assert read_prompt(tmp_path / name) == content.decode()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), st.booleans())
def test_json_lines_keep_order_and_letters(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], raw: bool
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": text, "id": k}, ensure_ascii=not raw) for k, text in enumerate(texts)]
    file.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    if any(text.strip() for text in texts):
        assert read_texts(file) == texts
    else:
        with pytest.raises(InputError, match="no text"):
            read_texts(file)


def test_the_first_known_key_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"article": "a", "prompt": "p"}\n\n{"summary": "s", "article": "b"}\n')
    assert read_texts(file) == ["p", "b"]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / "notes.md").write_text("never")
    assert read_texts(tmp_path) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text", "neither .txt nor .jsonl"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8 (byte 3)"),
        ("a.txt.gz", b"plain", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"whole" * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", b'{"body": "a"}', "line 1 has body"),
        ("a.jsonl", b'["a"]', "line 1 is"),
        ("a.jsonl", b'{"text": 3}', 'no text under "text"'),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as found:
        read_texts(tmp_path / name)
    assert said in found.value.message
    assert found.value.hint


def test_absent_empty_and_too_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"holds no \.txt"):
        read_texts(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    with pytest.raises(InputError, match="holds 2 texts"):
        read_prompt(tmp_path / "a.jsonl")
