"""How far a budget reaches: for ranks and sequence lengths, the largest micro-batch that fits, its speed, by what."""

from __future__ import annotations

from dataclasses import replace

from qlora_trainer.model.positions import max_positions
from qlora_trainer.planning.plan import FrontierCell, PlanKnobs
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Layout
from qlora_trainer.planning.rungs import Lever, pulled_levers, with_levers
from qlora_trainer.planning.search import Space, largest_that, layout_of, whole_rows

RANKS = (8, 16, 32, 64, 128)
SEQ_LENS = (512, 1024, 2048, 4096, 8192)


def frontier_cells(planner: Planner, chosen: PlanKnobs) -> tuple[FrontierCell, ...]:
    """One cell for each of `RANKS` x `SEQ_LENS` and the plan's own; everything else that the plan chose stays.

    Lengths beyond the model's positions are left out: no plan may have them.

    The largest micro-batch is of whole documents with every layer recomputed; its speed is what it reaches when as many
    layers as fit are kept. Where not one document fits with the levers that the plan has pulled, one more is, or two,
    and so on: a cell says which were pulled for it.
    """
    most = max_positions(planner.dry.model.module.config)
    ranks = sorted({*RANKS, chosen.rank})
    lengths = sorted({*(length for length in SEQ_LENS if most is None or length <= most), chosen.seq_len})
    return tuple(_cell(planner, planner.space(rank, length), chosen) for rank in ranks for length in lengths)


def _cell(planner: Planner, space: Space, chosen: PlanKnobs) -> FrontierCell:
    space = replace(space, levers=chosen.levers)
    if chosen.activation_offload_layers:
        space = Lever("offload", planner.dry.num_layers).pulled(space)
    levers = planner.levers()
    alone = [lever.pulled(space) for lever in levers]
    together = [with_levers(space, levers[:number]) for number in range(2, len(levers) + 1)]
    for one in (space, *alone, *together):
        found = _largest(planner, one, chosen)
        if found is not None:
            return found
    return FrontierCell(rank=space.rank, seq_len=space.seq_len, micro_batch_tokens=0, tokens_per_second=0.0)


def _largest(planner: Planner, space: Space, chosen: PlanKnobs) -> FrontierCell | None:
    num_documents = max(1, space.tokens[-1] // space.seq_len)
    multiples = range(space.seq_len, space.seq_len * num_documents + 1, space.seq_len)
    chunk = min(chosen.loss_chunk, space.seq_len)

    def layout(tokens: int, policy: int) -> Layout:
        return layout_of(space, whole_rows(tokens), chunk, *space.policy(policy))

    def is_fine(tokens: int, policy: int = 0) -> bool:
        return planner.is_within(planner.price(layout(tokens, policy), chosen.optimizer))

    tokens = largest_that(is_fine, multiples)
    if tokens is None:
        return None
    policy = largest_that(lambda policy: is_fine(tokens, policy), range(space.num_policies)) or 0
    own = layout(tokens, policy)
    return FrontierCell(
        rank=space.rank,
        seq_len=space.seq_len,
        micro_batch_tokens=tokens,
        tokens_per_second=planner.estimate(own),
        levers=tuple(pulled_levers(own.levers, num_offloaded=own.num_offloaded)),
    )
