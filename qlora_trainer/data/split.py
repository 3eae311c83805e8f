"""Holds rows out for evaluation."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def hold_out(num_rows: int, fraction: float, seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Splits rows into a train and an eval part by a hash of (seed, row number).

    Args:
        num_rows: of all files, fewer than 2**31.
        fraction: share to hold out, 0 <= fraction < 1; rounded to whole rows, and at least one row lands on each side
            where there are two.
        seed: another seed holds out other rows.

    Returns:
        (train rows, eval rows): their numbers, ascending; no eval rows when `fraction` is 0 or there is one row only.

    Raises:
        ValueError: `fraction` is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected 0 <= fraction < 1")
    rows_N = np.arange(num_rows, dtype=np.int32)
    if fraction == 0 or num_rows < 2:
        return rows_N, rows_N[:0]
    num_eval = min(max(round(fraction * num_rows), 1), num_rows - 1)
    draws_N = np.fromiter((_draw(seed, row) for row in range(num_rows)), dtype=np.uint64, count=num_rows)
    is_held_out_N = np.zeros(num_rows, dtype=np.bool_)
    is_held_out_N[np.argsort(draws_N, kind="stable")[:num_eval]] = True
    return rows_N[~is_held_out_N], rows_N[is_held_out_N]


def _draw(seed: int, row: int) -> int:
    """A pseudo-random rank that depends on nothing but its arguments, on every machine and version."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=16).digest()[:8], "big")
