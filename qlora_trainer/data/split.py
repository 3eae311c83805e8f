"""Holds rows out for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from qlora_trainer.data.rows import Row


def hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into a train and an eval part by a hash of (seed, row index).

    Args:
        rows: all rows of one file.
        fraction: share to hold out, 0 <= fraction < 1; rounded to whole rows, and at least one row lands on each side
            where there are two.
        seed: another seed holds out other rows.

    Returns:
        (train rows, eval rows), each in file order; no eval rows when `fraction` is 0 or there is one row only.

    Raises:
        ValueError: `fraction` is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected 0 <= fraction < 1")
    if fraction == 0 or len(rows) < 2:
        return list(rows), []
    num_eval = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    ranked = sorted(rows, key=lambda row: _draw(seed, row.index))
    held_out = {row.index for row in ranked[:num_eval]}
    return [row for row in rows if row.index not in held_out], [row for row in rows if row.index in held_out]


def _draw(seed: int, index: int) -> bytes:
    """A pseudo-random rank that depends on nothing but its arguments, on every machine and version."""
    return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).digest()
