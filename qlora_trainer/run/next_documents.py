"""The documents of the next step, and what is told of the blocks of a stream that are read for them."""

from __future__ import annotations

from collections.abc import Generator

from qlora_trainer.data.batches import BlockRead
from qlora_trainer.data.rows import Reading
from qlora_trainer.run.inputs import skipped_told
from qlora_trainer.run.planned import lack_of_memory_told
from qlora_trainer.run.records import RowsSkipped, StreamRead
from qlora_trainer.run.session import Progress, Session
from qlora_trainer.step.document import Document


def next_documents(
    session: Session, progress: Progress
) -> Generator[Reading | StreamRead | RowsSkipped, None, list[Document]]:
    """The documents of the next step; of a stream they may have to be read first.

    Raises:
        DataError, StorageError, ConfigError: they cannot be.
        DoesNotFitError: memory runs out meanwhile.
    """
    reading = session.batches.batch(progress.step)
    with lack_of_memory_told(f"reading the documents of step {progress.step + 1}", session.knobs):
        while True:
            try:
                item = next(reading)
            except StopIteration as end:
                documents: list[Document] = end.value
                return documents
            if isinstance(item, Reading):
                yield item
            else:
                if item.data.num_rows:  # where a block and the sources end together, the last one has none
                    yield _stream_read(item)
                yield from skipped_told(item.block.store.files)


def _stream_read(read: BlockRead) -> StreamRead:
    return StreamRead(
        first_row=read.block.start.place.row + 1,
        num_rows=read.data.num_rows,
        num_documents=len(read.data.documents),
        num_dropped=read.data.num_dropped,
        num_changed=read.data.num_truncated + read.data.num_split,
    )
