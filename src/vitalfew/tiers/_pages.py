"""Pages of records: how they lie in bytes, and the kernels that fill, check and empty them.

A page is a header of 16 bytes, the ids of its records (int32 each), the records, and zeros. The header: a checksum
over the rest of the page (8 bytes), the page's number (4), a mark (2), the number of records (1), and the low byte of
the epoch it was written in (1), for whoever has to look into a damaged file. All numbers are little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vitalfew.tiers._direct import BLOCK

__all__ = [
    "DAMAGE",
    "Layout",
    "are_live",
    "clear_live",
    "emptiest",
    "fill",
    "find_free",
    "lift",
    "set_live",
    "take",
]

MAX_RECORDS = 64
"""Most records of a page: which of them live is one word."""

DAMAGE = {
    1: "its checksum does not fit its content",
    2: "it bears no mark of a page of rows",
    3: "it bears the number of another page",
    4: "it holds other rows than were put there",
}

_HEADER = 16
_MARK = 0x4656
_P1, _P2, _P3 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_ONE, _ZERO = np.uint64(1), np.uint64(0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The size of pages, and how many records of a size go into one."""

    record_bytes: int
    page_bytes: int
    records_per_page: int

    @classmethod
    def of(cls, record_bytes: int) -> Layout:
        """Return the smallest page of which records fill three quarters, or that page which they fill best.

        Examples
        --------
        >>> Layout.of(268)
        Layout(record_bytes=268, page_bytes=4096, records_per_page=15)
        """
        slot = record_bytes + 4
        smallest = -(-(_HEADER + slot) // BLOCK)
        best, best_share = None, 0.0
        for blocks in range(smallest, 4 * smallest + 1):
            count = min(MAX_RECORDS, (blocks * BLOCK - _HEADER) // slot)
            share = count * slot / (blocks * BLOCK)
            if share > best_share:
                best, best_share = cls(record_bytes, blocks * BLOCK, count), share
            if share >= 0.75:
                break
        assert best is not None
        return best


@njit(nogil=True, cache=True)
def _mix(lane: Any, word: Any) -> Any:
    # One to one in the word and in the lane, so that no change of a single word goes unseen.
    x = (lane ^ word) * _P1
    return (x << np.uint64(29)) | (x >> np.uint64(35))


@njit(nogil=True, cache=True)
def _checksum(words: Any) -> Any:
    """Return 64 bits that depend on every word but the first. Four lanes keep the multiplier busy."""
    a, b, c, d = _P2, _mix(_P3, words[1]), _mix(_P1, words[2]), _mix(_P2, words[3])
    for i in range(4, len(words), 4):
        a, b = _mix(a, words[i]), _mix(b, words[i + 1])
        c, d = _mix(c, words[i + 2]), _mix(d, words[i + 3])
    x = a + _mix(b, _P2) * _P3 + _mix(_mix(c, _P3), _P1) + _mix(_mix(d, _P1), _P2) * _P1
    x = (x ^ (x >> np.uint64(33))) * _P2
    return x ^ (x >> np.uint64(29))


@njit(nogil=True, cache=True)
def _damage(words: Any, halves: Any, page: Any) -> int:
    if words[0] != _checksum(words):
        return 1
    if (halves[3] & 0xFFFF) != _MARK:
        return 2
    if halves[2] != page:
        return 3
    return 0


@njit(nogil=True, cache=True)
def _fill(words: Any, halves: Any, octets: Any, pages: Any, epoch: Any, ids: Any, records: Any, per_page: int) -> None:
    width = records.shape[1]
    for p in range(len(pages)):
        first = p * per_page
        count = min(per_page, len(ids) - first)
        half, target = halves[p], octets[p]
        half[2] = pages[p]
        half[3] = _MARK | (count << 16) | (epoch << 24)
        for j in range(per_page):
            half[4 + j] = ids[first + j] if j < count else -1
        at = _HEADER + 4 * per_page
        for j in range(count):
            source = records[first + j]
            for d in range(width):
                target[at + d] = source[d]
            at += width
        for d in range(at, len(target)):
            target[d] = 0
        words[p, 0] = _checksum(words[p])


def fill(buffer: NDArray[Any], pages: Any, epoch: int, ids: Any, records: Any, layout: Layout) -> None:
    """Make the lines of the buffer pages of these records; the last one may have room left."""
    views = buffer.view(np.uint64), buffer.view(np.uint32), buffer
    _fill(*views, pages, epoch & 0xFF, ids, records, layout.records_per_page)


@njit(nogil=True, cache=True)
def _take(
    words: Any, halves: Any, octets: Any, pages: Any, first: Any, order: Any, ids: Any, places: Any, out: Any, per: int
) -> tuple[int, int]:
    width = out.shape[1]
    for p in range(len(pages)):
        half, source = halves[p], octets[p]
        damage = _damage(words[p], half, pages[p])
        if damage:
            return p, damage
        for i in range(first[p], first[p + 1]):
            line = order[i]
            slot = places[line] - pages[p] * per
            if half[4 + slot] != ids[line]:
                return p, 4
            target = out[line]
            at = _HEADER + 4 * per + slot * width
            for d in range(width):
                target[d] = source[at + d]
    return -1, 0


def take(
    buffer: NDArray[Any], pages: Any, first: Any, order: Any, ids: Any, places: Any, out: Any, layout: Layout
) -> tuple[int, int]:
    """Check pages and copy records out of them; return the line of a page that is damaged and how, or -1.

    Those of page p are the lines `order[first[p]:first[p + 1]]` of ids, places and out.
    """
    views = buffer.view(np.uint64), buffer.view(np.uint32), buffer
    line, damage = _take(*views, pages, first, order, ids, places, out, layout.records_per_page)
    return line, damage


@njit(nogil=True, cache=True)
def _lift(
    words: Any, halves: Any, octets: Any, pages: Any, live: Any, ids: Any, places: Any, records: Any, per: int
) -> tuple[int, int]:
    width, n = records.shape[1], 0
    for p in range(len(pages)):
        half, source = halves[p], octets[p]
        damage = _damage(words[p], half, pages[p])
        if damage:
            return p, damage
        for slot in range(per):
            if (live[pages[p]] >> np.uint64(slot)) & _ONE:
                ids[n] = half[4 + slot]
                places[n] = pages[p] * per + slot
                target = records[n]
                at = _HEADER + 4 * per + slot * width
                for d in range(width):
                    target[d] = source[at + d]
                n += 1
    return -1, n


def lift(
    buffer: NDArray[Any], pages: Any, live: Any, ids: Any, places: Any, records: Any, layout: Layout
) -> tuple[int, int]:
    """Check pages and copy all live records, with ids and places; return the line of a damaged page and how.

    If none is damaged, return -1 and the number of records.
    """
    views = buffer.view(np.uint64), buffer.view(np.uint32), buffer
    line, result = _lift(*views, pages, live, ids, places, records, layout.records_per_page)
    return line, result


@njit(nogil=True, cache=True)
def set_live(live: Any, places: Any, per_page: int) -> int:
    """Mark records as live; -1 is passed over. Return how many pages had none before, -1 for a place that cannot be."""
    begun = 0
    for i in range(len(places)):
        if places[i] < 0:
            continue
        page = places[i] // per_page
        bit = _ONE << np.uint64(places[i] % per_page)
        if page >= len(live) or live[page] & bit:
            return -1
        begun += live[page] == _ZERO
        live[page] |= bit
    return begun


@njit(nogil=True, cache=True)
def are_live(live: Any, places: Any, per_page: int) -> int:
    """Return how many of these places are live ones, -1 apart."""
    count = 0
    for i in range(len(places)):
        page = places[i] // per_page
        if 0 <= page < len(live) and live[page] & (_ONE << np.uint64(places[i] % per_page)):
            count += 1
    return count


@njit(nogil=True, cache=True)
def clear_live(live: Any, committed: Any, places: Any, per_page: int) -> tuple[int, int]:
    """Mark records as dead; return how many pages have none any more, and how many of those are free.

    If there is no such record or it is dead already: -1, and which one.
    """
    emptied = freed = 0
    for i in range(len(places)):
        page = places[i] // per_page
        bit = _ONE << np.uint64(places[i] % per_page)
        if places[i] < 0 or page >= len(live) or not live[page] & bit:
            return -1, i
        live[page] &= ~bit
        if live[page] == _ZERO:
            emptied += 1
            freed += not committed[page]
    return emptied, freed


@njit(nogil=True, cache=True)
def find_free(live: Any, committed: Any, start: int, window: int, out: Any) -> tuple[int, int]:
    """Look for pages without a record from `start` on, around the end; return how many, and where the look ended."""
    n, page = 0, start
    for _ in range(min(window, len(live))):
        if n == len(out):
            break
        if page >= len(live):
            page = 0
        if live[page] == _ZERO and not committed[page]:
            out[n] = page
            n += 1
        page += 1
    return n, page


@njit(nogil=True, cache=True)
def _count(x: Any) -> int:
    """Return the number of bits that are set."""
    x = x - ((x >> _ONE) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def emptiest(live: Any, start: int, window: int, most: int, fullest: int) -> Any:
    """Return up to `most` pages of the window with the fewest records, but 1 to `fullest`, and how many those are."""
    window = min(window, len(live))
    histogram = np.zeros(65, np.int64)
    for i in range(window):
        histogram[_count(np.uint64(live[(start + i) % len(live)]))] += 1
    level, n = 0, 0
    while level < fullest and n < most:
        level += 1
        n += histogram[level]
    spare = max(0, n - most)  # pages of the last level that are not wanted
    pages, records, k = np.empty(min(n, most), np.int64), 0, 0
    for i in range(window):
        if k == len(pages):
            break
        page = (start + i) % len(live)
        count = _count(np.uint64(live[page]))
        if count == 0 or count > level:
            continue
        if count == level and histogram[level] <= spare:
            continue
        if count == level:
            histogram[level] -= 1
        pages[k] = page
        records += count
        k += 1
    return pages[:k], records
