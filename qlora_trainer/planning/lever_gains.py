"""What each lever buys: without any, each alone, all together, at the rank and the length that a plan chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_trainer.model.positions import max_positions
from qlora_trainer.planning.plan import LeverGain, PlanKnobs
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.rungs import Lever, with_levers
from qlora_trainer.planning.search import Space, find, largest_that, smallest

LENGTH_STEP = 64  # tokens
_NO_POSITIONS = 2**17  # how far is looked for a model that counts no positions


def lever_gains(planner: Planner, chosen: PlanKnobs) -> tuple[LeverGain, ...]:
    """Without levers, with each alone, with all of them: the least memory, the longest document, and the speed.

    Beyond what the config settles; what it pins cannot be compared. None of them is confirmed at full depth.
    """
    space, levers = planner.space(chosen.rank, chosen.seq_len), planner.levers()
    # One lever alone is all of them.
    sets: list[Sequence[Lever]] = [(), *((lever,) for lever in levers), *([levers] if len(levers) > 1 else [])]
    return tuple(_gain(planner, with_levers(space, pulled), pulled) for pulled in sets) if levers else ()


def _gain(planner: Planner, space: Space, pulled: Sequence[Lever]) -> LeverGain:
    found = find(space, planner.price, planner.estimate, planner.is_within)
    return LeverGain(
        levers=tuple(lever.name for lever in pulled),
        least_bytes=planner.needed_bytes(smallest(space, planner.price, planner.estimate).usage),
        longest_tokens=_longest(planner, space),
        tokens_per_second=found[0].tokens_per_second if found else 0.0,
    )


def _longest(planner: Planner, space: Space) -> int:
    """Tokens of the longest document that fits as one micro-batch, as far as the model has positions; 0 for none."""
    pinned = planner.config.memory.micro_batch_tokens
    most = max_positions(planner.dry.model.module.config) or _NO_POSITIONS
    most = most if pinned == "auto" else min(most, pinned)

    def fits(tokens: int) -> bool:
        own = replace(planner.space(space.rank, tokens), tokens=(tokens,), offload=space.offload, levers=space.levers)
        return planner.is_within(smallest(own, planner.price, planner.estimate).usage)

    return largest_that(fits, sorted({*range(LENGTH_STEP, most, LENGTH_STEP), most})) or 0
