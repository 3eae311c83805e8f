"""The rows of one file as they are written, before anybody asks what they mean.

The name tells the kind: `.csv`, `.parquet`, and JSON (lines or one array) for all others; `.gz` after it for what is
compressed. Every reader is an iterator that holds a row, or a batch of `ARROW_BATCH_ROWS`, at a time; no torch.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, cast

from qlora_trainer.data.arrow_rows import iter_rows
from qlora_trainer.data.fields import shown
from qlora_trainer.data.json_text import MAX_LINE_BYTES, begins_array, decode_line, iter_array, iter_lines, parse_line
from qlora_trainer.errors import DataError

PARQUET_BUFFER_BYTES = 2**20
ARROW_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        number: 1-based, of the line it begins on, or of the row where lines mean nothing.
        fields: by column; or what is wrong with the row.
        is_line: which of the two `number` is.
        share: of the file that has been read with it, 0 to 1.
    """

    number: int
    fields: dict[str, object] | DataError
    is_line: bool = False
    share: float = 0.0


def iter_records(path: Path, *, after: int = 0) -> Iterator[Record]:
    """Reads the rows of a file in order.

    Args:
        path: the file.
        after: rows up to this number are passed over: lines of JSON and row groups of Parquet undecoded, all others
            as soon as they are read.

    Raises:
        DataError: the file cannot be read, or not beyond some row.
    """
    kind = path.name.lower().removesuffix(".gz")
    try:
        if kind.endswith(".parquet"):
            yield from (record for record in _parquet(path, after) if record.number > after)
            return
        num_bytes = max(path.stat().st_size, 1)
        with path.open("rb") as raw:
            for record in _text_records(raw, path, is_csv=kind.endswith(".csv"), after=after):
                if record.number > after:
                    yield replace(record, share=raw.tell() / num_bytes)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # ValueError: a NUL byte in the path, bad Parquet
        raise DataError(
            where=str(path),
            found=f"a file that cannot be read ({getattr(error, 'strerror', None) or error})",
            expected="JSON Lines, a JSON array, CSV or Parquet",
            fix="Check the path, its permissions and that the file is whole.",
        ) from error


def _text_records(raw: BinaryIO, path: Path, *, is_csv: bool, after: int) -> Iterator[Record]:
    is_compressed = path.name.lower().endswith(".gz")
    # GzipFile has all of BinaryIO that is used here.
    file = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if is_compressed else raw
    is_array = not is_csv and begins_array(file)
    file.seek(0)
    if is_csv:
        yield from _csv(file, str(path))
    elif is_array:
        for number, element in enumerate(iter_array(file, str(path)), start=1):
            yield Record(number, element)
    else:
        yield from _json_lines(file, str(path), after)


def _json_lines(file: BinaryIO, path: str, after: int) -> Iterator[Record]:
    for line, raw in iter_lines(file):
        if line <= after:
            continue
        where = f"{path}:{line}"
        try:
            text = decode_line(raw, where).strip()
            if text:
                yield Record(line, parse_line(text, where), is_line=True)
        except DataError as error:
            yield Record(line, error, is_line=True)


def _csv(file: BinaryIO, path: str) -> Iterator[Record]:
    """The first line names the columns. Errors name the line on which a row begins."""
    csv.field_size_limit(MAX_LINE_BYTES)  # 128 KiB by default, less than a long document; the module has one for all
    bad_lines: list[DataError] = []  # of the row that is being read

    def lines() -> Iterator[str]:
        for line, raw in iter_lines(file):
            try:
                yield decode_line(raw, f"{path}:{line}")
            except DataError as error:
                bad_lines.append(error)
                yield raw[:MAX_LINE_BYTES].decode("utf-8", errors="replace")

    rows = csv.reader(lines(), strict=True)
    names: list[str] | None = None
    while True:
        line = rows.line_num + 1
        where = f"{path}:{line}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            found = "a quote that is not closed" if "unexpected end" in str(error) else str(error)
            num_lines = rows.line_num - line + 1
            if num_lines > 1:  # whole rows may lie within, which would be passed over as one
                raise _bad_csv(where, f"{found}, in {num_lines:,} lines from here on", "double quotes") from error
            yield Record(line, _bad_csv(where, found, "CSV with a header and double quotes"), is_line=True)
            bad_lines.clear()
            continue
        if not row:  # a blank line
            continue
        if bad_lines:
            if names is None:
                raise bad_lines[0]
            yield Record(line, bad_lines[0], is_line=True)
            bad_lines.clear()
        elif names is None:
            names = row
            if len(set(names)) < len(names) or not all(name.strip() for name in names[1:]):
                raise _bad_csv(where, f"the header {shown(names)}", "different, non-empty column names")
        elif len(row) != len(names):
            yield Record(line, _bad_csv(where, f"{len(row)} fields", f"{len(names)}, as in the header"), is_line=True)
        else:
            fields: dict[str, object] = dict(zip(names, row, strict=True))
            fields.pop("", None)  # the number of the row, as pandas writes it
            yield Record(line, fields, is_line=True)


def _bad_csv(where: str, found: str, expected: str) -> DataError:
    return DataError(where=where, found=found, expected=expected, fix="Correct the line, or export the file again.")


def _parquet(path: Path, after: int) -> Iterator[Record]:
    """From the row group that holds the row after `after` on."""
    from pyarrow import ArrowException  # takes half a second, and few files need it
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # With a buffer, a column of a row group is read piece by piece: pandas writes a million rows into a group.
        with ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as file:
            num_rows = max(file.metadata.num_rows, 1)
            groups = range(file.metadata.num_row_groups)
            ends = list(accumulate(file.metadata.row_group(group).num_rows for group in groups))
            num_skipped = bisect_right(ends, after)
            number = ends[num_skipped - 1] if num_skipped else 0
            for batch in file.iter_batches(batch_size=ARROW_BATCH_ROWS, row_groups=groups[num_skipped:]):
                for fields in iter_rows(batch, name=str(path), first=number + 1):
                    number += 1
                    yield Record(number, fields, share=number / num_rows)
    except ArrowException as error:
        raise DataError(
            where=f"{path}:row {number + 1}" if number else str(path),
            found=f"broken Parquet ({error})",
            expected="a whole Parquet file",
            fix="Write or download it again.",
        ) from error
