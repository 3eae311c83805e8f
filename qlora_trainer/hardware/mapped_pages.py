"""Pages of mapped files: which part of memory they are, given back, and asked for ahead.

A page that is given back is read again from the file (or from the kernel's cache of it) when it is touched, so this is
for what is never written. Of memory that is no file's the kernel would make zeros: `spans_of` refuses it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What lies this near to each other is one span: what is between them is given back with them.
_NEAR_BYTES = 64 * mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Span:
    """Whole pages of a mapped file: addresses `first` to `last`, exclusive."""

    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        return self.last - self.first


def file_spans(tensors: Sequence[Tensor], maps: Path = Path("/proc/self/maps")) -> tuple[Span, ...]:
    """The pages that hold these tensors, each over the pages of a mapped file; see `spans_of`."""
    return spans_of([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors], maps)


def spans_of(parts: Iterable[tuple[int, int]], maps: Path = Path("/proc/self/maps")) -> tuple[Span, ...]:
    """The pages that hold these parts of mapped files, and those between what lies near to each other.

    Args:
        parts: address and bytes of each.
        maps: where the kernel tells what is mapped.

    Raises:
        ValueError: one of them is in memory of no file, or in a mapping that is shared and might be written.
    """
    mappings = _private_file_mappings(maps)
    starts = [mapping.first for mapping in mappings]
    spans: list[Span] = []
    for first, num_bytes in sorted(part for part in parts if part[1]):
        place = bisect_right(starts, first) - 1
        if place < 0 or first + num_bytes > mappings[place].last:
            raise ValueError(f"the {num_bytes} bytes at {first:#x} are no part of a mapped file")
        whole = _whole_pages(first, first + num_bytes)
        near = spans and whole.first - spans[-1].last <= _NEAR_BYTES and spans[-1].first >= mappings[place].first
        if near:
            spans[-1] = Span(spans[-1].first, max(spans[-1].last, whole.last))
        else:
            spans.append(whole)
    return tuple(spans)


def give_back(spans: Sequence[Span]) -> None:
    """Take these pages out of this process's memory; the kernel may keep them as its cache of the file."""
    for span in spans:
        _advise(span, mmap.MADV_DONTNEED)


def read_ahead(spans: Sequence[Span]) -> None:
    """Ask the kernel to read these pages from the disk, if it does not have them, while other work goes on."""
    for span in spans:
        _advise(span, mmap.MADV_WILLNEED)


def _whole_pages(first: int, last: int) -> Span:
    page = mmap.PAGESIZE
    return Span(first // page * page, -(-last // page) * page)


def _private_file_mappings(maps: Path) -> list[Span]:
    found = []
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)  # proc(5): address, permissions, offset, device, inode, path
        if fields[4] != "0" and fields[1].endswith("p"):
            first, _, last = fields[0].partition("-")
            found.append(Span(int(first, 16), int(last, 16)))
    return _joined(found)


def _joined(mappings: list[Span]) -> list[Span]:
    """Neighbours as one: a page that was written, or advised otherwise, splits a mapping."""
    joined: list[Span] = []
    for mapping in mappings:
        if joined and joined[-1].last == mapping.first:
            joined[-1] = Span(joined[-1].first, mapping.last)
        else:
            joined.append(mapping)
    return joined


def _advise(span: Span, advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(span.first), ctypes.c_size_t(span.num_bytes)
    if libc.madvise(address, length, ctypes.c_int(advice)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"madvise({advice}) of {span.num_bytes} bytes: {os.strerror(number)}")
