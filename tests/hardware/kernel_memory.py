"""What the kernel says about a tensor's pages, and how to make it take them away."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

from torch import Tensor

MADV_PAGEOUT = 21  # linux/mman.h; the mmap module does not have it
MS_SYNC = 4

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def page_out(mapped: Tensor) -> None:
    """Write a file mapping's pages to its file and take them from memory, as the kernel does under pressure.

    Asked on every processor in turn, and several times if need be: the kernel passes over a page that waits in
    another processor's batch of new pages (madvise empties that of its own only), or that it is itself busy with.
    """
    processors = os.sched_getaffinity(0)
    try:
        for _ in range(20):
            for processor in processors:
                os.sched_setaffinity(0, {processor})
                _require_success(_LIBC.msync(mapped.data_ptr(), mapped.nbytes, MS_SYNC), "msync")
                _require_success(_LIBC.madvise(mapped.data_ptr(), mapped.nbytes, MADV_PAGEOUT), "madvise")
                if share_in_memory(mapped) == 0.0:
                    return
            time.sleep(0.02)
    finally:
        os.sched_setaffinity(0, processors)


def share_in_memory(mapped: Tensor) -> float:
    """Of the pages of a mapping, the share that is in memory (mincore)."""
    num_pages = -(-mapped.nbytes // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * num_pages)()
    _require_success(_LIBC.mincore(mapped.data_ptr(), mapped.nbytes, pages), "mincore")
    return sum(page & 1 for page in pages) / num_pages


def resident_bytes(mapped: Tensor) -> int:
    """Bytes of the mapping that holds `mapped` that count as this process's memory (Rss in smaps)."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for index, line in enumerate(lines):
        first, dash, rest = line.partition(" ")[0].partition("-")
        if dash and int(first, 16) <= mapped.data_ptr() < int(rest, 16):
            rss = next(entry for entry in lines[index:] if entry.startswith("Rss:"))
            return int(rss.split()[1]) * 1024
    raise LookupError(f"no mapping holds address {mapped.data_ptr():#x}")


def _require_success(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
