"""Scopes: named spans of work, nested, each with the figures of what happened inside it."""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from vitalfew.core.errors import InputError
from vitalfew.meter import tree as _tree
from vitalfew.meter.account import clocks_right, exclusive, inclusive
from vitalfew.meter.figure import Figure
from vitalfew.meter.instruments import Instruments, Reading, default
from vitalfew.meter.memory import Watch
from vitalfew.meter.tally import Tally

__all__ = ["Scope", "count", "current", "scope"]

P = ParamSpec("P")
R = TypeVar("R")

_innermost: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("vitalfew_scope", default=None)


def current() -> Scope | None:
    """Return the innermost open scope of this thread or task, if any.

    Examples
    --------
    >>> with scope("load") as load:
    ...     current() is load
    True
    """
    found = _innermost.get()
    while found is not None and not found.open:
        found = found.parent
    return found


def count(name: str, amount: float, unit: str) -> None:
    """Add to a count of the innermost open scope, and so to all around it; without one, nobody asked for the count.

    Parameters
    ----------
    name
        What is counted, such as ``flops`` or ``sent``.
    amount
        Zero or more.
    unit
        Always the same for one name.

    Examples
    --------
    >>> with scope("step") as step:
    ...     count("flops", 2 * 64 * 64, "FLOP")
    >>> print(step["flops"])
    8.19 kFLOP, counted
    """
    inner = current()
    if inner is not None:
        inner.count(name, amount, unit)


class Scope:
    """A span of work with its figures; made by `scope`, used once as a context manager, or as a decorator.

    Attributes
    ----------
    name
        As given.
    parent, children
        The scopes around and inside it.
    marks
        What the reader must know: ``failed`` (an exception left it), ``cut short`` (a scope around it ended first),
        ``clock`` (a clock went backwards or the machine was suspended), ``overlap`` (scopes inside it ran at the same
        time), ``forked`` (it ended in another process, which has no figures of it).
    last
        Of a decorator: the scope of the latest call.

    Examples
    --------
    >>> work = Scope("work")
    >>> with work:
    ...     work.count("rows", 7, "rows")
    >>> work["rows"].value, work.open
    (7, False)
    """

    _instruments: Instruments
    _watch: Watch
    _start: Reading
    _lock: threading.RLock

    def __init__(self, name: str, instruments: Instruments | None = None) -> None:
        if not name:
            raise InputError("a scope needs a name", hint='such as scope("load")')
        self.name = name
        self.parent: Scope | None = None
        self.children: list[Scope] = []
        self.marks: list[str] = []
        self.last: Scope | None = None
        self._chosen = instruments
        self._running: set[Scope] = set()
        self._tally = Tally({})
        self._figures: dict[str, Figure] | None = None
        self._begun = False
        self._end: Reading | None = None
        self._process = os.getpid()

    @property
    def open(self) -> bool:
        """Whether the scope has begun in this process and not ended."""
        return self._begun and self._end is None and self._process == os.getpid()

    @property
    def failed(self) -> bool:
        """Whether an exception left the scope."""
        return "failed" in self.marks

    def __enter__(self) -> Scope:
        if self._begun:
            raise InputError(f"scope {self.name!r} was used before", hint="make one for each use: scope(name)")
        parent = current()
        self._instruments = self._chosen or (parent._instruments if parent else default())
        self._process = os.getpid()
        self._watch = self._instruments.peaks.open()
        self._start = self._instruments.begin()
        # One lock per tree, whose scopes may end in several threads.
        self._lock = parent._lock if parent else threading.RLock()
        with self._lock:
            self._begun = True
            if parent is not None and parent.open:
                if parent._running:
                    parent._mark("overlap")
                self.parent = parent
                # One unit per name over the whole tree, or the counts could not be added up.
                self._tally = Tally(parent._tally.units)
                parent.children.append(self)
                parent._running.add(self)
        _innermost.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._begun:
            raise InputError(f"scope {self.name!r} was never opened", hint="use it in a with statement")
        # A generator that is closed early has not failed.
        if kind is not None and kind is not GeneratorExit:
            self._mark("failed")
        if self._process != os.getpid():
            self._mark("forked")
        elif self._end is None:
            end = self._instruments.end()
            with self._lock:
                self._finish(end)
        _innermost.set(current())

    def _finish(self, end: Reading) -> None:
        ending = [self]
        for one in ending:
            # The list grows while it is walked: whatever runs inside ends too, at the same reading, so that the parts
            # still add up to the whole.
            ending.extend(one._running)
        for one in reversed(ending):
            one._close(end)
            if one is not self:
                one._mark("cut short")

    def _close(self, end: Reading) -> None:
        self._instruments.peaks.close(self._watch)
        self._end = end
        if not clocks_right(self._start, end):
            self._mark("clock")
        if self.parent is not None:
            self.parent._running.discard(self)
            self.parent._tally.take(self._tally)

    def _mark(self, mark: str) -> None:
        if mark not in self.marks:
            self.marks.append(mark)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function whose every call runs in a scope of this name, inside the scope around the call."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InputError(
                f"{function.__qualname__} is a generator, which runs only while it is asked for more",
                hint="open the scope around the loop that uses it",
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self._call():
                    return await function(*args, **kwargs)

            return cast("Callable[P, R]", awaited)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._call():
                return function(*args, **kwargs)

        return called

    def _call(self) -> Scope:
        self.last = Scope(self.name, self._chosen)
        return self.last

    def count(self, name: str, amount: float, unit: str) -> None:
        """Add to a count of this scope, and so to all around it; works from any thread.

        Examples
        --------
        >>> with scope("exchange") as exchange:
        ...     exchange.count("sent", 4096, unit="B")
        >>> print(exchange["sent"])
        4 KiB, counted
        """
        if not self.open:
            raise InputError(f"scope {self.name!r} is not open", hint="count inside the with statement")
        self._tally.add(name, amount, unit)

    def _known(self) -> dict[str, Figure]:
        if self._figures is not None:
            return self._figures
        if self._end is None:
            state = "ended in another process" if "forked" in self.marks else "has not ended"
            raise InputError(f"scope {self.name!r} {state}", hint="read its figures after the with statement")
        figures = inclusive(self._start, self._end, self._instruments.energy)
        rss_start = Figure("rss_start", self._watch.start, "B", "measured", source="resident bytes at the start")
        figures += [self._watch.figure(), rss_start]
        figures += self._tally.figures()
        self._figures = {figure.name: figure for figure in figures}
        return self._figures

    def figures(self) -> tuple[Figure, ...]:
        """Return what happened in the scope, the scopes inside it included."""
        return tuple(self._known().values())

    def exclusive(self) -> tuple[Figure, ...]:
        """Return what happened in the scope but in none inside it.

        Over a tree these add up to the figures of its root. A figure is left out where scopes inside ran at the same
        time, or where one of them lacks it or has it from another origin.
        """
        parts = [child._known() for child in self.children]
        left = exclusive(self._known(), parts).values()
        return tuple(figure for figure in left if "overlap" not in self.marks or figure.how == "counted")

    def __getitem__(self, name: str) -> Figure:
        figures = self._known()
        if name not in figures:
            raise InputError(f"scope {self.name!r} has no figure {name!r}", hint=f"it has {', '.join(figures)}")
        return figures[name]

    def tree(self) -> str:
        """Return a table of the scope and all inside it, with the origin of each figure; equal names are one line."""
        return _tree.table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return names, marks and figures of the scope and all inside it, ready for JSON."""
        return {
            "name": self.name,
            "figures": [figure.to_dict() for figure in self.figures()],
            "exclusive": [figure.to_dict() for figure in self.exclusive()],
            "marks": list(self.marks),
            "children": [child.to_dict() for child in self.children],
        }


def scope(name: str, *, instruments: Instruments | None = None) -> Scope:
    """Return a scope: a context manager, and a decorator for functions and coroutine functions.

    Parameters
    ----------
    name
        What the work is.
    instruments
        Where the readings come from; otherwise those of the scope around it, or of the process.

    Examples
    --------
    >>> with scope("train") as train:
    ...     with scope("step"):
    ...         pass
    >>> train["wall"].how, [child.name for child in train.children]
    ('measured', ['step'])

    Notes
    -----
    Threads and tasks have scopes of their own; CPU time, memory and bytes are those of the process all the same.
    Work that is queued on a device and not waited for falls outside the scope.
    """
    return Scope(name, instruments)
