"""Timelines with sizes that are functions of tokens, tile and rank, so that one trace prices every candidate.

A trace is made at probe values for tokens (T) and rank (R) that are large primes. A storage whose size is a multiple of
the probe grows with it, so each size is known as `factor * T^0|1 * R^0|1`. Where layers take tokens in tiles, a tile is
a prime number of them, too, and the last one next to nothing: no larger than the others. Sizes are rounded, added up
and compared only afterwards, for the values of a candidate: a maximum of lines is no line, so it is taken last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.planning.tracker import CATEGORIES, Inside, StorageTracker

PROBE_PRIMES = (1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097, 1103, 1109, 1117)

LARGEST_REST = 8  # tokens in the last tile of a trace

InsideBytes = Callable[[Inside], int]


@dataclass(frozen=True, slots=True)
class Probe:
    """Values to trace at; no size that does not depend on them is a multiple of either.

    Where `has_rank` is false, the rank is not probed: sizes are those of the adapters that were traced.

    Attributes:
        tile: tokens of a tile, where there are tiles; two at least, and a few tokens more, are `tokens`.
    """

    tokens: int
    rank: int
    tile: int = 1
    has_rank: bool = True
    has_tile: bool = False

    @property
    def num_tiles(self) -> int:
        """The last one, of a few tokens, included."""
        return -(-self.tokens // self.tile)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the work, as events in order.

    Attributes:
        factor: signed bytes over the powers of tokens, tile and rank.
        has_tokens, has_tile, has_rank: whether the size grows with them; with one of the first two at most.
        category: index into `CATEGORIES`.
        insides: (position, what a kernel allocates inside itself there); the factor of both its events is 0.
    """

    factor: NDArray[np.int64]
    has_tokens: NDArray[np.bool_]
    has_tile: NDArray[np.bool_]
    has_rank: NDArray[np.bool_]
    category: NDArray[np.int8]
    insides: tuple[tuple[int, Inside], ...]

    def sizes(
        self, tokens: int, rank: int, *, tile: int, alignment_bytes: int, inside_bytes: InsideBytes
    ) -> NDArray[np.int64]:
        """Signed bytes of each event, rounded as the allocator does."""
        sizes = self.factor * np.where(self.has_tokens, tokens, 1) * np.where(self.has_rank, rank, 1)
        sizes *= np.where(self.has_tile, min(tile, tokens), 1)
        for position, inside in self.insides:
            num_bytes = inside_bytes(inside)
            sizes[position], sizes[position + 1] = num_bytes, -num_bytes
        if alignment_bytes > 1:
            magnitudes = np.abs(sizes)
            sizes = np.sign(sizes) * (-(-magnitudes // alignment_bytes) * alignment_bytes)
        return sizes


EMPTY_SEGMENT = Segment(
    np.zeros(0, dtype=np.int64),
    np.zeros(0, dtype=np.bool_),
    np.zeros(0, dtype=np.bool_),
    np.zeros(0, dtype=np.bool_),
    np.zeros(0, dtype=np.int8),
    (),
)


@dataclass(frozen=True, slots=True)
class Outline:
    """A segment at given values.

    Attributes:
        net: category -> bytes by which the segment raises the level.
        net_bytes: of all categories.
        peak_bytes: the most above the level at its start.
        at_peak: category -> bytes above the level at its start, at that moment.
    """

    net: NDArray[np.int64]
    net_bytes: int
    peak_bytes: int
    at_peak: NDArray[np.int64]


def outline(segment: Segment, sizes: NDArray[np.int64]) -> Outline:
    """What matters of a segment whose events have these sizes."""
    net = np.zeros(len(CATEGORIES), dtype=np.int64)
    np.add.at(net, segment.category, sizes)
    at_peak = np.zeros(len(CATEGORIES), dtype=np.int64)
    if not sizes.size:
        return Outline(net, 0, 0, at_peak)
    levels = np.cumsum(sizes)
    last = int(levels.argmax())
    if levels[last] <= 0:
        return Outline(net, int(levels[-1]), 0, at_peak)
    np.add.at(at_peak, segment.category[: last + 1], sizes[: last + 1])
    return Outline(net, int(levels[-1]), int(levels[last]), at_peak)


def on_a_line(first: tuple[int, int], second: tuple[int, int], number: int) -> int:
    """The bytes that `number` equal parts take, from what two other numbers of them take: (parts, bytes) each."""
    (few, few_bytes), (some, some_bytes) = first, second
    return some_bytes + (some_bytes - few_bytes) * (number - some) // (some - few)


def choose_probe(sizes: Iterable[int]) -> Probe:
    """Primes that divide none of `sizes` (bytes of storages that depend on neither tokens nor rank).

    Raises:
        RuntimeError: none are left.
    """
    fixed = np.fromiter(set(sizes), dtype=np.int64)
    free = [prime for prime in PROBE_PRIMES if not (fixed % prime == 0).any()]
    if len(free) < 2:
        raise RuntimeError("no prime is left that is not a factor of the model's own sizes")
    tile = next(
        tile
        for tile in range(free[-1] // 2, LARGEST_REST, -1)
        if 0 < free[-1] % tile <= LARGEST_REST and _is_prime(tile) and not (fixed % tile == 0).any()
    )
    return Probe(tokens=free[-1], rank=free[0], tile=tile)


def _is_prime(number: int) -> bool:
    return all(number % factor for factor in range(2, math.isqrt(number) + 1))


def read_segments(tracker: StorageTracker, probe: Probe) -> dict[object, Segment]:
    """The marked parts of a trace, by their marks; events before the first mark are left out.

    A storage made in one part whose mark starts with "forward" (or is "embed" or "loss") and dropped in one that starts
    with "backward" was kept for backward: it becomes `saved_activation`, unless its operation named it.
    """
    events = tracker.events
    num_bytes = np.asarray(events.num_bytes, dtype=np.int64)
    allocation = np.asarray(events.allocation, dtype=np.int64)
    category = np.asarray(events.category, dtype=np.int8)[allocation]
    is_device = np.asarray(events.is_device, dtype=np.bool_)
    starts = [start for start, _ in events.marks] + [len(num_bytes)]
    part = np.searchsorted(np.asarray(starts[:-1]), np.arange(len(num_bytes)), side="right") - 1
    is_backward = np.asarray([_is_backward(label) for _, label in events.marks], dtype=np.bool_)
    _mark_saved(num_bytes, allocation, category, part, is_backward)
    inside_at = {inside.index: inside for inside in tracker.insides}
    has_tokens = num_bytes % probe.tokens == 0
    has_tile = (num_bytes % probe.tile == 0) & ~has_tokens & probe.has_tile
    has_rank = (num_bytes % probe.rank == 0) & probe.has_rank
    factor = num_bytes // np.where(has_tokens, probe.tokens, 1) // np.where(has_rank, probe.rank, 1)
    factor //= np.where(has_tile, probe.tile, 1)
    segments: dict[object, Segment] = {}
    for (start, label), end in zip(events.marks, starts[1:], strict=True):
        kept = np.flatnonzero(is_device[start:end]) + start
        position = {int(index): place for place, index in enumerate(kept)}
        insides = tuple((position[index], inside_at[index]) for index in sorted(inside_at) if index in position)
        own = factor[kept].copy()
        for place, _ in insides:
            own[place] = own[place + 1] = 0
        segments[label] = Segment(own, has_tokens[kept], has_tile[kept], has_rank[kept], category[kept], insides)
    return segments


@dataclass(frozen=True, slots=True)
class Level:
    """The most that was alive in one part of a trace, since the tracker was entered.

    Attributes:
        label: the part's mark.
        peak_bytes: rounded as the allocator does.
        at_peak: category -> bytes at that moment.
    """

    label: object
    peak_bytes: int
    at_peak: Mapping[str, int]


def read_levels(tracker: StorageTracker, alignment_bytes: int, inside_bytes: InsideBytes) -> list[Level]:
    """The peak of each marked part, on the device; at least the level at the part's start."""
    events = tracker.events
    num_bytes = np.asarray(events.num_bytes, dtype=np.int64)
    for inside in tracker.insides:
        num_bytes[inside.index] = inside_bytes(inside)
        num_bytes[inside.index + 1] = -num_bytes[inside.index]
    allocation = np.asarray(events.allocation, dtype=np.int64)
    category = np.asarray(events.category, dtype=np.int8)[allocation]
    starts = [start for start, _ in events.marks] + [len(num_bytes)]
    part = np.searchsorted(np.asarray(starts[:-1]), np.arange(len(num_bytes)), side="right") - 1
    is_backward = np.asarray([_is_backward(label) for _, label in events.marks], dtype=np.bool_)
    _mark_saved(num_bytes, allocation, category, part, is_backward)
    rounded = np.sign(num_bytes) * (-(-np.abs(num_bytes) // alignment_bytes) * alignment_bytes)
    rounded[~np.asarray(events.is_device, dtype=np.bool_)] = 0
    levels = np.concatenate(([0], np.cumsum(rounded)))  # levels[i]: before event i
    found = []
    for (start, label), end in zip(events.marks, starts[1:], strict=True):
        top = start + int(levels[start : end + 1].argmax())
        at_peak = np.zeros(len(CATEGORIES), dtype=np.int64)
        np.add.at(at_peak, category[:top], rounded[:top])
        found.append(Level(label, int(levels[top]), dict(zip(CATEGORIES, at_peak.tolist(), strict=True))))
    return found


def _is_backward(label: object) -> bool:
    return isinstance(label, tuple) and label[0] == "backward"


def _mark_saved(
    num_bytes: NDArray[np.int64],
    allocation: NDArray[np.int64],
    category: NDArray[np.int8],
    part: NDArray[np.int64],
    is_backward: NDArray[np.bool_],
) -> None:
    """Change the category, in place, of what was made in forward and dropped in backward."""
    other, saved = CATEGORIES.index("other"), CATEGORIES.index("saved_activation")
    drops = np.flatnonzero(num_bytes < 0)
    made = allocation[drops]
    crosses = (
        (part[made] >= 0)
        & ~is_backward[np.maximum(part[made], 0)]
        & is_backward[np.maximum(part[drops], 0)]
        & (category[made] == other)
    )
    category[made[crosses]] = saved
    category[drops[crosses]] = saved
