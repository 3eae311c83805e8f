"""What all passes over tiles of tokens share: which tokens, whose dropout, and sums of gradients.

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_trainer.model.linear import NF4Linear


def tiles(num_tokens: int, tile_tokens: int) -> list[slice]:
    """Tokens in order, `tile_tokens` at a time."""
    return [slice(first, min(first + tile_tokens, num_tokens)) for first in range(0, num_tokens, tile_tokens)]


@contextmanager
def drawn_for(linears: Sequence[NF4Linear], tile: slice) -> Iterator[None]:
    """While active, dropout is drawn for these tokens of the micro-batch."""
    keys = [linear.adapter.of_tokens for linear in linears if linear.adapter is not None]
    for own in keys:
        own.tokens = tile
    try:
        yield
    finally:
        for own in keys:
            own.tokens = None


def add_(sums: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add a tile's gradients to what there is, in fp32."""
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        before = sums[index]
        if before is None:
            sums[index] = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        else:
            before.add_(grad)
