"""The choice: which knobs stay within a budget, and which of those train fastest.

Sequence length, rank and optimizer are settled before; among what fits the fastest is taken (micro-batch, layers kept,
loss chunk), and a budget that is used is no defect: recomputing what could have been kept is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.planning.price import Layout, Usage
from qlora_trainer.step.batch import ROW_MULTIPLE

MAX_LOSS_CHUNK, MIN_LOSS_CHUNK = 4096, 64
# Micro-batches are tried in steps of about this ratio: a finer one changes throughput by less than it is known to.
TOKEN_STEP = 1.12
MAX_MULTIPLES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What the search may vary; what the user pinned has one value.

    Attributes:
        rank, seq_len: settled.
        rows_of: tokens of a micro-batch -> documents that attention sees at once, 1 when packed.
        tokens: micro-batches to try, ascending.
        loss_chunks: ascending.
        recompute: fewest and most layers that may be recomputed.
        optimizer: settled, as the config names it.
        offload: fewest and most of the recomputed layers whose input may wait on the host.
        levers: settled; other sets of levers are other spaces (see `rungs`).
    """

    rank: int
    seq_len: int
    rows_of: Callable[[int], int]
    tokens: tuple[int, ...]
    loss_chunks: tuple[int, ...]
    recompute: tuple[int, int]
    optimizer: str
    offload: tuple[int, int] = (0, 0)
    levers: Levers = NO_LEVERS

    @property
    def num_policies(self) -> int:
        """How many ways there are to hold the layers' activations, from the least memory to the most."""
        fewest, most = self.recompute
        return 1 + most - fewest + min(self.offload[1], most) - min(self.offload[0], most)

    def policy(self, index: int) -> tuple[int, int]:
        """(recomputed, offloaded) layers of the `index`-th way: first fewer are offloaded, then more are kept."""
        low, high = (min(bound, self.recompute[1]) for bound in self.offload)
        num_recomputed = self.recompute[1] - max(0, index - (high - low))
        return num_recomputed, min(num_recomputed, max(low, high - index))


@dataclass(frozen=True, slots=True)
class Candidate:
    """Knobs that were priced.

    Attributes:
        layout: what bytes depend on.
        optimizer: as the config names it.
        usage: allocated bytes.
        tokens_per_second: estimate.
    """

    layout: Layout
    optimizer: str
    usage: Usage
    tokens_per_second: float


Pricer = Callable[[Layout, str], Usage]
Estimator = Callable[[Layout], float]


def find(space: Space, price: Pricer, estimate: Estimator, fits: Callable[[Usage], bool]) -> list[Candidate]:
    """What fits, fastest first; empty if nothing does."""
    if not fits(smallest(space, price, estimate).usage):
        return []
    found = _fitting(space, price, estimate, fits)
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.usage.peak_bytes))


def smallest(space: Space, price: Pricer, estimate: Estimator) -> Candidate:
    """The knobs that need least: everything given up that may be."""
    layout = layout_of(space, space.tokens[0], space.loss_chunks[0], *space.policy(0))
    return Candidate(layout, space.optimizer, price(layout, space.optimizer), estimate(layout))


def layout_of(space: Space, tokens: int, loss_chunk: int, num_recomputed: int, num_offloaded: int = 0) -> Layout:
    """One point of the space."""
    return Layout(
        rank=space.rank,
        tokens=tokens,
        seq_len=space.seq_len,
        rows=space.rows_of(tokens),
        num_recomputed=num_recomputed,
        loss_chunk=min(loss_chunk, tokens),
        num_offloaded=num_offloaded,
        levers=space.levers,
    )


def token_steps(smallest_tokens: int, largest_tokens: int, *, multiples_of: int = 0) -> tuple[int, ...]:
    """Micro-batches to try: whole rows between the two, about `TOKEN_STEP` apart, and a few documents of one length.

    Args:
        smallest_tokens, largest_tokens: both are tried.
        multiples_of: a document's tokens, of which the first `MAX_MULTIPLES` multiples are tried too.
    """
    steps = [whole_rows(smallest_tokens)]
    while steps[-1] * TOKEN_STEP < largest_tokens:
        steps.append(whole_rows(max(steps[-1] + 1, int(steps[-1] * TOKEN_STEP))))
    if steps[-1] < largest_tokens:
        steps.append(whole_rows(largest_tokens))
    multiples = (whole_rows(number * multiples_of) for number in range(1, MAX_MULTIPLES + 1))
    return tuple(sorted({*steps, *(tokens for tokens in multiples if steps[0] <= tokens <= steps[-1])}))


def chunk_steps(tokens: int) -> tuple[int, ...]:
    """Loss chunks to try: powers of two, in steps of four."""
    steps = [MIN_LOSS_CHUNK]
    while steps[-1] * 4 <= min(MAX_LOSS_CHUNK, tokens):
        steps.append(steps[-1] * 4)
    return tuple(steps)


def largest_that(is_fine: Callable[[int], bool], values: Sequence[int]) -> int | None:
    """The largest of ascending `values` that is fine, where all before it are too; None if the first is not."""
    if not values or not is_fine(values[0]):
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_fine(values[middle]) else (low, middle - 1)
    return values[low]


def _fitting(space: Space, price: Pricer, estimate: Estimator, fits: Callable[[Usage], bool]) -> Iterator[Candidate]:
    for loss_chunk in space.loss_chunks:
        num_policies = space.num_policies
        for tokens in space.tokens:
            if loss_chunk > tokens and loss_chunk != space.loss_chunks[0]:
                continue

            def is_fine(policy: int, tokens: int = tokens, loss_chunk: int = loss_chunk) -> bool:
                return fits(price(layout_of(space, tokens, loss_chunk, *space.policy(policy)), space.optimizer))

            policy = largest_that(is_fine, range(num_policies))
            if policy is None:
                break  # more tokens need more
            num_policies = policy + 1  # and leave no more room for activations
            layout = layout_of(space, tokens, loss_chunk, *space.policy(policy))
            yield Candidate(layout, space.optimizer, price(layout, space.optimizer), estimate(layout))


def whole_rows(tokens: int) -> int:
    """What a micro-batch of that many tokens is filled up to."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE
