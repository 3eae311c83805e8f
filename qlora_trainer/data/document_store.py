"""Tokenised rows on disk, read one at a time: data of any size takes the memory of one document.

Three flat files in a folder: `tokens.bin` (int32 ids, all documents end to end), `learned.bin` (bool, one a token) and
`rows.bin` (`ROW`, one a row). They are read by position, not mapped, so that a run that has seen much of its data does
not hold it in resident memory; and through open files, so that they may be removed while a run uses them. What is asked
of all rows is read some rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.array_file import CHUNK, ArrayFile, read_at
from qlora_trainer.data.chat import TokenizedRow
from qlora_trainer.data.distinct import count_distinct
from qlora_trainer.data.rows import FileRead, where_in
from qlora_trainer.hardware.unused_folders import mark_used
from qlora_trainer.step.document import IGNORE_INDEX, Document

ROW = np.dtype(
    [
        ("end", "<i8"),  # of its tokens in tokens.bin; they begin where those of the row before end
        ("line", "<i8"),
        ("content", "<u8"),  # a hash of its tokens and of which are learned
        ("num_supervised", "<i4"),
        ("num_rewritten", "<i4"),
        ("num_lost_names", "<i4"),
        ("first_stop", "<i4"),  # of its tokens: where the first stop token is that is learned; -1 for none
        ("file", "<i4"),
        ("is_line", "?"),
        ("is_askable", "?"),
    ]
)
TOKENS_FILE = "tokens.bin"
_LEARNED, _ROWS, _FILES = "learned.bin", "rows.bin", "files.json"


class DocumentWriter:
    """Writes a store into an empty folder; to be used in a `with` statement, which closes its files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._tokens, self._learned, self._rows = (
                stack.enter_context((self._folder / name).open("wb")) for name in (TOKENS_FILE, _LEARNED, _ROWS)
            )
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def append(self, tokenized: TokenizedRow, *, file: int) -> None:
        """Adds a row of the file of that number; the tokens of a document without one to learn are left out."""
        row, document = tokenized.row, tokenized.document
        if num_supervised := document.num_supervised_tokens:
            self._tokens.write(document.input_ids_T.tobytes())
            self._learned.write((document.labels_T != IGNORE_INDEX).tobytes())
            self._end += document.num_tokens
        numbers = (self._end, row.line, _content(document), num_supervised)
        counts = (tokenized.num_rewritten, tokenized.num_lost_names)
        place = (tokenized.first_stop, file, row.is_line, row.is_askable)
        self._rows.write(np.array((*numbers, *counts, *place), dtype=ROW).tobytes())

    def write_files(self, files: tuple[FileRead, ...]) -> None:
        """Adds what was found in the files that the rows are from."""
        (self._folder / _FILES).write_text(json.dumps([asdict(file) for file in files]))


class DocumentStore:
    """A store that is whole (see `hardware.sealed_folder`); marked as used as long as it lives.

    Raises:
        FileNotFoundError: it was removed before all of it was open.
    """

    def __init__(self, folder: Path) -> None:
        entries: list[Mapping[str, object]] = json.loads((folder / _FILES).read_text())
        self.files = tuple(FileRead.of(entry) for entry in entries)
        self._rows = self._opened(folder / _ROWS)
        self._num_rows = os.fstat(self._rows).st_size // ROW.itemsize
        self._tokens = self._opened(folder / TOKENS_FILE)
        mark_used(folder, self._tokens)
        self._learned = self._opened(folder / _LEARNED)

    def _opened(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def num_repeated(self) -> int:
        """Rows with the very tokens of an earlier one.

        Raises:
            StorageError: the cache folder cannot be written.
        """
        return self.num_rows - count_distinct((records_N["content"] for records_N in self._chunks()), self.num_rows)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the tokens of all rows, and which are learned, by way of a hash of each row."""
        digest = hashlib.sha256()
        for records_N in self._chunks():
            digest.update(records_N["content"].tobytes())
        return digest.hexdigest()

    def records(self, rows_N: NDArray[np.integer[Any]]) -> NDArray[np.void]:
        """What is known of some rows, of dtype `ROW`.

        Args:
            rows_N: their numbers, ascending; some thousand, since all that is asked for is in memory at once.
        """
        records_N = np.empty(rows_N.size, dtype=ROW)
        _, starts = np.unique(rows_N // CHUNK, return_index=True)  # what lies far apart is not read in one piece
        for start, end in pairwise([*starts.tolist(), rows_N.size]):
            first, last = int(rows_N[start]), int(rows_N[end - 1])
            records_N[start:end] = self._some(first, last + 1 - first)[rows_N[start:end] - first]
        return records_N

    def lengths(self, rows_N: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Tokens of each of these rows (see `records`); 0 where there is nothing to learn."""
        ends_N = self.records(rows_N)["end"]
        starts_N = np.where(rows_N > 0, self.records(np.maximum(rows_N - 1, 0))["end"], 0)
        return (ends_N - starts_N).astype(np.int32)

    def where(self, row: int) -> str:
        """`file:line` or `file:row number`."""
        entry = self._some(row, 1)[0]
        return where_in(self.files[entry["file"]].path, int(entry["line"]), is_line=bool(entry["is_line"]))

    def paths(self, rows: ArrayFile) -> list[str]:
        """The files that these rows are from, in order."""
        numbers: set[int] = set()
        for rows_N in rows.chunks():
            numbers.update(np.unique(self.records(rows_N)["file"]).tolist())
        return [self.files[number].path for number in sorted(numbers)]

    def read(self, row: int, first: int, num_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids, and which are learned, of a part of a row, T = `num_tokens`.

        Raises:
            EOFError: the files were cut short since they were opened.
        """
        start = first
        if row:  # its tokens begin where those of the row before end, which is the first field of that
            start += int.from_bytes(read_at(self._rows, (row - 1) * ROW.itemsize, 8), "little")
        ids_T = np.frombuffer(read_at(self._tokens, 4 * start, 4 * num_tokens), dtype="<i4")
        return ids_T, np.frombuffer(read_at(self._learned, start, num_tokens), dtype=np.bool_)

    def _chunks(self) -> Iterator[NDArray[np.void]]:
        """The records of all rows."""
        for first in range(0, self._num_rows, CHUNK):
            yield self._some(first, min(CHUNK, self._num_rows - first))

    def _some(self, first: int, count: int) -> NDArray[np.void]:
        return np.frombuffer(read_at(self._rows, first * ROW.itemsize, count * ROW.itemsize), dtype=ROW)


def _content(document: Document) -> int:
    digest = hashlib.blake2b(document.input_ids_T.tobytes(), digest_size=8)
    digest.update(document.labels_T.tobytes())
    return int.from_bytes(digest.digest(), "little")
