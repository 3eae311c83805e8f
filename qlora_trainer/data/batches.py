"""Which documents each optimizer step sees: of data that lies on the disk, and of data that is read meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_trainer.data.order import Order
from qlora_trainer.data.rows import START, Reading
from qlora_trainer.data.shuffle import shuffled
from qlora_trainer.data.stream import BegunStream, Block, BlockStart, StreamedRows, fit_block, open_rows, read_block
from qlora_trainer.data.tokenized import TokenizedData
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.step.document import Document


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Another block of a stream than its first is there.

    Attributes:
        block: its rows.
        data: the documents that are left of them.
    """

    block: Block
    data: TokenizedData


@dataclass(frozen=True, slots=True)
class StoredBatches:
    """The global batches of documents that are all there; any step's are found at once.

    Attributes:
        documents: all that are trained on.
        order: of positions among them.
    """

    documents: Sequence[Document]
    order: Order

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.order.num_steps

    def batch(self, step: int) -> Generator[Reading | BlockRead, None, list[Document]]:
        """Returns the documents of a step, and yields nothing: all are there.

        Raises:
            IndexError: the run has no such step.
        """
        yield from ()
        return [self.documents[position] for position in self.order.batch(step)]

    def samples_seen(self, num_steps_done: int) -> int:
        """Documents seen after that many steps, repeats counted."""
        return self.order.samples_seen(num_steps_done)

    def epoch(self, num_steps_done: int) -> float:
        """Passes over the documents after that many steps."""
        return self.order.epoch(num_steps_done)

    def state(self, num_steps_done: int) -> None:
        """What a checkpoint must hold: nothing, the step says it all."""


class StreamedBatches:
    """The global batches of a stream, one after the other; it holds the block that they are taken from.

    Sample p of the run is a document of the block that holds p, in the order of that block's own permutation. A global
    batch may span two blocks.

    Args:
        begun: the stream, and its first block.
        seq_len: longest document.
        global_batch_size: documents a step.
        seed: of the permutations.
        num_steps: of the run.
        start: of the block that holds the first sample that is asked for; None for that of the first block.
    """

    def __init__(
        self,
        begun: BegunStream,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        num_steps: int,
        start: BlockStart | None,
    ) -> None:
        self.num_steps = num_steps
        self._stream = begun.stream
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._start = self._next_start = start or begun.first.start
        self._first: Block | None = begun.first
        self._rows: StreamedRows | None = begun.rows  # as the block before the next has left them; None at a start
        if self._start.number > 0:
            self._first, self._rows = None, open_rows(self._stream, self._start.place)
        self._documents: Sequence[Document] | None = None
        self._pending: BlockStart | None = None  # where the batch begins whose blocks are being read

    def batch(self, step: int) -> Generator[Reading | BlockRead, None, list[Document]]:
        """Returns the documents of a step, after it has yielded how far the blocks are that it must read for them.

        Steps may be asked for in ascending order only, from that of `start` on, each once.

        Raises:
            DataError, StorageError: the next block cannot be read.
            ConfigError: the block that a resume goes on in is not the one that was saved.
            IndexError: a step before the block that is held, or beyond the run's last.
        """
        first = step * self._global_batch_size
        if not (self._start.num_samples <= first and step < self.num_steps):
            raise IndexError(f"step {step} of {self.num_steps}, from sample {self._start.num_samples} on")
        self._pending = self._block_of(step)  # what a save must hold if a later one of its blocks cannot be read
        documents = []
        for sample in range(first, first + self._global_batch_size):
            while self._documents is None or sample >= self._next_start.num_samples:
                yield from self._go_on()
            [position] = shuffled(
                [sample - self._start.num_samples],
                seed=self._seed,
                number=self._start.number,
                size=len(self._documents),
            )
            document = self._documents[position]
            # Numbered through all blocks, as the rows of files are: the random draws of a document hang on its number.
            documents.append(replace(document, index=self._start.place.row + document.index))
        self._pending = None
        return documents

    def samples_seen(self, num_steps_done: int) -> int:
        """Documents seen after that many steps."""
        return num_steps_done * self._global_batch_size

    def epoch(self, num_steps_done: int) -> float:
        """Times that the sources were read to their end before the block of the sample that comes next."""
        return float(self._block_of(num_steps_done).num_passes)

    def state(self, num_steps_done: int) -> dict[str, Any]:
        """Where to begin after that many steps, for a checkpoint; after the last step asked for, or before it."""
        return self._block_of(num_steps_done).as_json()

    def _block_of(self, num_steps_done: int) -> BlockStart:
        if self._pending is not None:
            return self._pending
        is_used_up = self.samples_seen(num_steps_done) >= self._next_start.num_samples
        return self._next_start if is_used_up else self._start

    def _go_on(self) -> Generator[Reading | BlockRead]:
        start = self._next_start
        first, self._first = self._first, None
        if first is not None:
            block = first
        else:
            self._rows = self._rows or open_rows(self._stream)
            block = yield from read_block(self._stream, start, self._rows)
        content_hash = block.store.content_hash
        if start.content_hash not in ("", content_hash):
            raise ConfigError(
                where=f"data.train from row {start.place.row + 1} on",
                found="other rows, or other tokens of them, than this run was in the middle of when it was saved",
                expected="the same content, read by the same versions of tokenizers and transformers",
                fix="Restore it, or start a new run in another folder.",
            )
        data = fit_block(block, self._stream, self._seq_len)
        if not len(data.documents) and start.place == START and block.is_last:
            raise DataError(
                where="data.train",
                found="no document in a whole pass",
                expected="the documents that were there before",
                fix="Look at what became of the files since the run began.",
            )
        if block.is_last:
            self._rows = None
        self._documents = data.documents
        self._start = replace(start, content_hash=content_hash)
        self._next_start = replace(block.next_start, num_samples=start.num_samples + len(data.documents))
        if first is None:  # that has been told of
            yield BlockRead(block, data)
