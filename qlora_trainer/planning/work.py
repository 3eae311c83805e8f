"""How much a step computes and moves, summed over the parts of a trace; sizes again as functions of tokens and rank.

Legend: monomials 1, T, R, T x R.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.planning.inside import IN_PARTS, ROW_NORMS, ROW_OPS
from qlora_trainer.planning.timeline import Probe
from qlora_trainer.planning.tracker import StorageTracker, Work

_UNPACK = "bitsandbytes::dequantize_4bit"
_OURS = "qlora_trainer::"
_SHARED = ("bitsandbytes::", *IN_PARTS)  # a weight is unpacked in its first tile, attention between two passes


@dataclass(frozen=True, slots=True)
class WorkSum:
    """Sums over one part.

    Attributes:
        flops: of matrix products, factors of the four monomials.
        moved_bytes: read and written by everything else, likewise.
        unpacked_elements: weights that were dequantized.
        launches: operations that compute, those in tiles left out.
        tile_launches: of them, in each tile.
    """

    flops: NDArray[np.float64]
    moved_bytes: NDArray[np.float64]
    unpacked_elements: int
    launches: int
    tile_launches: float = 0.0

    def at(self, tokens: int, rank: int) -> tuple[float, float]:
        """(FLOPs, bytes) for these values."""
        monomials = np.array([1.0, tokens, rank, tokens * rank])
        return float(self.flops @ monomials), float(self.moved_bytes @ monomials)


NO_WORK = WorkSum(np.zeros(4), np.zeros(4), 0, 0)


def sum_work(tracker: StorageTracker, probe: Probe) -> dict[object, WorkSum]:
    """The work of each marked part of a trace."""
    starts = [start for start, _ in tracker.events.marks]
    parts: dict[object, list[Work]] = {label: [] for _, label in tracker.events.marks}
    for work in tracker.work:
        place = bisect_right(starts, work.index) - 1
        if place >= 0:
            parts[tracker.events.marks[place][1]].append(work)
    return {label: _sum(own, probe) for label, own in parts.items()}


def _sum(part: Sequence[Work], probe: Probe) -> WorkSum:
    flops, moved_bytes, unpacked_elements = np.zeros(4), np.zeros(4), 0
    num_in_tiles = _num_in_tiles(part, probe)
    for work in part:
        if work.op == _UNPACK:
            unpacked_elements += 2 * work.moved[0]  # two weights a packed byte
        elif work.op == ROW_NORMS:
            unpacked_elements += 2 * work.moved[1]
        elif work.flops:
            _add(flops, work.flops, probe)
        elif work.op in ROW_OPS or not work.op.startswith(_OURS):  # attention and loss: see `throughput`
            for num_bytes in work.moved:
                _add(moved_bytes, num_bytes, probe)
    return WorkSum(
        flops, moved_bytes, unpacked_elements, len(part) - num_in_tiles, tile_launches=num_in_tiles / probe.num_tiles
    )


def _num_in_tiles(part: Sequence[Work], probe: Probe) -> int:
    """How many operations there are from the first one on a tile to the last, without those that all of them share."""
    if not probe.has_tile:
        return 0
    of_tiles = [number for number, work in enumerate(part) if any(_is_of_tile(size, probe) for size in work.moved)]
    if not of_tiles:
        return 0
    return sum(not work.op.startswith(_SHARED) for work in part[of_tiles[0] : of_tiles[-1] + 1])


def _is_of_tile(number: int, probe: Probe) -> bool:
    return probe.has_tile and number % probe.tile == 0 and number % probe.tokens != 0


def _add(factors: NDArray[np.float64], number: int, probe: Probe) -> None:
    if _is_of_tile(number, probe):  # all tiles together are all tokens
        has_rank = probe.has_rank and number % probe.rank == 0
        factors[1 + 2 * int(has_rank)] += number / probe.tokens / (probe.rank if has_rank else 1)
        return
    has_tokens = number % probe.tokens == 0
    has_rank = probe.has_rank and number % probe.rank == 0
    factor = number // (probe.tokens if has_tokens else 1) // (probe.rank if has_rank else 1)
    factors[int(has_tokens) + 2 * int(has_rank)] += factor
