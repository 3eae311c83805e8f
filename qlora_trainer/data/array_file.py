"""Arrays that lie on disk: a number for each row of data of any size, in the memory of some thousand of them.

They are read by position, not mapped: mapped pages would count as a run's resident memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qlora_trainer.hardware.cache_folder import cache_folder, writing_told

CHUNK = 2**14  # items that are in memory at once


class ArrayFile:
    """An array of one dimension in a file without a name, which is gone when nothing holds it, however a process ends.

    Args:
        dtype: of an item.
        parts: the items, some at a time; none of a part is kept.

    Raises:
        StorageError: the cache folder cannot be written, or its disk is full.
    """

    def __init__(self, dtype: DTypeLike, parts: Iterable[NDArray[Any]]) -> None:
        self.dtype = np.dtype(dtype)
        with writing_told(cache_folder(), room="some bytes for each row"), nameless_file() as file:
            for part in parts:
                file.write(part.astype(self.dtype, copy=False).tobytes())
            file.flush()
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: int) -> Any:
        """An item as Python's own number, or tuple of numbers.

        Raises:
            IndexError: there is none.
        """
        return self._read(range(self._size)[position], 1)[0].item()

    def __iter__(self) -> Iterator[Any]:
        for chunk_N in self.chunks():
            yield from chunk_N.tolist()

    def chunks(self) -> Iterator[NDArray[Any]]:
        """All items, at most `CHUNK` at a time."""
        for first in range(0, self._size, CHUNK):
            yield self._read(first, min(CHUNK, self._size - first))

    def _read(self, first: int, count: int) -> NDArray[Any]:
        return np.frombuffer(
            read_at(self._descriptor, first * self.dtype.itemsize, count * self.dtype.itemsize), self.dtype
        )


def nameless_file() -> IO[bytes]:
    """A file in the cache folder, which is on a disk where /tmp may be in memory; open to write and read.

    Raises:
        OSError: it cannot be made.
        StorageError: there can be no cache folder.
    """
    return tempfile.TemporaryFile(dir=cache_folder())


def read_at(descriptor: int, first: int, num_bytes: int) -> bytes:
    """So many bytes of an open file, from byte `first` on.

    Raises:
        EOFError: it was cut short.
    """
    raw = os.pread(descriptor, num_bytes, first)
    if len(raw) != num_bytes:
        raise EOFError(f"{len(raw)} of {num_bytes} bytes at {first}: the tokenised data was cut short")
    return raw
