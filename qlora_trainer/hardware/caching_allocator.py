"""A model of torch's CUDA caching allocator: what it takes from the driver for a sequence of allocations and releases.

It follows c10/cuda/CUDACachingAllocator.cpp (torch 2.13): `round_size`, `get_allocation_size`, `get_free_block`,
`should_split`, `try_merge_blocks`, `find_expandable_block`, `map_block`, `release_cached_blocks`, with default settings
and one stream.

Nothing here is a GPU's: it is arithmetic, so that what an allocator makes of a run is known before there is one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

# c10/core/AllocatorConfig.h; a test compares them with the header that comes with torch.
ALIGNMENT_BYTES = 512  # kMinBlockSize
SMALL_BYTES = 2**20  # kSmallSize: up to it an allocation comes from the small pool
SMALL_SEGMENT_BYTES = 2 * 2**20  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * 2**20  # large_segment_size, its default
OWN_SEGMENT_BYTES = 10 * 2**20  # kMinLargeAlloc: from it on an allocation gets a segment of its own
ROUND_LARGE_BYTES = 2 * 2**20  # kRoundLarge, to which such a segment is rounded up
# An expandable segment has addresses for all the memory of a device and more: enough for any.
ADDRESS_SPACE_BYTES = 2**46


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment.

    Attributes:
        address: unique over all segments.
        size: bytes.
        is_small: of the small pool.
        is_allocated: in use.
        is_mapped: has memory; only a part of an expandable segment may have none.
        previous, next: its neighbours in the segment.
    """

    address: int
    size: int
    is_small: bool
    is_allocated: bool = False
    is_mapped: bool = True
    previous: Block | None = None
    next: Block | None = None


@dataclass(slots=True)
class _Pool:
    """Blocks of one kind.

    Attributes:
        is_small: for allocations of up to `SMALL_BYTES`.
        free: (size, address, block), sorted: the first that is large enough is the best fit.
        unmapped: (address, block), sorted.
        segments: the first block of each.
    """

    is_small: bool
    free: list[tuple[int, int, Block]] = field(default_factory=list)
    unmapped: list[tuple[int, Block]] = field(default_factory=list)
    segments: list[Block] = field(default_factory=list)

    @property
    def page_bytes(self) -> int:
        return SMALL_SEGMENT_BYTES if self.is_small else LARGE_SEGMENT_BYTES

    def add(self, block: Block) -> None:
        if block.is_mapped:
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: Block) -> None:
        if block.is_mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class CachingAllocator:
    """The state of the allocator of one device.

    Args:
        is_expandable: with `expandable_segments:True`, as this package asks torch for; False is torch's default.
        limit_bytes: what the device has. Before a plain segment would go beyond it, all segments that are free as a
            whole are given back; if that is not enough, the limit is passed all the same, so that it is seen by how
            much. None for no limit.

    Attributes:
        allocated_bytes, peak_allocated_bytes: of blocks in use, rounded; torch's `memory_allocated`.
        reserved_bytes, peak_reserved_bytes: taken from the driver; torch's `memory_reserved`.
    """

    def __init__(self, *, is_expandable: bool, limit_bytes: int | None = None) -> None:
        self.is_expandable, self.limit_bytes = is_expandable, limit_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self._small, self._large = _Pool(is_small=True), _Pool(is_small=False)
        self._next_address = 0

    def allocate(self, num_bytes: int) -> Block | None:
        """A block for a storage of `num_bytes`; an empty storage has none."""
        if num_bytes == 0:
            return None
        size = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        pool = self._small if size <= SMALL_BYTES else self._large
        block = self._take_free(pool, size)
        if block is None:
            block = self._expand(pool, size) if self.is_expandable else self._new_segment(pool, size)
        self._split(pool, block, size)
        block.is_allocated = True
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Give back what `allocate` gave; its memory stays reserved."""
        if block is None:
            return
        assert block.is_allocated
        pool = self._small if block.is_small else self._large
        block.is_allocated = False
        self.allocated_bytes -= block.size
        self._merge(pool, block, block.previous)
        self._merge(pool, block, block.next)
        pool.add(block)

    def segments(self) -> Iterator[list[Block]]:
        """The blocks of each segment, by address."""
        for pool in (self._small, self._large):
            for first in pool.segments:
                block: Block | None = first
                found = []
                while block is not None:
                    found.append(block)
                    block = block.next
                yield found

    def _take_free(self, pool: _Pool, size: int) -> Block | None:
        """The best fit; of an expandable segment's last block counts what it could become."""
        at = bisect_left(pool.free, (size,))
        if at == len(pool.free):
            return None
        if self.is_expandable:
            while at + 1 < len(pool.free) and _possible_size(pool.free[at + 1][2]) < _possible_size(pool.free[at][2]):
                at += 1
        return pool.free.pop(at)[2]

    def _new_segment(self, pool: _Pool, size: int) -> Block:
        if size <= SMALL_BYTES:
            segment_bytes = SMALL_SEGMENT_BYTES
        elif size < OWN_SEGMENT_BYTES:
            segment_bytes = LARGE_SEGMENT_BYTES
        else:
            segment_bytes = -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        if self.limit_bytes is not None and self.reserved_bytes + segment_bytes > self.limit_bytes:
            self._give_back()
        block = Block(self._addresses(segment_bytes), segment_bytes, pool.is_small)
        pool.segments.append(block)
        self._reserve(segment_bytes)
        return block

    def _give_back(self) -> None:
        for pool in (self._small, self._large):
            for _, _, block in list(pool.free):
                if block.previous is None and block.next is None:
                    pool.remove(block)
                    pool.segments.remove(block)
                    self._reserve(-block.size)

    def _expand(self, pool: _Pool, size: int) -> Block:
        """Map pages behind, and where there is none, in front of a free block, until `size` fits."""
        block = self._find_expandable(pool, size)
        if not block.is_mapped:
            self._map(pool, block, min(block.size, size))
        while block.size < size:
            following = block.next
            assert following is not None
            self._map(pool, following, min(size - block.size, following.size))
            block = following  # it has taken in the one before
        pool.remove(block)
        return block

    def _find_expandable(self, pool: _Pool, size: int) -> Block:
        for _, unmapped in pool.unmapped:
            first = unmapped
            if first.previous is not None and not first.previous.is_allocated:
                first = first.previous
            available = 0
            block: Block | None = first
            while block is not None and not block.is_allocated and available < size:
                available += block.size
                block = block.next
            if available >= size:
                return first
        whole = Block(self._addresses(ADDRESS_SPACE_BYTES), ADDRESS_SPACE_BYTES, pool.is_small, is_mapped=False)
        pool.segments.append(whole)
        pool.add(whole)
        return whole

    def _map(self, pool: _Pool, block: Block, size: int) -> None:
        """Give memory to the first `size` bytes of an unmapped block, in whole pages."""
        pool.remove(block)
        page = pool.page_bytes
        mapped_bytes = min(block.size, -(-size // page) * page)
        if mapped_bytes < block.size:
            rest = Block(
                block.address + mapped_bytes, block.size - mapped_bytes, block.is_small, is_mapped=False, previous=block
            )
            _put_behind(block, rest)
            block.size = mapped_bytes
            pool.add(rest)
        block.is_mapped = True
        self._merge(pool, block, block.previous)
        self._merge(pool, block, block.next)
        pool.add(block)
        self._reserve(mapped_bytes)

    def _split(self, pool: _Pool, block: Block, size: int) -> None:
        rest_bytes = block.size - size
        splits_all = pool.is_small or self.is_expandable
        if rest_bytes < ALIGNMENT_BYTES if splits_all else rest_bytes <= SMALL_BYTES:
            return
        rest = Block(block.address + size, rest_bytes, block.is_small)
        _put_behind(block, rest)
        block.size = size
        pool.add(rest)

    def _merge(self, pool: _Pool, block: Block, other: Block | None) -> None:
        """Take a free neighbour in."""
        if other is None or other.is_allocated or other.is_mapped != block.is_mapped:
            return
        pool.remove(other)
        if block.previous is other:
            block.address, block.previous = other.address, other.previous
            if block.previous is not None:
                block.previous.next = block
            else:
                pool.segments[pool.segments.index(other)] = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.previous = block
        block.size += other.size

    def _addresses(self, num_bytes: int) -> int:
        first, self._next_address = self._next_address, self._next_address + num_bytes
        return first

    def _reserve(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)


def _possible_size(block: Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and not following.is_mapped else 0)


def _put_behind(block: Block, rest: Block) -> None:
    rest.previous, rest.next = block, block.next
    if block.next is not None:
        block.next.previous = rest
    block.next = rest
