"""How far a budget reaches: for ranks and sequence lengths, the largest micro-batch that fits, and its speed."""

from __future__ import annotations

from qlora_trainer.model.positions import max_positions
from qlora_trainer.planning.plan import FrontierCell, PlanKnobs
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Layout
from qlora_trainer.planning.search import Space, largest_that, layout_of, whole_rows

RANKS = (8, 16, 32, 64, 128)
SEQ_LENS = (512, 1024, 2048, 4096, 8192)


def frontier_cells(planner: Planner, chosen: PlanKnobs) -> tuple[FrontierCell, ...]:
    """One cell for each of `RANKS` x `SEQ_LENS` and the plan's own; everything else that the plan chose stays.

    Lengths beyond the model's positions are left out: no plan may have them.

    The largest micro-batch is of whole documents with every layer recomputed; its speed is what it reaches when as many
    layers as fit are kept.
    """
    most = max_positions(planner.dry.model.module.config)
    ranks = sorted({*RANKS, chosen.rank})
    lengths = sorted({*(length for length in SEQ_LENS if most is None or length <= most), chosen.seq_len})
    return tuple(_cell(planner, planner.space(rank, length), chosen) for rank in ranks for length in lengths)


def _cell(planner: Planner, space: Space, chosen: PlanKnobs) -> FrontierCell:
    fewest, most = space.recompute
    num_documents = max(1, space.tokens[-1] // space.seq_len)
    multiples = range(space.seq_len, space.seq_len * num_documents + 1, space.seq_len)
    chunk = min(chosen.loss_chunk, space.seq_len)

    def layout(tokens: int, num_recomputed: int) -> Layout:
        return layout_of(space, whole_rows(tokens), chunk, num_recomputed)

    def is_fine(tokens: int, num_recomputed: int = most) -> bool:
        return planner.is_within(planner.price(layout(tokens, num_recomputed), chosen.optimizer))

    tokens = largest_that(is_fine, multiples)
    if tokens is None:
        return FrontierCell(rank=space.rank, seq_len=space.seq_len, micro_batch_tokens=0, tokens_per_second=0.0)
    kept = largest_that(lambda count: is_fine(tokens, most - count), range(most - fewest + 1)) or 0
    speed = planner.estimate(layout(tokens, most - kept))
    return FrontierCell(rank=space.rank, seq_len=space.seq_len, micro_batch_tokens=tokens, tokens_per_second=speed)
