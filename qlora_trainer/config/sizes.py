"""Memory sizes as people write them ("8GiB", "500 MB", 1073741824) turned into bytes.

GiB is 2^30 bytes and GB is 10^9. A bare "8G" is refused: half of the world reads it as the one, half as the other.
"""

from __future__ import annotations

import re
from decimal import Decimal

UNIT_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
MAX_SIZE_BYTES = 2**63 - 1  # what a C size or a file offset can hold
EXPECTED_SIZE = 'a size above zero such as "8GiB", "500MiB", "6GB" or a plain number of bytes'

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]*)", re.ASCII)


def parse_size_bytes(text: str) -> int:
    """Read a size.

    Args:
        text: a number and a unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, in any case), or a whole number of bytes.

    Returns:
        Bytes, rounded down, at least 1.

    Raises:
        ValueError: `text` is no such size; the message says what one looks like.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(EXPECTED_SIZE)
    number, unit = match.groups()
    if not unit and "." in number:  # "1.5" of what?
        raise ValueError(EXPECTED_SIZE)
    unit_bytes = UNIT_BYTES.get(unit.upper() or "B")
    if unit_bytes is None:
        raise ValueError(EXPECTED_SIZE)
    size_bytes = int(Decimal(number) * unit_bytes)  # Decimal: 1.1GiB must not depend on binary rounding
    if not 1 <= size_bytes <= MAX_SIZE_BYTES:
        raise ValueError(EXPECTED_SIZE)
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Write a size exactly, in the largest binary unit that divides it; `parse_size_bytes` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        number, rest = divmod(size_bytes, UNIT_BYTES[unit.upper()])
        if number and not rest:
            return f"{number}{unit}"
    return f"{size_bytes}B"
