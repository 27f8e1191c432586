"""What the same user clicked before: the history that a row of a log brings to a model that reads them."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from vitalfew.core.errors import InputError
from vitalfew.data.encode import Encoder
from vitalfew.data.encoded import Encoded
from vitalfew.data.vocabulary import Direct

__all__ = ["Histories"]

_FILE = "histories.npz"
_ARRAYS = ("ids", "dense", "when", "count")


class Histories:
    """The latest rows with label 1 of each user, as rows of a log go by in the order of time.

    Those of the same time as a row are not yet history for it: what was shown at once is answered at once.

    Parameters
    ----------
    encoder
        Made the rows. None of its features may be a list or hold row numbers.
    by
        The feature that names the user. A user who was missing or rare when the encoder learned has no history.
    length
        Rows of a history.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data import infer_schema, open_log
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> rows = ["click,user,item", "1,ann,tea", "0,ann,jam", "1,bob,jam", "1,ann,fig"]
    >>> _ = file.write_text(chr(10).join(rows))
    >>> log = open_log(file)
    >>> encoder = Encoder.fit(log, infer_schema(log, label="click"))
    >>> flat = encoder.encode(next(encoder.batches(log)))
    >>> wide = Histories(encoder, "user", 2).widen(flat)
    >>> wide.ids.reshape(4, 3, 2)[3].tolist()  # nothing, then tea, then the row itself
    [[0, 0], [1, 2], [1, 3]]

    Notes
    -----
    Cost: the rows of all histories in memory, at once; one copy of each history.
    """

    def __init__(self, encoder: Encoder, by: str, length: int) -> None:
        if length < 1:
            raise InputError(f"a history has 1 row or more, got {length}", hint="20 is a usual length")
        if by not in encoder.tables:
            raise InputError(f"there is no feature `{by}`", hint=f"there are {', '.join(encoder.tables)}")
        if encoder.schema.lists:
            raise InputError(
                f"`{encoder.schema.lists[0]}` holds lists, and rows of a history hold one value each",
                hint="leave it out with --ignore",
            )
        for name, table in encoder.tables.items():
            if isinstance(table, Direct):
                raise InputError(
                    f"`{name}` holds row numbers, of which none is free for histories that are short",
                    hint="leave --direct out",
                )
        self.by, self.length = by, length
        self._user = list(encoder.tables).index(by)
        users, features = encoder.num_rows[by], len(encoder.tables)
        # In a ring: the row after the latest is the oldest.
        narrow = max(encoder.num_rows.values()) < 2**31
        self._ids = np.zeros((users, length, features), np.int32 if narrow else np.int64)
        self._dense = np.zeros((users, length, len(encoder.schema.numeric)), np.float32)
        self._when = np.zeros((users, length), np.int64)
        self._count = np.zeros(users, np.int64)
        self._latest: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all histories."""
        return sum(getattr(self, f"_{name}").nbytes for name in _ARRAYS)

    def widen(self, rows: Encoded) -> Encoded:
        """Return rows with their histories in front of them, the oldest first; then those with label 1 are history.

        Parameters
        ----------
        rows
            In the order of time. Without labels, as for a prediction, the histories stay as they are.

        Returns
        -------
        Encoded
            Dense inputs of shape (n, (length + 1) * columns) and ids of shape (n, (length + 1) * F). A history that is
            short has zeros in front.

        Raises
        ------
        InputError
            If a row is earlier than the one before.
        """
        if rows.time is not None and len(rows):
            before = np.concatenate(([rows.time[0] if self._latest is None else self._latest], rows.time[:-1]))
            if (early := np.flatnonzero(rows.time < before)).size:
                raise InputError(
                    f"the log is not in the order of time: {rows.time[early[0]]} comes after {before[early[0]]}",
                    hint="sort it: a history is what came before",
                )
            self._latest = int(rows.time[-1])
        items = self.length + 1
        ids = np.zeros((len(rows), items, rows.ids.shape[1]), np.int64)
        dense = np.zeros((len(rows), items, rows.dense.shape[1]), np.float32)
        label = np.empty(0, np.float32) if rows.label is None else rows.label
        time = np.empty(0, np.int64) if rows.time is None else rows.time
        kept = (self._ids, self._dense, self._when, self._count)
        _widen(rows.ids, rows.dense, label, time, self._user, *kept, ids, dense)
        return Encoded(_flat(dense), _flat(ids), label=rows.label, time=rows.time)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `histories.npz` into a folder: plain numbers, no pickle."""
        with (Path(folder) / _FILE).open("wb") as file:
            np.savez(file, **{name: getattr(self, f"_{name}") for name in _ARRAYS})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: Encoder, by: str, length: int) -> Histories:
        """Read what `save` wrote."""
        found, path = cls(encoder, by, length), Path(folder) / _FILE
        try:
            # Opened here, since NumPy leaves a file open that turns out to be damaged.
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                for name in _ARRAYS:
                    mine: npt.NDArray[Any] = getattr(found, f"_{name}")
                    mine[...] = arrays[name]
        except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(f"`{path}` cannot be read ({error})", hint="train again") from None
        return found


def _flat(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x.reshape(len(x), x.shape[1] * x.shape[2])


@njit(cache=True, nogil=True)
def _widen(
    ids: Any, dense: Any, label: Any, time: Any, user: int, seen: Any, seen_dense: Any, when: Any, count: Any, out: Any,
    out_dense: Any,
) -> None:  # fmt: skip
    length = seen.shape[1]
    for i in range(len(ids)):
        out[i, length], out_dense[i, length] = ids[i], dense[i]
        who = ids[i, user]
        if who == 0:  # the row of all who are missing or rare
            continue
        first, end = max(0, count[who] - length), count[who]
        while len(time) and end > first and when[who, (end - 1) % length] == time[i]:
            end -= 1
        for k in range(first, end):
            out[i, length - end + k] = seen[who, k % length]
            out_dense[i, length - end + k] = seen_dense[who, k % length]
        if len(label) and label[i] == 1:
            at = count[who] % length
            seen[who, at], seen_dense[who, at] = ids[i], dense[i]
            if len(time):
                when[who, at] = time[i]
            count[who] += 1
