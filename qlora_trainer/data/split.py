"""Holds rows out for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.array_file import CHUNK, ArrayFile

_ROW, _DRAW = np.dtype("<i4"), np.dtype("<u8")
_BUCKET_BITS = 16  # of a draw: of a billion rows some fifteen thousand share a bucket


def all_rows(num_rows: int) -> ArrayFile:
    """The numbers of all rows, ascending; fewer than 2**31."""
    return ArrayFile(_ROW, (np.arange(first, min(first + CHUNK, num_rows)) for first in range(0, num_rows, CHUNK)))


def hold_out(num_rows: int, fraction: float, seed: int) -> tuple[ArrayFile, ArrayFile]:
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
        StorageError: see `ArrayFile`.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected 0 <= fraction < 1")
    if fraction == 0 or num_rows < 2:
        return all_rows(num_rows), all_rows(0)
    draws = ArrayFile(_DRAW, _drawn(num_rows, seed))
    num_eval = min(max(round(fraction * num_rows), 1), num_rows - 1)
    last_draw, last_row = _nth_smallest(draws, num_eval - 1)

    def rows(*, held_out: bool) -> Iterator[NDArray[Any]]:
        for rows_N, draws_N in _numbered(draws):
            is_held_out_N = (draws_N < last_draw) | ((draws_N == last_draw) & (rows_N <= last_row))
            yield rows_N[is_held_out_N == held_out]

    return ArrayFile(_ROW, rows(held_out=False)), ArrayFile(_ROW, rows(held_out=True))


def _nth_smallest(draws: ArrayFile, position: int) -> tuple[np.uint64, int]:
    """The draw at `position` were they sorted, the first row first where draws are equal; and its row."""
    shift = np.uint64(64 - _BUCKET_BITS)
    counts = np.zeros(2**_BUCKET_BITS, dtype=np.int64)
    for draws_N in draws.chunks():
        counts += np.bincount((draws_N >> shift).astype(np.int64), minlength=counts.size)
    ends = np.cumsum(counts)
    bucket = int(np.searchsorted(ends, position, side="right"))
    found = []
    for rows_N, draws_N in _numbered(draws):
        is_in_N = (draws_N >> shift) == bucket
        if is_in_N.any():
            found.append((rows_N[is_in_N], draws_N[is_in_N]))
    rows_M, draws_M = (np.concatenate(parts) for parts in zip(*found, strict=True))
    index = np.argsort(draws_M, kind="stable")[position - int(ends[bucket] - counts[bucket])]
    return draws_M[index], int(rows_M[index])


def _numbered(draws: ArrayFile) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Rows, and what was drawn for them."""
    first = 0
    for draws_N in draws.chunks():
        yield np.arange(first, first + draws_N.size), draws_N
        first += draws_N.size


def _drawn(num_rows: int, seed: int) -> Iterator[NDArray[Any]]:
    """For each row a pseudo-random rank that depends on nothing but both numbers, on every machine and version."""
    for first in range(0, num_rows, CHUNK):
        rows = range(first, min(first + CHUNK, num_rows))
        words = (hashlib.blake2b(b"%d:%d" % (seed, row), digest_size=16).digest()[:8] for row in rows)
        yield np.frombuffer(b"".join(words), dtype=">u8")
