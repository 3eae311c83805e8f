"""Reads data files into rows, strictly: the first bad row stops with its file, its line and the reason.

Costs one pass over the files with one row in memory beside those that the caller keeps; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_trainer.config.data_files import DataSource
from qlora_trainer.data.formats import Format, detect_format, format_named, read_content, rename_columns
from qlora_trainer.data.messages import Message
from qlora_trainer.data.records import Record
from qlora_trainer.data.sources import iter_source
from qlora_trainer.errors import DataError

__all__ = ["BadRow", "FileRead", "Message", "Reading", "Row", "RowsRead", "collect", "iter_files", "read_rows"]

ROWS_PER_READING = 1000
BATCH_ROWS = 256  # rows tokenised at once: enough for the tokenizer's threads, few enough to hold as Python lists
BATCH_CHARACTERS = 2**20  # ... and of long ones fewer: a token takes some hundred bytes until it is in an array
MAX_REASONS = 20  # bad rows that are told one by one; a file of another format would have nothing but bad rows


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, or one plain text, of a data file.

    Attributes:
        path: the file it was read from.
        index: 0-based number among the rows of all files; blank lines and bad rows do not count.
        line: 1-based line number in the file, or row number where it has no lines.
        messages: the turns in order; empty for a plain text.
        tools: functions that the assistant may ask for, as JSON text; may be empty.
        text: the plain text; empty for a conversation.
        is_line: which of the two `line` is.
        form: the name of its form.
    """

    path: str
    index: int
    line: int
    messages: tuple[Message, ...]
    tools: str = ""
    text: str = ""
    is_line: bool = True
    form: str = ""

    @property
    def where(self) -> str:
        """`file:line` or `file:row number`, as errors name the row."""
        return where_in(self.path, self.line, is_line=self.is_line)

    @property
    def num_tokenized_characters(self) -> int:
        """About how many are tokenised: all of them, and all before each answer once more."""
        before, num_characters = len(self.tools), 0
        for message in self.messages:
            num_characters += before if message.role == "assistant" else 0
            before += len(message.content) + len(message.reasoning)
            before += sum(len(call.arguments) for call in message.tool_calls)
        return len(self.text) + before + num_characters

    @property
    def is_askable(self) -> bool:
        """Whether the last answer can be compared with a text: there are messages, and no tools to call."""
        return bool(self.messages) and not self.tools and not any(message.tool_calls for message in self.messages)


@dataclass(frozen=True, slots=True)
class Reading:
    """How far a file has been read.

    Attributes:
        path: the file.
        num_rows: good ones, of all files so far.
        share: of this file's bytes or rows, 0 to 1.
        doing: what is done with them: a stream is tokenised as it is read.
    """

    path: str
    num_rows: int
    share: float
    doing: Literal["reading", "checking", "tokenising"] = "reading"


@dataclass(frozen=True, slots=True)
class Place:
    """Between two rows of some sources; reading may begin there.

    Attributes:
        source: number of the source.
        after: number (or line) of the last of its rows that lies before; 0 at its start.
        row: good rows of all sources that lie before.
    """

    source: int = 0
    after: int = 0
    row: int = 0


START = Place()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is passed over, and why."""

    error: DataError


@dataclass(frozen=True, slots=True)
class FileRead:
    """What was found in one file.

    Attributes:
        path: the file.
        format_name: the form of its rows.
        num_rows: good ones; of a file that was read from its start at least one.
        num_bad: rows that were passed over.
        reasons: of the first `MAX_REASONS` of them, each beginning with the row's place.
    """

    path: str
    format_name: str
    num_rows: int
    num_bad: int
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> FileRead:
        """The inverse of `dataclasses.asdict`, after a way through JSON."""
        return cls(**{**entry, "reasons": tuple(entry["reasons"])})


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The rows of some files, in order, and what was found in each."""

    rows: list[Row]
    files: tuple[FileRead, ...]


def read_rows(path: Path | str) -> list[Row]:
    """Reads every row of one file; the first bad one is an error.

    Raises:
        DataError: see `iter_files`.
    """
    return collect(iter_files([path])).rows


def collect(read: Iterable[Row | BadRow | Reading | FileRead]) -> RowsRead:
    """Keeps what `iter_files` yields."""
    rows: list[Row] = []
    files: list[FileRead] = []
    for item in read:
        if isinstance(item, Row):
            rows.append(item)
        elif isinstance(item, FileRead):
            files.append(item)
    return RowsRead(rows, tuple(files))


def in_batches(
    read: Iterable[Row | BadRow | Reading | FileRead],
) -> Iterator[list[Row] | BadRow | Reading | FileRead]:
    """Gathers what `iter_files` yields: rows of a file until they are `BATCH_ROWS` or `BATCH_CHARACTERS`.

    All else comes as it is.
    """
    batch: list[Row] = []
    num_characters = 0
    for item in read:
        if isinstance(item, Row):
            batch.append(item)
            num_characters += item.num_tokenized_characters
        is_full = len(batch) == BATCH_ROWS or num_characters >= BATCH_CHARACTERS
        if batch and (is_full or isinstance(item, FileRead)):
            yield batch
            batch, num_characters = [], 0
        if not isinstance(item, Row):
            yield item


def iter_files(
    paths: Sequence[DataSource | str],
    *,
    row_format: str | None = None,
    columns: tuple[tuple[str, str], ...] = (),
    stop: bool = True,
    start: Place = START,
    most_rows: int | None = None,
) -> Iterator[Row | BadRow | Reading | FileRead]:
    """Yields the rows of each file, good and bad, now and then how far it is, and last what was found in it.

    Text is UTF-8, with or without a byte order mark; lines end in LF or CRLF; blank lines are passed over.

    Args:
        paths: the files, or data sets that stand for one each.
        row_format: the name of the form of all rows; None takes it from the first row of each file.
        columns: (our key, their column) pairs; empty takes all columns under their own names.
        stop: whether the first bad row is an error.
        start: where to begin; what lies before it is not counted, and only read as far as it takes to get there.
        most_rows: ends after that many, good and bad; what was found in the last file is then of a part of it.

    Raises:
        DataError: a file cannot be read, holds no good row, or `stop` and a row is bad.
    """
    index, num_left = start.row, most_rows
    for number, path_or_source in enumerate(paths[start.source :], start=start.source):
        source = Path(path_or_source) if isinstance(path_or_source, str) else path_or_source
        path, after = str(source), start.after if number == start.source else 0
        known = None if row_format is None else format_named(row_format)
        if after and known is None:
            known = _form_of(source, columns)
        num_bad, first, reasons = 0, index, list[str]()
        first_error: DataError | None = None
        for record in iter_source(source, after=after):
            try:
                row, known = _read_record(record, path, known, columns, index)
            except DataError as error:
                if stop:
                    raise
                num_bad += 1
                first_error = first_error or error
                if len(reasons) < MAX_REASONS:
                    reasons.append(error.short)
                yield BadRow(error)
            else:
                index += 1
                yield row
            if record.number % ROWS_PER_READING == 0:
                yield Reading(path, index, record.share)
            if num_left is not None:
                num_left -= 1
                if num_left == 0:
                    break
        if known is None or (index == first and not after):
            raise _no_good_row(path, num_bad, first_error)
        yield FileRead(path, known.name, index - first, num_bad, tuple(reasons))
        if num_left == 0:
            return


def _no_good_row(path: str, num_bad: int, first: DataError | None) -> DataError:
    """What is said of the first bad row says best what is wrong with a file that has no others."""
    if first is None:
        fix = "Point data.train (or data.eval) to files with rows in them."
        return DataError(where=path, found="no rows", expected="one conversation or text a row", fix=fix)
    found = f"no rows but {num_bad} bad ones, the first {first.short}"
    return DataError(where=path, found=found, expected=first.expected, fix=first.fix)


def _form_of(source: DataSource, columns: tuple[tuple[str, str], ...]) -> Format | None:
    """The form that the first good row of a source decides."""
    for record in iter_source(source):
        with suppress(DataError):
            return _read_record(record, str(source), None, columns, 0)[1]
    return None


def _read_record(
    record: Record, path: str, known: Format | None, columns: tuple[tuple[str, str], ...], index: int
) -> tuple[Row, Format]:
    if isinstance(record.fields, DataError):
        raise record.fields
    where = where_in(path, record.number, is_line=record.is_line)
    fields = rename_columns(record.fields, columns, where=where)
    row_format = known or detect_format(fields, where=where)
    content = read_content(fields, row_format, where=where)
    form = row_format.name
    row = Row(path, index, record.number, content.messages, content.tools, content.text, record.is_line, form)
    return row, row_format


def where_in(path: str, number: int, *, is_line: bool) -> str:
    """`file:line` or `file:row number`, as errors name a row."""
    return f"{path}:{number}" if is_line else f"{path}:row {number}"
