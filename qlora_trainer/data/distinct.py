"""Counts different values without all of them in memory: they are dealt to files, equal ones to the same one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.array_file import nameless_file
from qlora_trainer.hardware.cache_folder import cache_folder, writing_told

_VALUES_A_FILE = 2**17  # 1 MiB, some of it twice while they are sorted
_MOST_FILES = 256  # open at once; beyond 33 million values they grow


def count_distinct(parts: Iterable[NDArray[np.uint64]], num_values: int) -> int:
    """How many different ones there are, exactly.

    Args:
        parts: the values, hashes, some thousand at a time; dealt by their remainder.
        num_values: about how many there are of them.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    num_files = min(num_values // _VALUES_A_FILE + 1, _MOST_FILES)
    with writing_told(cache_folder(), room="8 bytes for each row"), ExitStack() as stack:
        files = [stack.enter_context(nameless_file()) for _ in range(num_files)]
        for part_N in parts:
            values_N = np.unique(part_N)  # so that a value that is everywhere does not make its file long
            file_of_N = values_N % np.uint64(num_files)
            values_N = values_N[np.argsort(file_of_N, kind="stable")]
            ends = np.cumsum(np.bincount(file_of_N.astype(np.int64), minlength=num_files))
            for file, values in zip(files, np.split(values_N, ends[:-1]), strict=True):
                file.write(values.tobytes())
        num_distinct = 0
        for file in files:
            file.seek(0)
            num_distinct += int(np.unique(np.frombuffer(file.read(), dtype=np.uint64)).size)
        return num_distinct
