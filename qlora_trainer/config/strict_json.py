"""JSON of files that others may have made: one finite object, read with suspicion, written in one way."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# A manifest has 2 kB and a state a few; a file beyond this is not one that we wrote (json needs about 10 x its size).
MAX_JSON_BYTES = 4 * 2**20


def encode(value: Mapping[str, Any]) -> bytes:
    """Render an object; equal objects give equal bytes.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON does not have.
        TypeError: it holds something that JSON does not have.
    """
    return (json.dumps(value, allow_nan=False, sort_keys=True, indent=1) + "\n").encode()


def json_sha256(value: Any) -> str:
    """SHA-256 of a value as JSON on one line, as 64 hexadecimal digits; equal values give equal ones.

    Raises:
        TypeError: it holds something that JSON does not have.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def decode(data: bytes) -> dict[str, Any]:
    """Parse one object.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, a key given twice, NaN or an infinity, or nested too deep.
    """
    value = decode_value(data.decode())
    if isinstance(value, dict):
        return value
    raise ValueError(f"holds a {type(value).__name__}, not an object")


def decode_value(text: str) -> Any:
    """Parse one value of any kind.

    Raises:
        ValueError: not JSON, a key given twice, NaN, an infinity or a number that would be one, an integer of too many
            digits, or nested too deep.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=integer, parse_float=finite
        )
    except RecursionError:
        raise ValueError("nested too deep") from None


def integer(text: str) -> int:
    """A number without point or exponent.

    Raises:
        ValueError: of more digits than Python reads, which takes time by their square.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"an integer of {len(text.lstrip('-')):,} digits") from None


def finite(text: str) -> float:
    """A number with a point or an exponent.

    Raises:
        ValueError: beyond what a float holds: `float` makes an infinity of it, which JSON does not have.
    """
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text if len(text) < 30 else text[:29] + '…'} is beyond all floats")
    return value


def read_capped(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a small file.

    Args:
        path: the file.
        max_bytes: more than this is not read.

    Raises:
        ValueError: it is larger.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
