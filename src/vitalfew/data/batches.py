"""Draw shuffled batches from an encoded log that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vitalfew.core.errors import InputError
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog

__all__ = ["Batches"]


@dataclass(frozen=True)
class Batches:
    """Batches of a log, every row once in an epoch, in an order that depends on seed and epoch only.

    The log is cut into blocks of rows. An epoch shuffles the blocks, reads a window of several at a time, and
    shuffles the rows inside it; batches run on from one window into the next, so only the last may be smaller.

    Parameters
    ----------
    log
        The rows.
    batch_size
        Rows in a batch.
    seed
        Another seed gives another order.
    shuffle
        False gives the rows in file order.
    block_rows, blocks_in_memory
        Rows read in one go, and how many of these are in memory: more mix better, fewer need less. Of a log with
        histories fewer are read, as each is as long as many.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data import Encoder, infer_schema, open_log, write_log
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> rows = [f"{i % 3 % 2},u{i % 5}" for i in range(100)]
    >>> _ = (folder / "log.csv").write_text(chr(10).join(["click,user", *rows]))
    >>> log = open_log(folder / "log.csv")
    >>> encoder = Encoder.fit(log, infer_schema(log, label="click"), test_share=0.2)
    >>> train, _ = write_log(folder / "encoded", log, encoder, test_share=0.2)
    >>> batches = Batches(train, batch_size=32)
    >>> sum(len(batch) for batch in batches.epoch(0)) == len(train)
    True

    Notes
    -----
    Cost: memory for two windows while one is put together; one gather for each row.
    """

    log: EncodedLog
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    block_rows: int = 65_536
    blocks_in_memory: int = 16

    def __post_init__(self) -> None:
        for name in ("batch_size", "block_rows", "blocks_in_memory"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed}")

    def __len__(self) -> int:
        return -(-len(self.log) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Encoded]:
        """Yield the batches of an epoch, from batch `start` on.

        A resumed epoch yields what the whole one would have from there; the blocks before are not read.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise InputError(f"no batch {start} in epoch {epoch}", hint=f"an epoch has {len(self)} batches, from 0")
        return self._shuffled(epoch, start * self.batch_size) if self.shuffle else self._in_order(start)

    def _in_order(self, start: int) -> Iterator[Encoded]:
        for first in range(start * self.batch_size, len(self.log), self.batch_size):
            yield self.log.block(first, min(first + self.batch_size, len(self.log)))

    def _shuffled(self, epoch: int, skip: int) -> Iterator[Encoded]:
        """Yield batches, leaving out the first `skip` rows."""
        num_blocks = -(-len(self.log) // self._block)
        blocks = np.random.default_rng([self.seed, epoch, 0]).permutation(num_blocks)
        waiting: list[Encoded] = []  # rows of earlier windows that do not fill a batch
        missing = self.batch_size  # rows that the batch still needs
        for number, at in enumerate(range(0, num_blocks, self.blocks_in_memory)):
            spans = [self._span(int(block)) for block in blocks[at : at + self.blocks_in_memory]]
            num_rows = sum(stop - start for start, stop in spans)
            if skip >= num_rows:
                skip -= num_rows
                continue
            window = Encoded.concat([self.log.block(start, stop) for start, stop in spans])
            order = np.random.default_rng([self.seed, epoch, 1, number]).permutation(num_rows)
            while skip < num_rows:
                rows = window.take(order[skip : skip + missing])
                skip += len(rows)
                missing -= len(rows)
                waiting.append(rows)
                if missing == 0:
                    yield Encoded.concat(waiting)
                    waiting, missing = [], self.batch_size
            skip = 0
        if waiting:
            yield Encoded.concat(waiting)

    @property
    def _block(self) -> int:
        return max(1, self.block_rows // self.log.items)

    def _span(self, block: int) -> tuple[int, int]:
        start = block * self._block
        return start, min(start + self._block, len(self.log))
