"""How far a budget reaches: for ranks and sequence lengths, the largest micro-batch that fits, and its speed."""

from __future__ import annotations

from collections.abc import Callable

from qlora_trainer.planning.plan import FrontierCell, PlanKnobs
from qlora_trainer.planning.price import Usage
from qlora_trainer.planning.search import Estimator, Pricer, Space, largest_that, layout_of

RANKS = (8, 16, 32, 64, 128)
SEQ_LENS = (512, 1024, 2048, 4096, 8192)


def frontier_cells(
    space_of: Callable[[int, int], Space],
    price: Pricer,
    estimate: Estimator,
    is_within: Callable[[Usage], bool],
    chosen: PlanKnobs,
    *,
    max_positions: int | None,
) -> tuple[FrontierCell, ...]:
    """One cell for each of `RANKS` x `SEQ_LENS` and the plan's own; everything else that the plan chose stays.

    Lengths beyond the model's positions are left out: no plan may have them.

    The largest micro-batch is of whole documents with every layer recomputed; its speed is what it reaches when as many
    layers as fit are kept.
    """
    ranks = sorted({*RANKS, chosen.rank})
    lengths = sorted(
        {*(length for length in SEQ_LENS if max_positions is None or length <= max_positions), chosen.seq_len}
    )
    return tuple(
        _cell(space_of(rank, length), price, estimate, is_within, chosen) for rank in ranks for length in lengths
    )


def _cell(
    space: Space, price: Pricer, estimate: Estimator, is_within: Callable[[Usage], bool], chosen: PlanKnobs
) -> FrontierCell:
    fewest, most = space.recompute
    num_documents = max(1, -(-space.tokens[-1] // space.seq_len))
    multiples = range(space.seq_len, space.seq_len * num_documents + 1, space.seq_len)
    chunk = min(chosen.loss_chunk, space.seq_len)

    def is_fine(tokens: int, num_recomputed: int = most) -> bool:
        layout = layout_of(space, -(-tokens // 64) * 64, chunk, num_recomputed)
        return is_within(price(layout, chosen.optimizer))

    tokens = largest_that(is_fine, multiples)
    if tokens is None:
        return FrontierCell(rank=space.rank, seq_len=space.seq_len, micro_batch_tokens=0, tokens_per_second=0.0)
    kept = largest_that(lambda count: is_fine(tokens, most - count), range(most - fewest + 1)) or 0
    speed = estimate(layout_of(space, tokens, chunk, most - kept))
    return FrontierCell(rank=space.rank, seq_len=space.seq_len, micro_batch_tokens=tokens, tokens_per_second=speed)
