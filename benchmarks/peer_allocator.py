"""CUDA's caching allocator while the peer loads its base: what it counts as allocated beyond what was asked for.

torch counts blocks, not requests, and splits a block of the large pool only if more than 1 MiB is left over
(c10/cuda/CUDACachingAllocator.cpp: `should_split`, `get_allocation_size`). Whether a packed weight of, say, 21.5 MiB
sits in a segment of 22 MiB of its own or in a piece of a larger one depends on what was freed before: so the loading is
played through. The blocks stay as they are while the model lives.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES = 512, MIB, 2 * MIB
MIN_LARGE_BYTES, LARGE_SEGMENT_BYTES, ROUND_LARGE_BYTES = 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, in a chain of neighbours."""

    place: int
    num_bytes: int
    is_small: bool
    is_free: bool = False
    before: Block | None = None
    after: Block | None = None

    def __lt__(self, other: Block) -> bool:
        return (self.num_bytes, self.place) < (other.num_bytes, other.place)


class CachingAllocator:
    """Two pools, best fit, neighbours merge when freed; no limit, so nothing is given back to the driver."""

    def __init__(self) -> None:
        self.allocated_bytes = self.reserved_bytes = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}

    def allocate(self, num_bytes: int) -> Block:
        """A block of at least `num_bytes`."""
        size = rounded(num_bytes)
        is_small = size <= SMALL_BYTES
        pool = self._free[is_small]
        place = bisect.bisect_left(pool, Block(-1, size, is_small))
        block = pool.pop(place) if place < len(pool) else self._new_segment(size, is_small)
        left = block.num_bytes - size
        if left >= MIN_BLOCK_BYTES if is_small else left > SMALL_BYTES:
            rest = Block(block.place + size, left, is_small, True, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.num_bytes = rest, size
            bisect.insort(pool, rest)
        block.is_free = False
        self.allocated_bytes += block.num_bytes
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool."""
        self.allocated_bytes -= block.num_bytes
        pool = self._free[block.is_small]
        before, after = block.before, block.after
        if before is not None and before.is_free:
            pool.remove(before)
            block.place, block.before = before.place, before.before
            block.num_bytes += before.num_bytes
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free:
            pool.remove(after)
            block.num_bytes += after.num_bytes
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        block.is_free = True
        bisect.insort(pool, block)

    def _new_segment(self, size: int, is_small: bool) -> Block:
        segment_bytes = LARGE_SEGMENT_BYTES
        if is_small:
            segment_bytes = SMALL_SEGMENT_BYTES
        elif size >= MIN_LARGE_BYTES:
            segment_bytes = -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        block = Block(self.reserved_bytes, segment_bytes, is_small)
        self.reserved_bytes += segment_bytes
        return block


def rounded(num_bytes: int) -> int:
    """A request as the allocator rounds it."""
    return max(MIN_BLOCK_BYTES, -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


def unsplit_bytes(weights: Iterable[tuple[str, int, bool]], *, double_quant: bool) -> int:
    """Bytes in blocks of the loaded base that nobody asked for.

    transformers 4.45-4.48 loads a safetensors file by name, and bitsandbytes quantizes a weight on the device as it
    comes (`Params4bit._quantize`): its 16-bit copy and an fp32 absmax are freed again.

    Args:
        weights: (name, number of elements, whether it is quantized).
    """
    allocator = CachingAllocator()
    kept_bytes = 0
    for _, num_elements, is_quantized in sorted(weights):
        if not is_quantized:
            allocator.allocate(2 * num_elements)
            kept_bytes += rounded(2 * num_elements)
            continue
        num_blocks = num_elements // 64
        copy, absmax = allocator.allocate(2 * num_elements), allocator.allocate(4 * num_blocks)
        kept = [num_elements // 2, 64]  # packed weight, code book
        if double_quant:
            kept += [4, 4 * -(-num_blocks // 256), num_blocks]  # offset, nested absmax, absmax in 8 bits
        for num_bytes in kept:
            allocator.allocate(num_bytes)
            kept_bytes += rounded(num_bytes)
        if double_quant:
            allocator.free(absmax)
        else:
            kept_bytes += rounded(4 * num_blocks)
        allocator.free(copy)
    return allocator.allocated_bytes - kept_bytes
