"""The model of torch's CUDA allocator: sequences worked out by hand from its source, and what must hold for any."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.hardware import caching_allocator
from qlora_trainer.hardware.caching_allocator import Block, CachingAllocator

KIB, MIB = 2**10, 2**20
MODES = pytest.mark.parametrize("is_expandable", [False, True], ids=["plain", "expandable"])
HEADER = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
# A number of bytes to allocate, or which of those that are alive to release.
STEPS = st.lists(
    st.one_of(
        st.integers(0, 64 * MIB).map(lambda size: ("take", size)), st.integers(0, 99).map(lambda at: ("drop", at))
    )
)


def test_its_numbers_are_those_of_the_installed_torch() -> None:
    text = HEADER.read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr size_t (k\w+) = (\d+);", text)}
    assert constants == {
        "kMinBlockSize": caching_allocator.ALIGNMENT_BYTES,
        "kSmallSize": caching_allocator.SMALL_BYTES,
        "kSmallBuffer": caching_allocator.SMALL_SEGMENT_BYTES,
        "kMinLargeAlloc": caching_allocator.OWN_SEGMENT_BYTES,
        "kRoundLarge": caching_allocator.ROUND_LARGE_BYTES,
    }
    (large,) = re.findall(r"large_segment_size_\{(\d+)\}", text)
    assert int(large) == caching_allocator.LARGE_SEGMENT_BYTES


@pytest.mark.parametrize(
    "num_bytes, allocated, plain, expandable",
    [
        (0, 0, 0, 0),
        (1, 512, 2 * MIB, 2 * MIB),
        (512, 512, 2 * MIB, 2 * MIB),
        (513, 1024, 2 * MIB, 2 * MIB),
        (MIB, MIB, 2 * MIB, 2 * MIB),  # the largest that is small
        (MIB + 1, MIB + 512, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB, 20 * MIB),  # a segment of its own; pages of 20 MiB where segments expand
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB, 20 * MIB),
        (20 * MIB + 512 * KIB, 20 * MIB + 512 * KIB, 22 * MIB, 40 * MIB),
    ],
)
def test_one_allocation(num_bytes: int, allocated: int, plain: int, expandable: int) -> None:
    for is_expandable, reserved in ((False, plain), (True, expandable)):
        allocator = CachingAllocator(is_expandable=is_expandable)
        allocator.allocate(num_bytes)
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


@MODES
def test_what_is_released_is_taken_again_and_stays_reserved(is_expandable: bool) -> None:
    allocator = CachingAllocator(is_expandable=is_expandable)
    for _ in range(3):
        allocator.free(allocator.allocate(6 * MIB))
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 20 * MIB)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (6 * MIB, 20 * MIB)


def test_a_plain_large_block_is_split_only_for_more_than_1_mib() -> None:
    """12 MiB are free: 11 MiB take all of it, since 1 MiB would be left; 10.5 MiB leave 1.5, which are used."""
    whole = CachingAllocator(is_expandable=False)
    whole.free(whole.allocate(12 * MIB))
    whole.allocate(11 * MIB)
    assert whole.allocated_bytes == 12 * MIB
    split = CachingAllocator(is_expandable=False)
    split.free(split.allocate(12 * MIB))
    split.allocate(10 * MIB + 512 * KIB)
    assert split.allocated_bytes == 10 * MIB + 512 * KIB
    split.allocate(MIB + 512 * KIB)
    assert (split.allocated_bytes, split.reserved_bytes) == (12 * MIB, 12 * MIB)


def test_the_best_fit_is_taken_not_the_first() -> None:
    allocator = CachingAllocator(is_expandable=False)
    blocks = [allocator.allocate(size * MIB) for size in (30, 14, 20)]
    for block in blocks:
        allocator.free(block)
    taken = allocator.allocate(14 * MIB)
    assert taken is blocks[1]
    assert allocator.reserved_bytes == 64 * MIB


def test_plain_segments_do_not_join() -> None:
    """Two free blocks of 16 MiB are no 32 MiB, which is what fragmentation is."""
    allocator = CachingAllocator(is_expandable=False)
    for block in [allocator.allocate(16 * MIB) for _ in range(2)]:
        allocator.free(block)
    allocator.allocate(32 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (32 * MIB, 64 * MIB)


def test_an_expandable_segment_grows_at_its_free_end() -> None:
    """The same: 40 MiB are mapped for 32, so 32 fit; 48 take two pages more in front of which 40 are free."""
    allocator = CachingAllocator(is_expandable=True)
    for block in [allocator.allocate(16 * MIB) for _ in range(2)]:
        allocator.free(block)
    assert allocator.reserved_bytes == 40 * MIB
    block = allocator.allocate(32 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(block)
    allocator.allocate(48 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (48 * MIB, 60 * MIB)


def test_a_hole_in_an_expandable_segment_is_not_moved() -> None:
    """[hole 30][used 10][free 0 of 40]: 40 MiB do not fit the hole, and map two pages behind what is used."""
    allocator = CachingAllocator(is_expandable=True)
    first = allocator.allocate(30 * MIB)
    allocator.allocate(10 * MIB)
    allocator.free(first)
    allocator.allocate(40 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (50 * MIB, 80 * MIB)


def test_free_segments_are_given_back_before_a_limit_is_passed() -> None:
    """40 MiB: of 16 + 16 that are free 32 fit after both are given back; a segment that is used in part stays."""
    allocator = CachingAllocator(is_expandable=False, limit_bytes=40 * MIB)
    for block in [allocator.allocate(16 * MIB) for _ in range(2)]:
        allocator.free(block)
    taken = allocator.allocate(32 * MIB)
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (32 * MIB, 32 * MIB)
    allocator.free(taken)
    allocator.allocate(8 * MIB)  # a part of the 32
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 62 * MIB  # beyond the limit: nothing could be given back


def test_small_and_large_have_pools_of_their_own() -> None:
    allocator = CachingAllocator(is_expandable=False)
    allocator.free(allocator.allocate(20 * MIB))
    allocator.allocate(MIB)
    assert allocator.reserved_bytes == 22 * MIB
    allocator.allocate(MIB)  # the rest of the small segment
    assert allocator.reserved_bytes == 22 * MIB


@MODES
@settings(max_examples=60)  # each looks at the whole state after every step
@given(steps=STEPS)
def test_what_holds_for_any_sequence(is_expandable: bool, steps: list[tuple[str, int]]) -> None:
    """Mutations tried: no merging with the block before; the rest of a split block forgotten."""
    allocator = CachingAllocator(is_expandable=is_expandable)
    alive: list[Block] = []
    for kind, number in steps:
        if kind == "take":
            block = allocator.allocate(number)
            if block is not None:
                assert block.size >= number
                alive.append(block)
        elif alive:
            allocator.free(alive.pop(number % len(alive)))
        require_sound(allocator, alive)
    for block in alive:
        allocator.free(block)
    require_sound(allocator, [])
    for segment in allocator.segments():
        assert [block.is_mapped for block in segment] in ([True], [True, False])  # all that is free is one block
    assert allocator.allocated_bytes == 0
    if not is_expandable:  # a segment that is whole again takes the same once more
        reserved = allocator.reserved_bytes
        for kind, number in steps[:1]:
            if kind == "take":
                allocator.allocate(number)
        assert allocator.reserved_bytes == reserved


def require_sound(allocator: CachingAllocator, alive: list[Block]) -> None:
    assert allocator.reserved_bytes >= allocator.allocated_bytes == sum(block.size for block in alive)
    found = [block for segment in allocator.segments() for block in segment]
    assert sum(block.size for block in found if block.is_mapped) == allocator.reserved_bytes
    assert {id(block) for block in found if block.is_allocated} == {id(block) for block in alive}
    for segment in allocator.segments():
        for before, after in pairwise(segment):
            assert before.address + before.size == after.address  # none overlaps, and nothing lies between
            joins = not before.is_allocated and not after.is_allocated and before.is_mapped == after.is_mapped
            assert not joins
