"""What glibc does with freed memory: at once back to the system, or kept for the next request until it must go.

A step frees and asks for tens of gigabytes of tensors of a few megabytes each. Given back each time, their pages are
zeroed and mapped anew: 2.7 million page faults in 1,472 tokens of SmolLM2, a third of the step (docs/log.md,
2026-11-25). Kept, they are soon holes that fit nothing: glibc takes an aligned request, as torch makes them, from a
block that is a little larger than any freed one, and 0.6 GB more than are alive stay resident. So freed blocks are
kept, and the holes' pages are given back when otherwise the resident set would pass a limit: some three times a step.
Other C libraries than glibc do as they do.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from qlora_trainer.hardware.memory import resident_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_MAPPED_BLOCKS = 65_536  # glibc's own
_SMALL_BLOCK_BYTES, _LARGE_BLOCK_BYTES = 2**20, 2**25
_NEVER_BYTES = 2**30
# What a step takes without asking for room first: the optimizer's pieces, gradients' norms, norms of activations.
UNASKED_BYTES = 32 * 2**20
PATIENCE_BYTES = 16 * 2**20


@dataclass(slots=True)
class ResidentLimit:
    """Keeps this process's resident memory below a limit by giving back what is free.

    Attributes:
        limit_bytes: None where nothing is to be done, as on a GPU or in a dry run.
        patience_bytes: resident memory up to which giving back would be in vain. What is alive may not fit the limit,
            and walking the heaps before every product costs more than the step.
    """

    limit_bytes: int | None = None
    patience_bytes: int = 0

    def make_room(self, num_bytes: int) -> None:
        """Give free memory back if `num_bytes` more of it might pass the limit."""
        if self.limit_bytes is None:
            return
        resident = resident_bytes()
        if resident + num_bytes > self.limit_bytes and resident > self.patience_bytes:
            release_free_memory()
            left = resident_bytes()
            self.patience_bytes = left + PATIENCE_BYTES if left + num_bytes > self.limit_bytes else 0


def release_free_memory() -> None:
    """Give back every whole page that is free, at the end and in the middle of the heaps."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def return_freed_blocks() -> None:
    """From now on a block of 1 MiB or more goes back to the system when it is freed; for what happens once."""
    _set_thresholds(_SMALL_BLOCK_BYTES, _SMALL_BLOCK_BYTES)


def keep_freed_blocks() -> None:
    """From now on freed blocks below 32 MiB are kept for the next request, for what happens again and again."""
    _set_thresholds(_LARGE_BLOCK_BYTES, _NEVER_BYTES)


def _set_thresholds(mapped_from_bytes: int, trimmed_from_bytes: int) -> None:
    libc = ctypes.CDLL(None)
    # Whoever sets the variable has chosen otherwise. MALLOC_MMAP_MAX_=0, which is advised against page faults, does not
    # count: blocks are kept here without it, and under it the largest ones stayed resident beyond the plan, as holes.
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(_M_MMAP_MAX, _MAPPED_BLOCKS)
        libc.mallopt(_M_MMAP_THRESHOLD, mapped_from_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed_from_bytes)
