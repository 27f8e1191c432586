"""Stop paying for rows that have stopped moving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import Budget, InputError, Receipt
from vitalfew.embeddings.ahead import _ids_of
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.sieve import Sieve
from vitalfew.embeddings.stale_receipt import stale_receipt
from vitalfew.embeddings.stale_rule import StaleRule, lead_of, num_watched, rows_of
from vitalfew.embeddings.staleness import logit_shift, next_threshold, on_probation, quiet_windows, stale_rows
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiered_rows import TieredRows
from vitalfew.embeddings.watching import Watch
from vitalfew.tiers.policies import Belady

__all__ = ["SkipStale"]


class SkipStale:
    """Find the rows that have stopped moving, and leave them, or the inputs that consist of them, out of training.

    Every `every` updates the most visited rows are compared with snapshots of themselves. What has moved once, was
    updated often enough and hardly moves any more for some windows in a row is stale. From time to time each stale row
    is trained again for a window, and comes back for good if it moves.

    Parameters
    ----------
    tables
        `EmbeddingBags` or `TieredEmbeddings`.
    mode
        ``"rows"``: stale rows are looked up as ever, and get no update: no gradient is summed, state and weights are
        neither read nor written for it, and over tiers nothing is written back. ``"inputs"``: samples that consist of
        stale rows are not trained at all, see `inputs`.
    max_change
        Relative change per window below which a row counts as quiet, or ``"auto"`` to find it under `validate`.
    every
        Updates per window.
    warm_up, min_visits, windows
        What a row needs to be stale: updates in all, updates since its snapshot, quiet windows in a row.
    revisit
        A stale row is trained in one of so many windows.
    share
        Of a sample's lookups that must be stale for it to be skipped.
    watch
        Which rows to watch at most, the most visited: a share (0.1), a number, or ``"64 MiB"`` of snapshots.
    lead
        Batches that a thread may have read ahead; what is found holds only after them. By default what `Prefetch` over
        these tables needs, 0 without tiers. With more than 0 and no `Prefetch`, train one update per batch of `inputs`:
        the updates tell how far a pass is.
    validate, target, tolerance
        For ``max_change="auto"``: a loss, the share of visits to save at most, and how much worse than the best so far
        the loss may be, relatively.
    seed
        Of the turns in which stale rows are trained.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, SkipStale, Table
    >>> tables = EmbeddingBags([Table("user", 10, 2)], SGD(lr=0.05), generator=torch.Generator().manual_seed(0))
    >>> with SkipStale(tables, every=10, warm_up=20, min_visits=5, watch=1.0) as stale:
    ...     for _ in range(100):  # row 3 goes to 1
    ...         ((tables(torch.tensor([[3]])) - 1) ** 2).sum().backward()
    >>> stale.num_stale, tables.counts.rows_updated, tables.counts.rows_frozen
    (1, 60, 40)

    Notes
    -----
    With ``max_change=0`` or ``warm_up=float("inf")`` training is bit for bit as without. Results depend on batches and
    seed, never on the clock. Cost: five bytes per row for counting and flags (for a moment eight more), a snapshot
    of each watched row (two while they are chosen), and in each window one look at the rows updated in it, also at
    those that have left for a lower tier since. What a row has moved before it is watched counts from the first
    values that the tables have given it.

    References
    ----------
    Maboud et al., Accelerating Recommender Model Training by Dynamically Skipping Stale Embeddings, arXiv 2404.04270.
    """

    def __init__(
        self,
        tables: EmbeddingBags,
        *,
        mode: Literal["rows", "inputs"] = "rows",
        max_change: float | Literal["auto"] = 0.1,
        every: int = 200,
        warm_up: float = 100,
        min_visits: int = 10,
        windows: int = 2,
        revisit: int = 8,
        share: float = 0.8,
        watch: Budget | float | int | str = 0.1,
        lead: int | None = None,
        validate: Callable[[], float] | None = None,
        target: float = 0.5,
        tolerance: float = 0.001,
        seed: int = 0,
    ) -> None:
        rows = rows_of(tables)
        self.rule = StaleRule(
            mode, max_change, every, float(warm_up), min_visits, windows, revisit, share, target, tolerance, seed
        )
        if self.rule.auto != (validate is not None):
            raise InputError(
                "max_change='auto' and validate= go together", hint="validate=lambda: the loss on a held-back slice"
            )
        if lead is not None and lead < 0:
            raise InputError(f"lead must not be negative, got {lead}", hint="leave it out")
        self.tables, self.mode, self.validate = tables, mode, validate
        self.threshold = self.rule.first_threshold
        """Rows that change less are quiet."""
        self._ceiling, self._best = math.inf, math.inf
        self.updates = self.window = self.revived = 0
        """Updates so far, windows, and rows that were stale and came back."""
        self.most_stale = 0
        self._since = 0  # updates in this pass
        first = FirstRows([table.num_rows for table in tables.tables], tables._first_seed)
        self.watched = Watch(rows, first, tables.num_rows, num_watched(watch, tables))
        flags = tables.num_rows if mode == "inputs" else 0
        self._sieve = Sieve(tables.layout, flags, share, lead_of(tables) if lead is None else lead, every)
        moves = tables.moves if isinstance(tables, TieredEmbeddings) else None
        self.before = (rows.counted().rows_updated, rows.counts.rows_frozen, moves and (moves.left, moves.clean))
        """What had been counted before: rows updated and frozen, rows that left and clean ones of them."""
        rows.visits, rows.on_update = self.watched.visits, self._updated
        self._active = True

    # -- what it finds

    @property
    def num_stale(self) -> int:
        """Rows that are stale now, with those that are trained in this window all the same."""
        return int(self.watched.stale.sum())

    @property
    def flag_bytes(self) -> int:
        """Bytes of the flags of stale rows, and of samples that wait for a full batch."""
        return self._sieve.nbytes if self.mode == "inputs" else self.tables.rows.frozen.nbytes

    def _updated(self) -> None:
        self.updates += 1
        rows = self.tables.rows
        self._since = rows.turn + 1 if isinstance(rows, TieredRows) and rows.driven else self._since + 1
        if self.updates % self.rule.every == 0:
            self._end_window()

    def _end_window(self) -> None:
        watch, rule, self.window = self.watched, self.rule, self.window + 1
        if not len(watch) and 2 * int(watch.visits.max(initial=0)) < rule.warm_up:
            return  # no row is near the end of its warm-up: there is nothing to look at
        looked = watch.look(rule.min_visits)
        if self.validate is not None:
            self._steer(looked)
        limits = rule.limits(self.threshold)
        history = watch.history
        quiet = quiet_windows(history, **limits)
        found = watch.stale | stale_rows(history, **limits, windows=rule.windows)
        moves = watch.stale & (history.change >= self.threshold)
        self.revived += int(moves.sum())
        watch.stale = found & ~moves
        history.quiet = np.where(moves, 0, quiet).astype(np.int32)
        if not len(watch) or self.window % rule.revisit == 1 % rule.revisit:
            kept_looked = watch.ids[looked]
            watch.choose()
            looked = np.isin(watch.ids, kept_looked, assume_unique=True)
        turn = on_probation(watch.ids, self.window, rule.revisit, rule.seed)
        watch.probation = watch.stale & (turn | (watch.probation & ~looked))
        self.most_stale = max(self.most_stale, self.num_stale)
        self._apply()

    def _steer(self, looked: NDArray[np.bool_]) -> None:
        """Move the threshold by what the validation says."""
        assert self.validate is not None
        history = self.watched.history
        warm = looked & (history.visits >= self.rule.warm_up)
        if not warm.any() and not self.watched.stale.any():
            return  # no threshold would make a row stale
        known = warm | self.watched.stale  # what is saved already counts towards the target
        with torch.no_grad():
            loss = float(self.validate())
        if not self.watched.stale.any():  # whatever made the loss worse, it was not this
            loss = min(loss, self._best)
        self.threshold, self._ceiling = next_threshold(
            self.threshold, self._ceiling, loss, self._best, history.change[known], history.visits[known],
            target=self.rule.target, tolerance=self.rule.tolerance,
        )  # fmt: skip
        self._best = min(self._best, loss)

    def _apply(self) -> None:
        """Let what was found hold: at once for rows, after the lead for inputs."""
        watch, rows = self.watched, self.tables.rows
        still = watch.ids[watch.stale & ~watch.probation]
        if self.mode == "inputs":
            self._sieve.publish(self._given(), still)
            return
        frozen = np.zeros(self.tables.num_rows if len(still) else 0, np.uint8)
        frozen[still] = 1
        rows.frozen = frozen

    # -- inputs

    def inputs(
        self,
        loader: Iterable[Any],
        *,
        ids: Callable[[Any], Tensor | tuple[Tensor, Tensor | None]] | None = None,
        labels: Callable[[Any], Any] | None = None,
        take: Callable[[Any, NDArray[np.int64]], Any] | None = None,
        join: Callable[[list[Any]], Any] | None = None,
    ) -> Iterable[Any]:
        """Return the loader's batches without the samples to skip, filled up with those that follow.

        Batches are `Encoded`, or tensors in a dict, a dataclass or a tuple. ``Prefetch(tables, stale.inputs(loader))``
        reads them ahead.

        Parameters
        ----------
        ids
            Takes a batch and returns its ids as the tables want them, or ids and offsets; as of `Prefetch`.
        labels
            Takes a batch and returns its labels, by default `label`: counted for `logit_shift`.
        take, join
            ``take(batch, samples)`` and ``join(batches)``, for batches of another kind.
        """
        if self.mode != "inputs":
            raise InputError("in mode 'rows' every input is trained", hint="SkipStale(tables, mode='inputs')")
        if isinstance(self.tables, TieredEmbeddings) and isinstance(self.tables.policy, Belady):
            raise InputError(
                "Belady() must know all batches beforehand, and which inputs are skipped is found on the way",
                hint="policy=LookAhead()",
            )
        find = ids or _ids_of

        def checked(batch: Any) -> tuple[Tensor, Tensor | None]:
            found = find(batch)
            flat, offsets = found if isinstance(found, tuple) else (found, None)
            self.tables.check_shape(flat, offsets)
            return flat, offsets

        return _Inputs(self, loader, (checked, labels, take, join))

    def _begin(self) -> None:
        rows = self.tables.rows
        if isinstance(rows, TieredRows) and rows.driven and self._sieve.lead < lead_of(self.tables):
            raise InputError(
                f"Prefetch reads up to {lead_of(self.tables)} batches ahead, and lead is {self._sieve.lead}",
                hint="leave lead= out",
            )
        self._sieve.begin(self._sieve.ended(self._since) if self._sieve.lead else self._sieve.given)
        self._since = 0

    def _given(self) -> int:
        """Return how many batches of this pass were trained."""
        rows = self.tables.rows
        if isinstance(rows, TieredRows) and rows.driven:
            return rows.turn + 1
        return self._sieve.ended(self._since) if self._sieve.lead else self._sieve.given

    @property
    def batches_read(self) -> int:
        """Batches of the loader that went into what was trained in this pass; a resumed pass begins there."""
        return self._sieve.passed(self._given()).batches

    @property
    def samples_seen(self) -> int:
        """Samples that came by, those that were skipped included: what a learning-rate schedule counts."""
        if self.mode == "rows":
            raise InputError("in mode 'rows' every sample is trained", hint="count them in your loop")
        return self._sieve.passed(self._given()).samples

    @property
    def samples_skipped(self) -> int:
        """Samples that were not trained."""
        return self._sieve.passed(self._given()).skipped

    @property
    def priors(self) -> tuple[float, float] | None:
        """Share of label 1 among all inputs since some were stale, and among those kept; None without labels."""
        passed = self._sieve.passed(self._given())
        if not passed.seen or not passed.kept:
            return None
        return passed.seen_clicks / passed.seen, passed.kept_clicks / passed.kept

    @property
    def logit_shift(self) -> float:
        """What the skipping of inputs has cost the last bias; see `correct`."""
        passed = self._sieve.passed(self._given())
        if not passed.kept:
            return 0.0
        return logit_shift((passed.seen, passed.seen_clicks), (passed.kept, passed.kept_clicks))

    def correct(self, bias: Tensor) -> float:
        """Add `logit_shift` to the bias of the last layer, in place, and return it. Call it once, after training."""
        with torch.no_grad():
            bias += self.logit_shift
        return self.logit_shift

    # -- leaving, and coming back

    def undo(self) -> None:
        """Train all rows again, and stop looking. What was learned stays; the receipt too."""
        rows = self.tables.rows
        if self._active:
            rows.frozen, rows.visits, rows.on_update = np.empty(0, np.uint8), np.empty(0, np.uint32), None
            if self.mode == "inputs":
                self._sieve.publish(self._given(), np.empty(0, np.int64))
        self._active = False

    def __enter__(self) -> SkipStale:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _settings(self) -> dict[str, Any]:
        """Return what must be the same in a run that goes on."""
        found = asdict(self.rule) | {"watch": self.watched.most}
        return found if self.mode == "rows" else found | {"lead": self._sieve.lead}

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides what comes; also in the middle of a pass, between two updates."""
        return {
            "settings": self._settings(), "watch": self.watched.state_dict(),
            "sieve": self._sieve.state_dict(self._given()),
            "threshold": self.threshold, "ceiling": self._ceiling, "best": self._best, "updates": self.updates,
            "window": self.window, "revived": self.revived, "most_stale": self.most_stale,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. In the middle of a pass, give `inputs` a loader that begins at batch `batches_read`."""
        if wrong := {k: state["settings"].get(k) for k, v in self._settings().items() if v != state["settings"].get(k)}:
            raise InputError(f"the state was made with other settings: {wrong}", hint="use these")
        self.watched.load_state_dict(state["watch"])
        self._sieve.load_state_dict(state["sieve"])
        self.threshold, self._ceiling, self._best = state["threshold"], state["ceiling"], state["best"]
        self.updates, self.window = state["updates"], state["window"]
        self.revived, self.most_stale = state["revived"], state["most_stale"]
        self._since = 0
        if self.mode == "rows" and self._active:
            self._apply()

    def receipt(self) -> Receipt:
        """Return what was stale and what that saved, as counted; paired runs tell time and quality."""
        return stale_receipt(self)


class _Inputs:
    """A loader without what is stale; each loop over it is a pass."""

    def __init__(self, owner: SkipStale, loader: Iterable[Any], how: tuple[Any, ...]) -> None:
        self._owner, self._loader, self._how = owner, loader, how

    def __iter__(self) -> Iterator[Any]:
        self._owner._begin()
        self._owner._sieve.handle(*self._how)
        return self._owner._sieve.batches(self._loader)
