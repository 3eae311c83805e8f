"""What torch's allocator takes from the driver for a traced step, by a model of it: more than is alive, by its holes.

A run's steps are not all of one size. The trace is replayed as it is, then with fewer tokens, then as it is again: what
the smaller steps leave in pieces does not fit the large one, which is what an allocator's fragmentation comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_trainer.hardware.caching_allocator import Block, CachingAllocator
from qlora_trainer.hardware.device_memory import DeviceMemory
from qlora_trainer.planning.timeline import InsideBytes
from qlora_trainer.planning.tracker import CATEGORIES, StorageTracker

# Tokens of a step over those of the traced one. Chosen: a rehearsal is full, micro-batches of documents are not quite.
SHARES = (1.0, 0.93, 0.61, 0.85, 1.0)
# What a step makes grows with its tokens, but for unpacked weights, and logits, of which a chunk is made at a time.
_GROWING = ("saved_activation", "recompute", "other")


@dataclass(frozen=True, slots=True)
class Storages:
    """The device's events of a trace: allocations (+) and releases (-) in order.

    Attributes:
        num_bytes: not rounded.
        allocation: index of the event that made the storage.
        grows: whether it grows with the tokens of the step.
    """

    num_bytes: tuple[int, ...]
    allocation: tuple[int, ...]
    grows: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Bytes that torch's allocator has taken from the driver at most; on top of them come context and libraries.

    Attributes:
        expandable_bytes: with expandable segments, as this package asks for them.
        plain_bytes: without, as on systems that have none; free segments are given back before a limit is passed.
        allocated_bytes: the most that was in use at once, in either case.
    """

    expandable_bytes: int
    plain_bytes: int
    allocated_bytes: int

    @property
    def ratio(self) -> float:
        """What is taken over what is used, with expandable segments."""
        return self.expandable_bytes / self.allocated_bytes

    @property
    def worst_ratio(self) -> float:
        """The same of the worse case."""
        return max(self.expandable_bytes, self.plain_bytes) / self.allocated_bytes

    @property
    def fragmentation(self) -> float:
        """Share of what is taken that nothing could be put in, with expandable segments."""
        return 1 - self.allocated_bytes / self.expandable_bytes


def read_storages(tracker: StorageTracker, inside_bytes: InsideBytes) -> Storages:
    """The events of a trace, with what kernels allocate inside themselves; of host memory none."""
    events = tracker.events
    num_bytes = np.asarray(events.num_bytes, dtype=np.int64)
    for inside in tracker.insides:
        num_bytes[inside.index] = inside_bytes(inside)
        num_bytes[inside.index + 1] = -num_bytes[inside.index]
    num_bytes[~np.asarray(events.is_device, dtype=np.bool_)] = 0
    allocation = np.asarray(events.allocation, dtype=np.int64)
    growing = [CATEGORIES.index(name) for name in _GROWING]
    grows = np.isin(np.asarray(events.category, dtype=np.int8)[allocation], growing)
    return Storages(tuple(num_bytes.tolist()), tuple(allocation.tolist()), tuple(grows.tolist()))


def resident_sizes(
    resident: Mapping[str, int], tensors: Mapping[str, Sequence[int]], memory: DeviceMemory
) -> Iterator[int]:
    """The sizes of what stays, one by one where they are known.

    Args:
        resident: category -> bytes in all, rounded.
        tensors: category -> sizes of its tensors; where their sum is another, since some of them lie elsewhere, the
            category counts as one.
        memory: of the device.
    """
    for name, total_bytes in resident.items():
        sizes = tensors.get(name, ())
        yield from sizes if sum(map(memory.aligned, sizes)) == total_bytes else (total_bytes,)


def replay(resident: Iterable[int], storages: Storages, *, limit_bytes: int | None = None) -> Reserved:
    """Load what stays, then take the steps.

    Args:
        resident: sizes of what is allocated before the first step and stays: base, adapters, gradients, optimizer.
        storages: of one step.
        limit_bytes: what there is of the device for torch's allocator.
    """
    sizes = tuple(resident)
    expandable = _replayed(sizes, storages, CachingAllocator(is_expandable=True))
    plain = _replayed(sizes, storages, CachingAllocator(is_expandable=False, limit_bytes=limit_bytes))
    return Reserved(expandable.peak_reserved_bytes, plain.peak_reserved_bytes, expandable.peak_allocated_bytes)


def _replayed(resident: Sequence[int], storages: Storages, allocator: CachingAllocator) -> CachingAllocator:
    for num_bytes in resident:
        allocator.allocate(num_bytes)
    for share in SHARES:
        _take_step(allocator, storages, share)
    return allocator


def _take_step(allocator: CachingAllocator, storages: Storages, share: float) -> None:
    alive: dict[int, Block | None] = {}
    for index, (num_bytes, allocation, grows) in enumerate(
        zip(storages.num_bytes, storages.allocation, storages.grows, strict=True)
    ):
        if num_bytes > 0:
            alive[index] = allocator.allocate(max(1, int(num_bytes * share)) if grows else num_bytes)
        elif num_bytes < 0:
            allocator.free(alive.pop(allocation))
    for block in alive.values():  # what the step hands out
        allocator.free(block)
