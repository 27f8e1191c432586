"""Text as it comes: whole characters only, and nothing that a stop text may still take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_UNSURE = "\ufffd"
_LONGEST = 3
"""Bytes, and so signs of doubt, that an unfinished character can have."""


class TextStream:
    """Turns tokens into pieces of text, and ends at a stop text.

    Parameters
    ----------
    decode
        Tokens to text.
    stops
        Texts at which the answer ends; they are not part of it.
    before
        Tokens that the text goes on from; some tokenizers leave out the space that a text begins with.

    Attributes
    ----------
    stopped
        Whether a stop text was met.

    Examples
    --------
    >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), stops=["END"])
    >>> [stream.push(token) for token in "aé EN".encode()], stream.flush()
    (['a', '', 'é', ' ', '', ''], 'EN')
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._decode, self._stops = decode, tuple(stops)
        # Tokens from the last sure place on, how many of them were sure before that, and the text of those: some
        # tokenizers write a token's space only after another token.
        self._ids = list(before)
        self._read, self._base = len(self._ids), decode(self._ids) if before else ""
        self._sent = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return what is sure after one more token."""
        self._ids.append(token)
        fresh = self._decode(self._ids)[len(self._base) :]
        sure = len(fresh)
        while sure > max(0, len(fresh) - _LONGEST) and fresh[sure - 1] == _UNSURE:
            sure -= 1
        piece = fresh[self._sent : sure]
        self._sent = max(self._sent, sure)
        if fresh and sure == len(fresh):
            self._ids = self._ids[self._read :]
            self._read, self._base, self._sent = len(self._ids), self._decode(self._ids), 0
        return self._match(piece)

    def _match(self, piece: str) -> str:
        self._held += piece
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """Return what was held back; half a character at the very end is left out."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Return how much of a stop text's beginning stands at the end of a text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
