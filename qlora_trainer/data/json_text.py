"""Strict JSON out of lines, or out of one array that is read piece by piece.

Costs one line, or one element of the array, of at most `MAX_LINE_BYTES` in memory; no torch.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from qlora_trainer.config.strict_json import finite, integer
from qlora_trainer.data.fields import shown
from qlora_trainer.errors import DataError

MAX_LINE_BYTES = 64 * 2**20  # far above any document that can be trained on, far below what hurts to hold
UTF8_BOM = b"\xef\xbb\xbf"
_FIRST_CHUNK_BYTES = 2**20
_AFTER_ELEMENT = frozenset(" \t\r\n,]")  # the first half of 1.5 is a number too
_SPACE = re.compile(r"[ \t\r\n]*")


def iter_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Line numbers and bytes; of a line that is too long only its start, which is longer than `MAX_LINE_BYTES`."""
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        yield line, raw.removeprefix(UTF8_BOM) if line == 1 else raw
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):  # only where bad lines are passed over
            rest = file.readline(MAX_LINE_BYTES + 1)


def decode_line(raw: bytes, where: str) -> str:
    """The text of a line.

    Raises:
        DataError: it is too long, or not UTF-8.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(
            where=where,
            found=f"a line longer than {MAX_LINE_BYTES // 2**20} MiB",
            expected="one conversation a line",
            fix="Put each row on a line of its own.",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            where=where,
            found=f"byte 0x{raw[error.start]:02x} at position {error.start}",
            expected="UTF-8 text",
            fix="Save the file as UTF-8; compressed and Parquet files are known by names that end in .gz and .parquet.",
        ) from error


def parse_line(text: str, where: str) -> dict[str, object]:
    """One object of a JSON Lines file.

    Raises:
        DataError: it is something else.
    """
    try:
        value, end = _STRICT.raw_decode(text)
        if end < len(text):
            raise ValueError(f"Extra data at character {end}")
    except RecursionError as error:
        raise _broken(where, "JSON nested too deeply") from error
    except ValueError as error:
        raise _broken(where, f"broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise _broken(where, shown(value))
    return value


def begins_array(file: BinaryIO) -> bool:
    """Whether the first character that is no space opens an array."""
    start = file.read(len(UTF8_BOM) + 1).removeprefix(UTF8_BOM)
    while start and not start.strip():
        start = file.read(2**12)
    return start.lstrip().startswith(b"[")


def iter_array(file: BinaryIO, path: str) -> Iterator[dict[str, object] | DataError]:
    """The elements of a JSON array, each an object or what is wrong with it.

    Args:
        file: at its start.
        path: names it in errors.

    Raises:
        DataError: the text is broken, so that the elements that follow cannot be found.
    """
    text = _ArrayText(file, path)
    text.require("[")
    number = 0
    if text.next_character() == "]":
        text.require("]")
    else:
        while True:
            number += 1
            value = text.element()
            where = f"{path}:row {number}"
            if isinstance(value, ValueError):
                yield _broken(where, f"broken JSON ({value})")
            else:
                yield value if isinstance(value, dict) else _broken(where, shown(value))
            if text.require(",", "]") == "]":
                break
    if text.next_character():
        raise text.broken("text after the end of the array", 0)


class _ArrayText:
    """The part of an array's text that is being looked at."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._is_whole = "", 0, False
        self._line = 1  # of the first character of _text

    def next_character(self) -> str:
        """The next one that is no space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # it matches the empty text
            self._at = match.end()
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def require(self, *characters: str) -> str:
        """Passes over the next character, which must be one of these."""
        found = self.next_character()
        if found not in characters:
            raise self.broken(f"{shown(found)} in the array" if found else "the end of the file inside the array", 0)
        self._at += 1
        return found

    def element(self) -> object | ValueError:
        """The next value, or what our rules (no key twice, no NaN, no number beyond all floats) say against it."""
        if not self.next_character():
            raise self.broken("the end of the file inside the array", 0)
        value: object
        while True:
            try:
                value, end = _STRICT.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.broken("JSON nested too deeply", 0) from error
            except json.JSONDecodeError as error:
                if self._is_whole or len(self._text) - self._at > MAX_LINE_BYTES:
                    raise self.broken(f"broken JSON ({error.msg})", error.pos - self._at) from error
            except ValueError as error:
                lenient_end = self._end_by_lenient_rules()
                if lenient_end is not None and self._is_closed(error, lenient_end):
                    self._at = lenient_end
                    return error
            else:
                if self._is_closed(value, end):
                    self._at = end
                    return value
            self._read_more()

    def _is_closed(self, value: object, end: int) -> bool:
        """Whether what was found goes no further, as the digits of a number may."""
        if self._is_whole or self._text[end - 1] == "}" or self._text[end : end + 1] in _AFTER_ELEMENT:
            return True
        if len(self._text) - self._at > MAX_LINE_BYTES:
            raise self.broken(f"a value that goes on after {shown(value)}", end - self._at)
        return False

    def broken(self, found: str, offset: int) -> DataError:
        line = self._line + self._text.count("\n", 0, self._at + offset)
        return DataError(
            where=f"{self._path}:{line}",
            found=found,
            expected="a JSON array of objects, or JSON Lines",
            fix="Correct the file.",
        )

    def _end_by_lenient_rules(self) -> int | None:
        try:
            return _LENIENT.raw_decode(self._text, self._at)[1]
        except json.JSONDecodeError as error:
            if self._is_whole:
                raise self.broken(f"broken JSON ({error.msg})", error.pos - self._at) from error
            return None

    def _read_more(self) -> None:
        """Doubles what is looked at, so that a long element is parsed a few times only."""
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        raw = self._file.read(max(_FIRST_CHUNK_BYTES, len(self._text)))
        self._is_whole = not raw
        try:
            self._text += self._decoder.decode(raw, final=self._is_whole)
        except UnicodeDecodeError as error:
            raise self.broken(f"byte 0x{error.object[error.start]:02x} in or after this row", 0) from error


def _broken(where: str, found: str) -> DataError:
    return DataError(
        where=where,
        found=found,
        expected="one complete JSON object",
        fix="Correct the row, or remove it.",
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


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=integer, parse_float=finite
)
_LENIENT = json.JSONDecoder(parse_int=len)  # only the end is asked for, and an integer may have too many digits
