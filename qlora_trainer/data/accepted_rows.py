"""Accepted rows on their way to the tokenizer: an Arrow file without a name, which `datasets` maps into memory.

A first pass over the sources checks every row and writes the good ones down; a second one reads them back in order. So
a row that is wrong is told before the first one is tokenised, what is tokenised is what was checked, and `datasets`
never meets a row that it would fail on. The file is gone when it has been read, however the process ends.

Rows lie in it as they were understood, not as they were written: every message has all fields, so that Arrow, which
fills up with nulls what one struct lacks and another has, finds nothing to fill. What has no fixed keys (schemas and
arguments of tools) is JSON text by then.

The memory is that of a batch, whatever the size of the data: `ARROW_BATCH_BYTES` while it is written, as much of the
mapped file while it is read, whose pages are given back.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import BATCH_ROWS, ROWS_PER_READING, BadRow, FileRead, Reading, Row, in_batches
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.mapped_pages import Span, give_back, spans_of

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_BATCH_BYTES = 2**22  # twice that while it is written; what is known of each mapped batch takes 7 kB
_MESSAGE_FIELDS = tuple(field.name for field in fields(Message))
_CALL_FIELDS = tuple(field.name for field in fields(ToolCall))


def write_accepted(
    read: Iterable[Row | BadRow | Reading | FileRead], file: IO[bytes]
) -> Generator[Reading, None, tuple[FileRead, ...]]:
    """Writes the good rows of what `data.rows.iter_files` yields, while it yields how far that is.

    Args:
        read: rows that begin with the number 0.
        file: empty; is not closed.

    Returns:
        What was found in each of the files that the rows are from.

    Raises:
        DataError: `read` raises it.
        OSError: the disk is full.
    """
    import pyarrow as pa

    schema = accepted_schema()
    files: list[FileRead] = []
    parts: list[pa.RecordBatch] = []
    with pa.ipc.new_stream(file, schema) as writer:
        for item in in_batches(read):
            if isinstance(item, list):
                parts.append(pa.RecordBatch.from_pylist([_as_columns(row) for row in item], schema=schema))
                if sum(part.nbytes for part in parts) >= ARROW_BATCH_BYTES:
                    writer.write_table(pa.Table.from_batches(parts).combine_chunks())
                    parts.clear()
            elif isinstance(item, FileRead):
                files.append(item)
            elif isinstance(item, Reading):
                yield replace(item, doing="checking")
        if parts:
            writer.write_table(pa.Table.from_batches(parts).combine_chunks())
    file.flush()
    parts.clear()
    pa.default_memory_pool().release_unused()  # what batches took would stay this process's otherwise
    return tuple(files)


def iter_accepted(file: IO[bytes], files: Sequence[FileRead]) -> Iterator[Row | Reading | FileRead]:
    """Yields again what was written: the very rows, and after those of a file what was found in it.

    Args:
        file: of `write_accepted`; on a disk, since it is mapped.
        files: what that returned.

    Raises:
        StorageError: what is read is not what was written.
        MemoryError: the file cannot be mapped.
    """
    columns = _iter_columns(file, num_rows=sum(found.num_rows for found in files))
    index = 0
    for found in files:
        for number, values in enumerate(islice(columns, found.num_rows), start=1):
            yield Row(
                path=found.path,
                index=index,
                line=values["line"],
                messages=tuple(_message(message) for message in values["messages"]),
                tools=sys.intern(values["tools"]),  # often the same in every row
                text=values["text"],
                is_line=values["is_line"],
                form=found.format_name,
            )
            index += 1
            if index % ROWS_PER_READING == 0:
                yield Reading(found.path, index, number / found.num_rows, doing="tokenising")
        yield found


def accepted_schema() -> pa.Schema:
    """The columns of the file. Of text all has offsets of 64 bits: a batch may hold more than 2 GiB of it."""
    import pyarrow as pa

    text = pa.large_string()
    call = pa.struct([("name", text), ("arguments", text), ("call_id", text)])
    message = pa.struct(
        [
            ("role", text),
            ("content", text),
            ("tool_calls", pa.list_(call)),
            ("name", text),
            ("tool_call_id", text),
            ("weight", pa.int64()),
            ("reasoning", text),
        ]
    )
    return pa.schema(
        [
            ("line", pa.int64()),
            ("is_line", pa.bool_()),
            ("messages", pa.list_(message)),
            ("tools", text),
            ("text", text),
        ]
    )


def _iter_columns(file: IO[bytes], *, num_rows: int) -> Iterator[dict[str, Any]]:
    """The rows by column, out of the mapped file. The library is imported only here: that takes most of a second."""
    from datasets import Dataset
    from pyarrow import ArrowException

    try:
        # The name of an open file that has none; mapped, whatever the environment says.
        dataset = Dataset.from_file(f"/proc/self/fd/{file.fileno()}", in_memory=False).with_format("arrow")
        if len(dataset) != num_rows:
            raise _not_what_was_written(f"{len(dataset):,} of {num_rows:,}")
        spans = _spans_of(dataset.data.to_batches())
        give_back(spans)  # the library has looked at the head of each batch
        num_bytes = 0
        for table in dataset.iter(batch_size=BATCH_ROWS):
            for batch in table.to_batches():  # a table of long rows may lie in many
                batch.validate(full=True)  # else an offset that is wrong is followed
                yield from batch.to_pylist()
                num_bytes += batch.nbytes
                if num_bytes >= ARROW_BATCH_BYTES:
                    give_back(spans)
                    num_bytes = 0
    except MemoryError:  # Arrow's own is one, too
        raise
    except (ArrowException, OSError) as error:  # of mapping and reading the file: writing it is over
        if getattr(error, "errno", None) == errno.ENOMEM or "Cannot allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise _not_what_was_written(str(error)) from error


def _not_what_was_written(reason: str) -> StorageError:
    return StorageError(
        where="the accepted rows in the cache folder",
        found=f"rows that are not those that were written ({reason})",
        expected="a disk that keeps what is written to it",
        fix="Check the disk, or set XDG_CACHE_HOME to a folder on another one.",
    )


def _spans_of(batches: Iterable[pa.RecordBatch]) -> tuple[Span, ...]:
    """The pages of a mapped file that batches lie in; an error where the library has copied some of it."""
    buffers = (buffer for batch in batches for column in batch.columns for buffer in column.buffers())
    return spans_of((buffer.address, buffer.size) for buffer in buffers if buffer is not None)


def _as_columns(row: Row) -> dict[str, object]:
    return {
        "line": row.line,
        "is_line": row.is_line,
        "messages": [_fields_of(message) for message in row.messages],
        "tools": row.tools,
        "text": row.text,
    }


def _fields_of(message: Message) -> dict[str, object]:
    calls = [{name: getattr(call, name) for name in _CALL_FIELDS} for call in message.tool_calls]
    return {name: getattr(message, name) for name in _MESSAGE_FIELDS} | {"tool_calls": calls}


def _message(values: dict[str, Any]) -> Message:
    return Message(**values | {"tool_calls": tuple(ToolCall(**call) for call in values["tool_calls"])})
