"""Which records of a file live, which pages the last commit needs, and which pages may be written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitalfew.core.errors import StorageError
from vitalfew.tiers import _pages
from vitalfew.tiers._direct import FULL, DirectFile
from vitalfew.tiers.lower import Places

__all__ = ["Longs", "Space", "mask_bytes"]

Longs = NDArray[np.int64]

_GROW_BYTES = 16 << 20
_SLACK_PAGES = 16
_WINDOW = 1 << 16


def _bits(layout: _pages.Layout) -> type[np.unsignedinteger]:
    """Return the smallest word with a bit for each record of a page."""
    return np.uint16 if layout.records_per_page <= 16 else np.uint32 if layout.records_per_page <= 32 else np.uint64


def mask_bytes(layout: _pages.Layout, num_rows: int) -> int:
    """Return the bytes of the masks of a file as large as it can become: four times its rows, and a little more."""
    pages = 4 * -(-num_rows // layout.records_per_page) + _GROW_BYTES // layout.page_bytes
    return pages * (np.dtype(_bits(layout)).itemsize + 1)


class Space:
    """The pages of a file: one bit per record that lives, and one flag per page that the last commit refers to.

    No page is handed out while a live record or the last commit needs it. Every search looks at a bounded window of
    pages and goes on from there the next time, so that no call is long in a large file.
    """

    def __init__(self, file: DirectFile, layout: _pages.Layout) -> None:
        self._file, self._layout = file, layout
        self._live = np.zeros(0, _bits(layout))
        self._committed = np.zeros(0, np.bool_)
        self.pages = 0  # that were ever used; those behind them are reserved
        self.rows = self.holding = self.free = (
            0  # live rows, pages with such, pages that neither a row nor a commit has
        )
        self._next_free = self._next_look = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the masks."""
        return self._live.nbytes + self._committed.nbytes

    @property
    def live(self) -> NDArray[np.unsignedinteger]:
        """The bits of the live records of each page."""
        return self._live[: self.pages]

    def pages_for(self, rows: int) -> int:
        """Return how many pages so many rows need."""
        return -(-rows // self._layout.records_per_page)

    def restore(self, pages: int, places: Places) -> bool:
        """Begin with what a commit holds; return False if that cannot be."""
        self._make_room()
        holding = _pages.set_live(self._live[:pages], places, self._layout.records_per_page)
        self.pages, self.holding, self.free = pages, holding, pages - holding
        self.rows = int(np.count_nonzero(places >= 0))
        self._committed = self._live > 0
        return int(holding) >= 0

    def find(self, count: int) -> Longs:
        """Return pages to write: free ones near those last found, then the end of the file."""
        found = self._free_pages(count, max(_WINDOW, 64 * count))
        try:
            self._enlarge(count - len(found))
        except StorageError as error:
            if error.errno not in FULL:
                raise
            found = self._free_pages(count, self.pages)
            self._enlarge(count - len(found))
        return np.concatenate([found, np.arange(self.pages, self.pages + count - len(found))])

    def occupy(self, pages: Longs, rows: int) -> Places:
        """Take note that so many records have been written to pages that were found; return their places."""
        per_page = self._layout.records_per_page
        places = (pages[:, None] * per_page + np.arange(per_page)).reshape(-1)[:rows].astype(np.int32)
        beyond = int(np.count_nonzero(pages >= self.pages))
        self.pages += beyond
        self.free -= len(pages) - beyond
        self.holding += _pages.set_live(self._live, places, per_page)
        self.rows += rows
        return places

    def release(self, places: Places) -> None:
        """Take note that records are dead."""
        emptied, freed = _pages.clear_live(self._live, self._committed, places, self._layout.records_per_page)
        assert emptied >= 0, f"place {places[freed]} is released twice"
        self.rows -= len(places)
        self.holding -= emptied
        self.free += freed

    def are_live(self, places: Places) -> bool:
        """Tell whether all these are places of live records, or -1."""
        live = _pages.are_live(self._live, places, self._layout.records_per_page)
        return bool(live == np.count_nonzero(places >= 0))

    def sparse(self, writing: int) -> Longs:
        """Choose pages to empty while so many are written.

        None, as long as pages with live rows are at most twice those that the rows need, and a few. Beyond that, the
        emptiest; at most half full, two of them make up for one page written.
        """
        excess = self.holding - 2 * self.pages_for(self.rows) - _SLACK_PAGES
        if excess <= 0:
            return np.empty(0, np.int64)
        most = min(2 * writing + 8, 2 * excess)
        window, start = max(_WINDOW, 64 * most), self._next_look
        self._next_look = (start + window) % self.pages if window < self.pages else 0
        half = max(1, self._layout.records_per_page // 2)
        pages, records = _pages.emptiest(self.live, start, window, most, half)
        return np.sort(pages) if self.pages_for(records) < len(pages) else pages[:0]

    def keep(self) -> NDArray[np.bool_]:
        """Return the pages that a commit of the present content refers to, and keep those of the last one as well."""
        pages = self._live > 0
        self._committed |= pages
        return pages

    def settle(self, pages: NDArray[np.bool_]) -> None:
        """Let go of pages that only an older commit needed."""
        self._committed = pages
        self.free = self.pages - self.holding

    def _free_pages(self, count: int, window: int) -> Longs:
        found = np.empty(min(count, self.free), np.int64)
        if not len(found):
            return found
        number, self._next_free = _pages.find_free(self.live, self._committed, self._next_free, window, found)
        return found[:number]

    def _enlarge(self, pages: int) -> None:
        """Make sure of this many pages behind those that were ever used, on the disk and in the masks."""
        need, width = self.pages + pages, self._layout.page_bytes
        if need <= len(self._live):
            return
        if need * self._layout.records_per_page >= 1 << 31:
            raise StorageError(
                f"{self._file.path} has more places than 31 bits tell", hint="spread the rows over files"
            )
        try:
            self._file.reserve(max(need * width, self._file.size // width * width + -(-_GROW_BYTES // width) * width))
        except StorageError as error:
            if error.errno not in FULL:
                raise
            self._file.reserve(need * width)
        self._make_room()

    def _make_room(self) -> None:
        """Let the masks cover all pages of the file."""
        more = self._file.size // self._layout.page_bytes - len(self._live)
        self._live = np.concatenate([self._live, np.zeros(more, self._live.dtype)])
        self._committed = np.concatenate([self._committed, np.zeros(more, np.bool_)])
