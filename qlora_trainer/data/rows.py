"""Reads JSON Lines into conversations, strictly: the first bad line stops with `file:line` and the reason.

Costs one pass over the file with at most one line of `MAX_LINE_BYTES` in memory beside the rows; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qlora_trainer.data.formats import Message, parse_conversation, shown
from qlora_trainer.errors import DataError

__all__ = ["MAX_LINE_BYTES", "Message", "Row", "RowsRead", "read_rows", "read_rows_and_bad"]

MAX_LINE_BYTES = 64 * 2**20  # far above any document that can be trained on, far below what hurts to hold
MAX_REASONS = 20  # bad rows that are told one by one; a file of another format would have nothing but bad rows
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation of a data file.

    Attributes:
        path: the file it was read from.
        index: 0-based number among the rows of the file; blank lines do not count.
        line: 1-based line number in the file.
        messages: its turns in order.
    """

    path: str
    index: int
    line: int
    messages: tuple[Message, ...]

    @property
    def where(self) -> str:
        """`file:line`, as errors name the row."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The rows of a file, and what was passed over.

    Attributes:
        path: the file.
        rows: in file order, at least one; a bad row has no number.
        num_bad: lines that are no conversation.
        reasons: of the first `MAX_REASONS` of them, each beginning with `file:line`.
    """

    path: str
    rows: list[Row]
    num_bad: int
    reasons: tuple[str, ...]


def read_rows(path: Path | str) -> list[Row]:
    """Reads every row of a JSON Lines file.

    UTF-8, with or without a byte order mark; lines end in LF or CRLF; blank lines are passed over.

    Args:
        path: the file.

    Returns:
        The rows in file order, at least one.

    Raises:
        DataError: the file cannot be read, holds no row, or has a line that is not a conversation.
    """
    return read_rows_and_bad(path, stop=True).rows


def read_rows_and_bad(path: Path | str, *, stop: bool) -> RowsRead:
    """Reads a JSON Lines file as `read_rows` does, and may pass over the lines that are not a conversation.

    Args:
        path: the file.
        stop: whether the first such line is an error.

    Raises:
        DataError: the file cannot be read, holds no good row, or `stop` and a line is not a conversation.
    """
    rows: list[Row] = []
    num_bad = 0
    reasons: list[str] = []
    for line, raw in _lines(Path(path)):
        where = f"{path}:{line}"
        try:
            text = _decode(raw, where).strip()
            if not text:
                continue
            messages = parse_conversation(_json_object(text, where), where=where)
        except DataError as error:
            if stop:
                raise
            num_bad += 1
            if len(reasons) < MAX_REASONS:
                reasons.append(f"{error.where}: {error.found}")
            continue
        rows.append(Row(path=str(path), index=len(rows), line=line, messages=messages))
    if not rows:
        raise DataError(
            where=str(path),
            found=f"no rows but {num_bad} bad ones, the first {reasons[0]}" if num_bad else "no rows",
            expected="JSON Lines: one conversation a line",
            fix="Point data.train (or data.eval) to a file with rows in it.",
        )
    return RowsRead(str(path), rows, num_bad, tuple(reasons))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers and bytes; of a line that is too long only its start, which is longer than `MAX_LINE_BYTES`."""
    try:
        with path.open("rb") as file:
            line = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                yield line, raw.removeprefix(UTF8_BOM) if line == 1 else raw
                rest = raw
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):  # only where bad lines are passed over
                    rest = file.readline(MAX_LINE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise DataError(
            where=str(path),
            found=f"a path that cannot be read ({getattr(error, 'strerror', None) or error})",
            expected="a JSON Lines file",
            fix="Check the path and its permissions.",
        ) from error


def _decode(raw: bytes, where: str) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(
            where=where,
            found=f"a line longer than {MAX_LINE_BYTES // 2**20} MiB",
            expected="JSON Lines: one conversation a line",
            fix="Put each row on a line of its own.",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            where=where,
            found=f"byte 0x{raw[error.start]:02x} at position {error.start}",
            expected="UTF-8 text",
            fix="Save the file as UTF-8 (a compressed or Parquet file must be written as JSON Lines first).",
        ) from error


def _json_object(text: str, where: str) -> dict[str, object]:
    if text.startswith("["):
        raise DataError(
            where=where,
            found="a JSON array",
            expected="JSON Lines: one object a line",
            fix="Write each element of the array on a line of its own, e.g. jq -c '.[]' data.json > data.jsonl",
        )
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _broken(where, "JSON nested too deeply") from error
    except ValueError as error:
        raise _broken(where, f"broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise _broken(where, f"{shown(value)}")
    return value


def _broken(where: str, found: str) -> DataError:
    return DataError(
        where=where,
        found=found,
        expected="one complete JSON object on one line",
        fix="Correct the line, or remove it.",
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuses an object that names a key twice, which `json` would resolve silently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown(next(name for name in names if names.count(name) > 1))} given twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
