"""Embedding bags whose rows are spread over worker processes: each owns some, all train on all of them."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError, StorageError
from vitalfew.embeddings import _previous
from vitalfew.embeddings._owner import Owned, Owner, sync_classes
from vitalfew.embeddings._peers import Peers, pack, unpack
from vitalfew.embeddings._turn import Turn
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import Optimizer
from vitalfew.embeddings.rows import Counts, Layout, Lookups, Rows, _Waiting, array_of
from vitalfew.embeddings.tables import EmbeddingBags, Table
from vitalfew.embeddings.tiered_rows import row_ids
from vitalfew.tiers.dram import Dram
from vitalfew.tiers.policies import Belady, Policy

__all__ = ["ShardedEmbeddings", "sum_gradients", "sync_classes"]

_SETTINGS, _OPENED, _BACK, _ASK, _ANSWER, _COMMIT = 101, 102, 103, 104, 105, 106
_AS_BEFORE = "resume with the tables, the optimizer and as many workers as before, each with its own folder"


class ShardedRows(Rows):
    """As `Rows`, for values that come from the owners of the rows and gradients that go back to them."""

    def __init__(self, owner: Owner, peers: Peers, rule: Optimizer, num_rows: int) -> None:
        mine = owner.rows
        dim = mine.weight.shape[1]
        super().__init__(1, dim, rule, dtype=mine.weight.dtype, seed=mine.seed)  # one row, to know how rows are packed
        self.owner, self.peers, self.num_rows = owner, peers, num_rows
        self.counts.steps = mine.counts.steps
        self.turn: Turn | None = None
        """The batch whose turn it is, while there is a loop."""
        self.take: Callable[[_Waiting], None] | None = None
        """Where the gradients of the turn go."""
        self.settle: Callable[[], None] = lambda: None
        """Wait until all updates so far are applied to the rows of this owner."""
        self.driven = False
        """Whether a `ShardedPrefetch` says which batch's turn it is."""
        self._training = False
        self._pass = -1
        self._parts = _Waiting()

    def _check_workers(self) -> None:
        if self.turn is None:
            raise InputError(
                "there is no batch to train on", hint="loop over ShardedPrefetch, or evaluate under torch.no_grad()"
            )

    def bags(self, layout: Layout, ids: Tensor, offsets: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        self._training = self.trainable and torch.is_grad_enabled()
        return super().bags(layout, ids, offsets, scales)

    def _locate(
        self, layout: Layout, ids: NDArray[np.int64], edges: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        rows = row_ids(layout, ids, edges)
        if self._training:
            assert self.turn is not None
            slab, lines = self.turn.values, self.turn.lines_of(rows)
            if lines is None:
                raise InputError(
                    "the forward looks up rows that are not those of the batch",
                    hint="pass the ids of the batch that ShardedPrefetch gave, or ids= that says where they are",
                )
        else:
            distinct, lines = np.unique(rows, return_inverse=True)
            slab, lines = self.ask(distinct)["weight"], lines.reshape(-1)
        same = np.full(len(layout.features), max(len(slab), 1), np.int64)
        return slab, lines, np.zeros_like(same), same

    def _receive(self, lookups: Lookups, grad: Tensor) -> None:
        number = torch._C._current_graph_task_id()
        if number != self._pass:  # what a pass that broke off has left is dropped
            self._pass, self._parts = number, _Waiting()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
        self._parts.add(lookups, grad)

    def _end_pass(self) -> None:
        parts, self._parts = self._parts, _Waiting()
        if self.take is None:
            raise InputError(
                "the batch of this backward is done, its rows have had their update",
                hint="one backward for each batch of ShardedPrefetch, inside the loop",
            )
        self.take(parts)

    def end_turn(self, otherwise: str) -> None:
        if self.driven:
            raise InputError(f"a loop over ShardedPrefetch is running, {otherwise}", hint="finish the loop first")
        self.settle()

    # -- beside the turns; all workers call these together

    def ask(self, rows: NDArray[np.int64], *, every: bool = False) -> dict[str, Tensor]:
        """Return copies of the weights of distinct rows, or of all that belongs to them, from their owners."""
        self.settle()
        turn = Turn(rows, 0, num_rows=self.num_rows, world=self.peers.world, dim=0, dtype=self.weight.dtype)
        wanted = self.peers.exchange(_ASK + 10 * every, [turn.request(k).view(np.uint8) for k in range(turn.world)])
        found = [pack(*self.owner.copy(request.view(np.int64), every=every)) for request in wanted]
        columns = self._columns(every)
        lines = turn.lines_of(rows)
        assert lines is not None
        types = [_array(t).dtype for t in columns.values()]
        parts = [unpack(each, *types) for each in self.peers.exchange(_ANSWER, found)]
        out = {}
        for i, (name, kind) in enumerate(columns.items()):
            joined = np.concatenate([part[i] for part in parts]).reshape(-1, kind.shape[1])[lines]
            out[name] = torch.from_numpy(joined if joined.dtype != np.uint16 else joined.view(np.int16)).view(
                kind.dtype
            )
        return out

    def _columns(self, every: bool) -> dict[str, Tensor]:
        stats = torch.empty((0, 2), dtype=torch.int32, device="cpu")
        return {"weight": self.weight, **self.state, "stats": stats} if every else {"weight": self.weight}


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy() if tensor.dtype == torch.int32 else array_of(tensor)


class ShardedEmbeddings(EmbeddingBags):
    """As `TieredEmbeddings`, with the rows spread over worker processes: row r belongs to worker ``r % world``.

    Each worker trains on its share of every batch, with `ShardedPrefetch` around its loader. Values come from the
    owners ahead of their turn, gradients go back to them, and a row is never read before its update. With `exact`, and
    shares that are slices of the batch in the order of the ranks, the rows become, bit for bit, those of one process,
    as far as the gradients that reach them are the same.

    Parameters
    ----------
    tables, optimizer, policy, ahead, dtype, generator, seed, resume
        As in `TieredEmbeddings`; the same in all workers. The first rows are those of rank 0's generator.
    tiers
        Of this worker's own rows; a folder must be its own too, such as ``File(f"rows-{rank}")``. The memory must
        hold the rows of two batches that belong to this worker.
    group
        Who takes part; None for all. The rows travel through gloo, whatever the group uses for other things.
    exact
        Whether the gradient of each lookup travels, and the owner adds them in the order of the samples; otherwise
        each worker adds its own first, which is fewer bytes and rounds differently (about 1e-7).
    timeout
        Seconds to wait for other workers, also while they evaluate or commit, before they count as lost.

    Examples
    --------
    >>> import os, tempfile, torch
    >>> import torch.distributed as dist
    >>> from vitalfew.embeddings.parallel import ShardedEmbeddings
    >>> from vitalfew.embeddings.parallel_ahead import ShardedPrefetch
    >>> from vitalfew.embeddings import SGD, Table
    >>> from vitalfew.tiers import Dram
    >>> file = os.path.join(tempfile.mkdtemp(), "store")  # torchrun does this, with more workers
    >>> dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    >>> tables = ShardedEmbeddings([Table("user", 100, 4)], SGD(lr=0.5), tiers=[Dram(100)])
    >>> loader = [{"ids": torch.tensor([[i % 7], [i % 5]])} for i in range(10)]
    >>> with ShardedPrefetch(tables, loader) as batches:
    ...     for batch in batches:
    ...         (tables(batch["ids"]).sum() / batches.samples).backward()
    >>> tables.counts.steps
    10
    >>> tables.close()
    >>> dist.destroy_process_group()

    Notes
    -----
    A row gets the sum of what all workers backpropagate: divide the sum of your samples' losses by `samples` of the
    `ShardedPrefetch`, those of all workers, and add the gradients of other layers with `sum_gradients`. One backward
    pass for each batch; rows change at its end. Beside its tiers a worker holds the batches read ahead, and values and
    gradients of three. Start workers that share processors with ``OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE``.
    What reads rows without training (a forward under ``torch.no_grad()``, `rows_of`, `columns`, `commit`) is a call
    that all workers make together.
    """

    rows: ShardedRows

    def __init__(
        self,
        tables: Sequence[Table],
        optimizer: Optimizer,
        *,
        tiers: Sequence[Any],
        policy: Policy | None = None,
        ahead: int = 2,
        group: Any = None,
        exact: bool = True,
        timeout: float = 300.0,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        seed: int = 0,
        resume: bool = False,
    ) -> None:
        if isinstance(policy, Belady):
            raise InputError("Belady() knows one process's pass, not all workers'", hint="use LookAhead(depth=...)")
        if not 0 < timeout < float("inf"):
            raise InputError(f"timeout must be positive and finite, got {timeout}", hint="pass seconds")
        self._tiers, self.policy, self._ahead, self._resume = tuple(tiers), policy, max(ahead, 1), resume
        self.exact = exact
        peers = Peers(group, timeout)
        self.rank, self.world = peers.rank, peers.world
        self._peers, self._serial, self._run = peers, 0, secrets.token_hex(4)
        self.ahead_peers = Peers(group, timeout), Peers(group, timeout)
        self.note: dict[str, Any] = {}
        try:
            super().__init__(tables, optimizer, dtype=dtype, generator=generator, seed=seed)
        except BaseException as error:
            peers.fail(f"rank {peers.rank} could not make its tables: {error}")
            raise

    def _make_rows(
        self,
        optimizer: Optimizer,
        first: FirstRows,
        *,
        dtype: torch.dtype,
        update: Literal["backward", "step"],
        seed: int,
    ) -> Rows:
        first_seed = self._agree(optimizer, first, dtype, seed)

        def opened() -> Owned:
            try:
                return Owned(
                    [t.num_rows for t in self.tables], self.dim, optimizer, rank=self.rank, world=self.world,
                    first_seed=first_seed, tiers=self._tiers, policy=self.policy, ahead=self._ahead, dtype=dtype,
                    seed=seed, resume=self._resume,
                )  # fmt: skip
            except InputError as error:
                where = f"shard {self.rank} of {self.world}: {error.message}"
                raise InputError(where, hint=_AS_BEFORE if self._resume else error.hint) from None

        owned = opened()
        try:
            if self._resume:
                owned = self._at_one_commit(owned, opened)
            owner = Owner(owned, self.rank, self.world)
            self._share(_OPENED, None)
        except BaseException:
            owned.close()
            raise
        return ShardedRows(owner, self._peers, owned.rows.optimizer, self.num_rows)

    # -- agreement

    def _share(self, kind: int, value: Any) -> list[Any]:
        """Give a plain value to all, and return what each gave."""
        text = np.array(bytearray(json.dumps(value).encode()), np.uint8)
        return [json.loads(bytes(each)) for each in self._peers.share(kind, text)]

    def _agree(self, optimizer: Optimizer, first: FirstRows, dtype: torch.dtype, seed: int) -> int:
        """Make sure that all workers want the same; returns the seed of the first rows."""
        same = {
            "tables": [[t.name, t.num_rows, t.dim, t.pooling, list(t.features)] for t in self.tables],
            "optimizer": optimizer.to_dict(),
            "dtype": str(dtype),
            "exact": self.exact,
            "seed": seed,
            "resume": self._resume,
        }
        folder = self._folder
        place = None if folder is None else f"{socket.gethostname()}:{folder}"
        found = self._share(_SETTINGS, {"same": same, "first": first.seed, "run": self._run, "place": place})
        for k, other in enumerate(found):
            for name, mine in same.items():
                if other["same"][name] != mine:
                    raise InputError(
                        f"rank {k} has {name} {other['same'][name]}, rank {self.rank} has {mine}",
                        hint="make the tables in the same way in all workers",
                    )
        places = [other["place"] for other in found if other["place"] is not None]
        if len(set(places)) < len(places):
            raise InputError(f"two workers would keep rows in {folder}", hint='name a folder each: f"rows-{rank}"')
        self._run = found[0]["run"]
        return int(found[0]["first"])

    def _at_one_commit(self, owned: Owned, opened: Callable[[], Owned]) -> Owned:
        """Make sure that all shards are at the same commit; one that a kill has left ahead goes back."""
        mine = owned.note.get("shard")
        if mine is None or mine["rank"] != self.rank or mine["world"] != self.world:
            found = "the rows of one process" if mine is None else f"shard {mine['rank']} of {mine['world']}"
            raise InputError(
                f"{self._folder} holds {found}, not shard {self.rank} of {self.world}",
                hint=_AS_BEFORE,
            )
        shards = self._share(_BACK, mine)
        if len({shard["run"] for shard in shards}) > 1:
            raise InputError("the shards are those of different runs", hint="give each worker its folder of one run")
        last = min(shard["serial"] for shard in shards)
        if mine["serial"] > last:
            owned.close()
            assert self._folder is not None
            if not _previous.go_back(self._folder):
                raise StorageError(
                    f"shard {self.rank} is at commit {mine['serial']}, another at {last}, and {self._folder} has lost "
                    "the one before",
                    hint="go back to a copy of all folders",
                )
            owned = opened()
        if owned.note["shard"]["serial"] != last:
            raise StorageError(
                f"shard {self.rank} is at commit {owned.note['shard']['serial']}, another at {last}",
                hint="go back to a copy of all folders",
            )
        self._serial, self._run, self.note = last, shards[0]["run"], owned.note["note"]
        return owned

    @property
    def _folder(self) -> Path | None:
        last = self._tiers[-1] if self._tiers else None
        folder = getattr(last, "path", None) or getattr(last, "folder", None)
        return None if folder is None or isinstance(last, Dram) else Path(folder).absolute()

    # -- content

    @property
    def owner(self) -> Owner:
        """The rows of this worker: `owner.store.moves`, `owner.store.lower.traffic`."""
        return self.rows.owner

    @property
    def counts(self) -> Counts:
        """Ids this worker has looked up, updates of rows it owns, and steps of all workers, so far."""
        mine = self.rows.counts
        return Counts(mine.lookups, self.owner.rows.counts.rows_updated, mine.steps)

    def rows_of(self, table: str, ids: Sequence[int] | None = None) -> Tensor:
        """Return a copy of the weights of one table, or of some of its rows; all workers call this together."""
        span = self.span_of(table)
        wanted = np.arange(span.start, span.stop) if ids is None else np.asarray(ids, np.int64) + span.start
        if len(wanted) and not span.start <= wanted.min() <= wanted.max() < span.stop:
            raise InputError(f"an id lies outside table `{table}`", hint=f"ids go from 0 to {len(span) - 1}")
        distinct, line = np.unique(wanted, return_inverse=True)
        return self.rows.ask(distinct)["weight"][torch.from_numpy(line.reshape(-1))]

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return weights, optimizer state and statistics of rows, over all tables; all workers call this together."""
        return self.rows.ask(np.arange(start, stop), every=True)

    def fill(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Replace the rows from `start` on; each worker takes those it owns."""
        self.rows.settle()
        rows = np.arange(start, start + len(columns["weight"]))
        mine = rows % self.world == self.rank
        chosen = torch.from_numpy(mine)
        self.owner.fill(rows[mine] // self.world, {name: t[chosen] for name, t in columns.items()})

    # -- durability

    def commit(self, note: Mapping[str, Any] | None = None) -> int:
        """Make all rows durable in the lowest tiers; returns how many of this worker's rows had changed.

        All workers call this together. Each shard names the run and the number of the commit. `resume` goes on from
        the last commit that all shards have, also when a worker was killed while others had done theirs.
        """
        rows, owner = self.rows, self.owner
        rows.settle()
        owner.rows.counts.steps, owner.rows.optimizer = rows.counts.steps, rows.optimizer
        shard = {"rank": self.rank, "world": self.world, "run": self._run, "serial": self._serial + 1}
        # Until all have theirs, nothing may be written over the commit before.
        with owner.store.lock:
            try:
                if self._folder is not None:
                    _previous.keep(self._folder)
                changed = owner.owned.commit({"shard": shard, "note": dict(note or {})})
            except BaseException as error:
                self._peers.fail(f"rank {self.rank} could not commit: {error}")
                raise
            self._share(_COMMIT, None)
            self._serial += 1
        if self._folder is not None:
            _previous.let_go(self._folder)
        return changed

    def close(self) -> None:
        """Let go of files and processes. What was not committed is lost."""
        self.owner.owned.close()

    def __enter__(self) -> ShardedEmbeddings:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._peers.fail(f"rank {self.rank} has failed: {error!r}")
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedEmbeddings:
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: Any) -> ShardedEmbeddings:
        raise InputError(
            "rows of several processes cannot be copied with the model", hint="commit, and open them again"
        )

    def __reduce__(self) -> Any:
        raise InputError("rows of several processes cannot be pickled", hint="commit, and open them with resume=True")


def sum_gradients(parameters: Iterable[Tensor], group: Any = None) -> None:
    """Add the gradients of all workers to each parameter's, in one message; for the layers beside the rows.

    A parameter without a gradient counts as one of zeros, as a worker whose share is empty has none.

    Examples
    --------
    >>> import os, tempfile, torch
    >>> import torch.distributed as dist
    >>> file = os.path.join(tempfile.mkdtemp(), "store")
    >>> dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    >>> layer = torch.nn.Linear(2, 1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> sum_gradients(layer.parameters())
    >>> layer.weight.grad
    tensor([[1., 1.]])
    >>> dist.destroy_process_group()
    """
    import torch.distributed as dist

    of = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in of])
    dist.all_reduce(flat, group=group)
    for p, part in zip(of, torch.split(flat, [p.numel() for p in of]), strict=True):
        p.grad = part.view_as(p).clone() if p.grad is None else p.grad.copy_(part.view_as(p))
