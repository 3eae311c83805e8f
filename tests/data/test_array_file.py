from __future__ import annotations

import errno
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.array_file import CHUNK, ArrayFile
from qlora_trainer.errors import StorageError


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=30), max_size=5))
def test_what_is_written_in_parts_is_one_array(parts: list[list[int]]) -> None:
    wanted = [number for part in parts for number in part]
    found = ArrayFile("<i4", (np.array(part, dtype=np.int64) for part in parts))
    assert (len(found), list(found)) == (len(wanted), wanted)
    assert [found[position] for position in range(len(wanted))] == wanted
    assert [found[-1 - position] for position in range(len(wanted))] == wanted[::-1]
    with pytest.raises(IndexError):
        found[len(wanted)]


def test_chunks_are_bounded_and_leave_nothing_out() -> None:
    found = ArrayFile("<i8", [np.arange(2 * CHUNK + 5)])
    assert [chunk.size for chunk in found.chunks()] == [CHUNK, CHUNK, 5]
    assert np.array_equal(np.concatenate(list(found.chunks())), np.arange(2 * CHUNK + 5))


def test_it_has_no_name_and_goes_with_its_last_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def num_open() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]  # the listing's own is gone
        return sum(str(tmp_path) in os.readlink(link) for link in links)

    found = ArrayFile("<i4", [np.arange(10)])
    assert (list((tmp_path / "qlora_trainer").iterdir()), num_open()) == ([], 1)
    del found
    gc.collect()
    assert num_open() == 0


def full(**_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_without_room_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(
        StorageError, match=r"found a folder that cannot be written \(No space left on device; [\d,]+ bytes are free\)"
    ):
        ArrayFile("<i4", [np.arange(10)])


def test_a_file_that_was_cut_short_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    make: Callable[..., Any] = tempfile.TemporaryFile

    def kept(**named: Any) -> Any:
        opened.append(make(**named))
        return os.fdopen(os.dup(opened[-1].fileno()), "w+b")

    monkeypatch.setattr(tempfile, "TemporaryFile", kept)
    found = ArrayFile("<i4", [np.arange(10)])
    with opened[0] as file:
        file.truncate(12)
    assert found[2] == 2
    with pytest.raises(EOFError, match="0 of 4 bytes at 12"):
        found[3]
