"""Freed memory is kept while there is room, and given back when there would not be."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from qlora_trainer.hardware import heap
from qlora_trainer.hardware.heap import ResidentLimit, keep_freed_blocks, return_freed_blocks
from qlora_trainer.hardware.memory import resident_bytes

MIB = 2**20

_ONCE = """
import torch
from qlora_trainer.hardware.heap import return_freed_blocks
from qlora_trainer.hardware.memory import resident_bytes

return_freed_blocks()
torch.ones(2**20)
before = resident_bytes()
tensors = [torch.ones(2**20) for _ in range(64)]
alive = torch.ones(1000)
assert resident_bytes() > before + 200 * 2**20
del tensors
print(resident_bytes() - before)
"""

_LARGE = """
import torch
from qlora_trainer.hardware.heap import keep_freed_blocks
from qlora_trainer.hardware.memory import resident_bytes

keep_freed_blocks()
torch.ones(2**20)
before = resident_bytes()
tensor = torch.ones(2**24)
behind = torch.ones(2**19)
del tensor
print(resident_bytes() - before)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or "MALLOC_MMAP_THRESHOLD_" in os.environ,
    reason="no glibc, or its threshold is the user's",
)


@pytest.fixture
def kept_bytes() -> Iterator[int]:
    """Resident bytes before 64 freed tensors of 4 MiB were kept, behind a small one that is alive."""
    keep_freed_blocks()
    heap.release_free_memory()
    before = resident_bytes()
    tensors = [torch.ones(MIB) for _ in range(64)]
    alive = torch.ones(1000)
    del tensors
    yield before
    del alive
    return_freed_blocks()
    heap.release_free_memory()


def test_freed_blocks_are_kept_while_there_is_room(kept_bytes: int) -> None:
    ResidentLimit().make_room(2**60)
    ResidentLimit(kept_bytes + 400 * MIB).make_room(100 * MIB)

    assert resident_bytes() > kept_bytes + 200 * MIB


def test_they_go_when_there_would_not_be(kept_bytes: int) -> None:
    ResidentLimit(kept_bytes + 300 * MIB).make_room(100 * MIB)

    assert resident_bytes() < kept_bytes + 40 * MIB


def test_what_is_alive_beyond_the_limit_is_not_looked_for_again_and_again(
    kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident bytes are told here: a process with a history gives pages back, or is taken some, when it likes."""
    resident, releases = [kept_bytes], []
    with monkeypatch.context() as patch:
        patch.setattr(heap, "resident_bytes", lambda: resident[0])
        patch.setattr(heap, "release_free_memory", lambda: releases.append(resident[0]))
        limit = ResidentLimit(kept_bytes - 100 * MIB)
        for _ in range(100):
            limit.make_room(MIB)
        assert len(releases) == 1

        resident[0] += 16 * MIB
        limit.make_room(MIB)
        assert len(releases) == 1, "within its patience"
        resident[0] += 1
        limit.make_room(MIB)
        limit.make_room(MIB)
        assert len(releases) == 2

    limit = ResidentLimit(kept_bytes + 300 * MIB)
    tensors = [torch.ones(MIB) for _ in range(64)]
    alive = torch.ones(1000)
    del tensors
    limit.make_room(100 * MIB)
    assert resident_bytes() < kept_bytes + 40 * MIB
    del alive


def test_what_happens_once_leaves_nothing() -> None:
    # In a process of its own: a block that fits a hole of the heap is taken from there, and is no mapping to unmap.
    growth = subprocess.run([sys.executable, "-c", _ONCE], capture_output=True, text=True, check=True).stdout

    assert int(growth) < 40 * MIB


def test_the_largest_blocks_are_not_kept_even_where_the_environment_forbids_to_map_them() -> None:
    """Mutation tried: without the heap's own M_MMAP_MAX 64 MiB stay."""
    environment = os.environ | {"MALLOC_MMAP_MAX_": "0"}
    command = [sys.executable, "-c", _LARGE]
    growth = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert int(growth) < 8 * MIB


def test_a_threshold_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")

    class Libc:
        def mallopt(self, _name: int, _value: int) -> None:
            raise AssertionError("the user's threshold was changed")

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Libc())
    keep_freed_blocks()
    return_freed_blocks()
