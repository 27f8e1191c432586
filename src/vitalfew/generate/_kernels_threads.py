"""Kernels on several threads, each of which takes a part of the work.

They are compiled apart from those for one thread, so that the last bit of a sum may differ.
"""

from __future__ import annotations

from typing import Any

from numba import njit, prange

from vitalfew.generate import _kernels_coded, _kernels_numba

__all__ = ["attend", "attend_coded", "noisy_votes", "vote_and_mark"]

_attend, _vote_and_mark = _kernels_numba.attend, _kernels_numba.vote_and_mark
_attend_coded = _kernels_coded.attend
_add_noise, _add_votes = _kernels_numba.add_noise, _kernels_numba.add_votes


@njit(parallel=True, nogil=True, cache=True)
def attend(
    query: Any, keys: Any, key_steps: Any, values: Any, value_steps: Any, pos: Any, query_pos: Any, scale: Any,
    softcap: Any, slopes: Any, sinks: Any, out: Any, logits: Any, first: Any, end: Any,
    threads: Any,
) -> None:  # fmt: skip
    """Do what `_kernels_numba.attend` does."""
    for t in prange(threads):
        lo, hi = first + (end - first) * t // threads, first + (end - first) * (t + 1) // threads
        _attend(
            query, keys, key_steps, values, value_steps, pos, query_pos, scale, softcap, slopes, sinks, out, logits,
            lo, hi,
        )  # fmt: skip


@njit(parallel=True, nogil=True, cache=True)
def attend_coded(
    query: Any, keys: Any, key_steps: Any, values: Any, value_steps: Any, kind: Any, groups: Any, pos: Any,
    query_pos: Any, scale: Any, softcap: Any, slopes: Any, sinks: Any, out: Any, logits: Any, first: Any, end: Any,
    threads: Any,
) -> None:  # fmt: skip
    """Do what `_kernels_coded.attend` does."""
    for t in prange(threads):
        lo, hi = first + (end - first) * t // threads, first + (end - first) * (t + 1) // threads
        _attend_coded(
            query, keys, key_steps, values, value_steps, kind, groups, pos, query_pos, scale, softcap, slopes, sinks,
            out, logits, lo, hi,
        )  # fmt: skip


@njit(parallel=True, nogil=True, cache=True)
def vote_and_mark(
    score: Any, logits: Any, tau: Any, gumbel: Any, key: Any, pos: Any, query_pos: Any, recent: Any, marked: Any,
    first: Any, end: Any,
    threads: Any,
) -> None:  # fmt: skip
    """Do what `_kernels_numba.vote_and_mark` does."""
    for t in prange(threads):
        lo, hi = first + (end - first) * t // threads, first + (end - first) * (t + 1) // threads
        _vote_and_mark(score, logits, tau, gumbel, key, pos, query_pos, recent, marked, lo, hi)


@njit(parallel=True, nogil=True, cache=True)
def noisy_votes(
    weights: Any, draws: Any, starts: Any, power: Any, voices: Any, shares: Any, cast: Any, threads: Any
) -> None:  # fmt: skip
    """Do `_kernels_numba.add_noise` for all queries, then `_kernels_numba.add_votes` for all keys."""
    count, keys = weights.shape
    for t in prange(threads):
        _add_noise(weights, draws, starts, power, voices, shares, count * t // threads, count * (t + 1) // threads)
    for t in prange(threads):
        _add_votes(weights, shares, cast, keys * t // threads, keys * (t + 1) // threads)
