"""Read the files implicit feedback comes in: who touched what, without labels or times. Each is read whole, at once."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitalfew.core.errors import InputError

__all__ = ["Bags", "LibFM", "Pairs", "read_adjacency", "read_bags", "read_libfm", "read_pairs"]

PathLike = str | os.PathLike[str]
Ids = NDArray[np.int64]
_MOST_DIGITS = 18  # every number of so many digits is an int64
_LONGEST_FLOAT = 32


class Pairs(NamedTuple):
    """Who touched what, in file order; entry i of `users` belongs to entry i of `items`.

    Attributes
    ----------
    users, items
        Ids as they are in the file.
    num_users, num_items
        One more than the largest id; users without items count too.
    """

    users: Ids
    items: Ids
    num_users: int
    num_items: int


class Bags(NamedTuple):
    """Bags of ids in file order: bag b is ``ids[offsets[b] : offsets[b + 1]]``."""

    ids: Ids
    offsets: Ids


class LibFM(NamedTuple):
    """Labelled rows of features: row r has ``ids[offsets[r] : offsets[r + 1]]`` and the values beside them.

    Examples
    --------
    >>> rows = LibFM(np.array([1.0, -1.0]), np.array([0, 7, 1, 9]), np.ones(4), np.array([0, 2, 4]))
    >>> rows.fields().tolist()
    [[0, 7], [1, 9]]
    """

    labels: NDArray[np.float64]
    ids: Ids
    values: NDArray[np.float64]
    offsets: Ids

    def fields(self) -> Ids:
        """Return the ids as one column for each field, where all rows have as many.

        Raises
        ------
        InputError
            If a row has more or fewer than the first.
        """
        lengths = np.diff(self.offsets)
        if (wrong := np.flatnonzero(lengths != lengths[0])).size:
            raise InputError(
                f"row {wrong[0]} has {lengths[wrong[0]]} features, row 0 has {lengths[0]}",
                hint="use `ids` and `offsets`",
            )
        return self.ids.reshape(len(lengths), -1)


def read_pairs(path: PathLike) -> Pairs:
    r"""Read lines of ``user item``; gzip is told by its first bytes.

    Raises
    ------
    InputError
        If the file is absent, damaged or empty, or a line is anything else; it names the line.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs.txt"
    >>> _ = file.write_text("1 20\n1 30\n3 20")
    >>> read_pairs(file)
    Pairs(users=array([1, 1, 3]), items=array([20, 30, 20]), num_users=4, num_items=31)

    Notes
    -----
    Cost: about 25 bytes of memory for each byte of the file. A log with more columns is for `open_log`.
    """
    text = _Text.read(path)
    in_line = np.repeat(text.lengths, text.lengths)
    text.demand(in_line == 2, text.begins, "`user item`")
    users, items = text.integers(text.begins, text.ends, "two whole numbers, `user item`").reshape(-1, 2).T.copy()
    return Pairs(users, items, int(users.max()) + 1, int(items.max()) + 1)


def read_adjacency(path: PathLike) -> Pairs:
    r"""Read lines of ``user item item ...``; a user may have no item, and more than one line.

    Raises
    ------
    InputError
        As `read_pairs`.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "adjacency.txt"
    >>> _ = file.write_text("0 20 30\n1 \n2 20\n3")
    >>> read_adjacency(file)
    Pairs(users=array([0, 0, 2]), items=array([20, 30, 20]), num_users=4, num_items=31)
    """
    text = _Text.read(path)
    ids = text.integers(text.begins, text.ends, "whole numbers, `user item item ...`")
    first = text.first_of_line()
    users, items = ids[first], ids[~first]
    if not len(items):
        raise InputError(f"no user of `{path}` has an item", hint="expected lines of `user item item ...`")
    num_items = text.lengths[text.lengths > 0] - 1
    return Pairs(np.repeat(users, num_items), items, int(users.max()) + 1, int(items.max()) + 1)


def read_bags(path: PathLike) -> Bags:
    r"""Read one bag of ids per line; an empty line is an empty bag, and ids may repeat.

    Raises
    ------
    InputError
        As `read_pairs`.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "baskets.dat"
    >>> _ = file.write_text("1 2 3 \n\n7")
    >>> read_bags(file)
    Bags(ids=array([1, 2, 3, 7]), offsets=array([0, 3, 3, 4]))
    """
    text = _Text.read(path)
    ids = text.integers(text.begins, text.ends, "whole numbers")
    return Bags(ids, np.append(0, np.cumsum(text.lengths)))


def read_libfm(path: PathLike) -> LibFM:
    r"""Read lines of ``label id:value id:value ...``, the format of libFM and libSVM.

    Raises
    ------
    InputError
        As `read_pairs`.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "rows.libfm"
    >>> _ = file.write_bytes(b"1 3:1 9:0.5\r\n-1 4:1\r\n")
    >>> rows = read_libfm(file)
    >>> rows.labels.tolist(), rows.ids.tolist(), rows.values.tolist(), rows.offsets.tolist()
    ([1.0, -1.0], [3, 9, 4], [1.0, 0.5, 1.0], [0, 2, 3])
    """
    text, shape = _Text.read(path), "`label id:value id:value ...`"
    colon = text.raw == ord(":")
    before = np.append(0, np.cumsum(colon))
    first = text.first_of_line()
    text.demand(before[text.ends] - before[text.begins] == ~first, text.begins, shape)
    begins, ends, at = text.begins[~first], text.ends[~first], np.flatnonzero(colon)
    text.demand((begins < at) & (at < ends - 1), begins, shape)
    return LibFM(
        text.floats(text.begins[first], text.ends[first], f"a number as the label, {shape}"),
        text.integers(begins, at, f"a whole number as the id, {shape}"),
        text.floats(at + 1, ends, f"a number as the value, {shape}"),
        np.append(0, np.cumsum(text.lengths[text.lengths > 0] - 1)),
    )


class _Text(NamedTuple):
    """The bytes of a file, and the words between its blanks."""

    path: PathLike
    raw: NDArray[np.uint8]
    begins: Ids
    ends: Ids
    lengths: Ids
    """Words of each line."""

    @classmethod
    def read(cls, path: PathLike) -> _Text:
        try:
            data = Path(path).read_bytes()
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
        except FileNotFoundError:
            raise InputError(f"no such file: {path}", hint="check the path") from None
        except IsADirectoryError:
            raise InputError(f"{path} is a folder", hint="name a file inside it") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"`{path}` is damaged ({error})", hint="copy it again") from None
        raw = np.frombuffer(data, np.uint8)
        edges = np.flatnonzero(np.diff(raw > ord(" "), prepend=False, append=False))
        begins, ends = edges[::2], edges[1::2]
        if not len(begins):
            raise InputError(f"`{path}` is empty", hint="check that it was written to its end")
        stops = np.flatnonzero(raw == ord("\n"))
        if not data.endswith(b"\n"):
            stops = np.append(stops, len(raw))
        return cls(path, raw, begins, ends, np.diff(np.searchsorted(begins, stops), prepend=0))

    def first_of_line(self) -> NDArray[np.bool_]:
        """Return which words stand first in their line."""
        first = np.zeros(len(self.begins), np.bool_)
        first[(np.cumsum(self.lengths) - self.lengths)[self.lengths > 0]] = True
        return first

    def demand(self, met: NDArray[np.bool_], at: Ids, wanted: str) -> None:
        """Refuse the file where something is not met, with the line of the first such place."""
        if not met.all():
            line = int(np.count_nonzero(self.raw[: at[met.argmin()]] == ord("\n")))
            found = bytes(self.raw).split(b"\n")[line].strip()[:60].decode(errors="replace")
            raise InputError(f"line {line + 1} of `{self.path}` is {found!r}", hint=f"expected {wanted}")

    def integers(self, begins: Ids, ends: Ids, wanted: str) -> Ids:
        """Return the numbers that stand between these places."""
        digit = self.raw - np.uint8(ord("0"))  # other signs wrap around to 10 and more
        width = ends - begins
        self.demand(_within(digit < 10, begins, ends) & (width <= _MOST_DIGITS), begins, wanted)
        numbers = np.zeros(len(begins), np.int64)
        for place in range(int(width.max(initial=0))):
            more = place < width
            numbers[more] = 10 * numbers[more] + digit[begins[more] + place]
        return numbers

    def floats(self, begins: Ids, ends: Ids, wanted: str) -> NDArray[np.float64]:
        """Return the numbers that stand between these places; they may have signs, points and exponents."""
        width = ends - begins
        usual = np.isin(self.raw, np.frombuffer(b"0123456789+-.eE", np.uint8))
        self.demand(_within(usual, begins, ends) & (width <= _LONGEST_FLOAT), begins, wanted)
        places = begins[:, None] + np.arange(width.max(initial=1))
        letters = np.where(places < ends[:, None], self.raw[np.minimum(places, len(self.raw) - 1)], 0)
        words = letters.astype(np.uint8).view(f"S{letters.shape[1]}")[:, 0]
        try:
            found = words.astype(np.float64)
        except ValueError:  # such as 1.2.3
            self.demand(np.fromiter(map(_is_float, words), np.bool_, len(words)), begins, wanted)
            raise
        self.demand(np.isfinite(found), begins, wanted)  # such as 1e999
        return found


def _within(usual: NDArray[np.bool_], begins: Ids, ends: Ids) -> NDArray[np.bool_]:
    """Return which spans consist of usual bytes only."""
    before = np.append(0, np.cumsum(usual))
    return np.asarray(before[ends] - before[begins] == ends - begins)


def _is_float(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
