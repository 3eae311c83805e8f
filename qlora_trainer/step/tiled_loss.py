"""Final norm, output projection and cross-entropy over tiles of supervised positions, from the last layer's output.

`loss` norms all hidden states and gathers those that count, each several times as large as a layer's input. Here a tile
of positions is gathered, normed, and its gradient taken back through the norm, so that beside the last layer's output
there is its gradient, and no more. The norm is the model's own module.

Legend: T tokens of all rows, N supervised positions, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_trainer.model.final_norm import FinalNorm
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.model.token_tiles import tiles
from qlora_trainer.step.loss import chunked_cross_entropy


def tiled_cross_entropy(
    hidden_TH: Tensor,
    positions_N: Tensor,
    targets_N: Tensor,
    norm: FinalNorm,
    head: FrozenHead,
    logit_shape: LogitShape,
    *,
    tile_tokens: int,
    chunk_tokens: int,
    gradient_scale: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies, 0-dim fp32, differentiable once in `hidden_TH` and in what is trained of the norm.

    Args:
        hidden_TH: the last layer's output, not normed, in the compute dtype.
        positions_N: int64 rows of it that are learned from, each once.
        targets_N: int64 token to predict there.
        norm: the model's last one.
        head, logit_shape, chunk_tokens, gradient_scale: see `step.loss.chunked_cross_entropy`.
        tile_tokens: positions at a time.
    """
    is_any_trained = hidden_TH.requires_grad or bool(norm.trained) or head.is_trained
    takes_gradient = torch.is_grad_enabled() and is_any_trained
    loss: Tensor = _TiledLoss.apply(  # type: ignore[no-untyped-call]
        hidden_TH, positions_N, targets_N, norm, head, logit_shape, tile_tokens, chunk_tokens, gradient_scale,
        takes_gradient, *norm.trained,
    )  # fmt: skip
    return loss


class _TiledLoss(torch.autograd.Function):
    """Forward takes the gradient, too, as the chunked loss does, and keeps it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        positions_N: Tensor,
        targets_N: Tensor,
        norm: FinalNorm,
        head: FrozenHead,
        logit_shape: LogitShape,
        tile_tokens: int,
        chunk_tokens: int,
        gradient_scale: Tensor | None,
        takes_gradient: bool,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        grad_TH = torch.zeros_like(hidden_TH) if takes_gradient and ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(own_H) for own_H in trained] if takes_gradient else []
        for tile in tiles(positions_N.numel(), tile_tokens):
            rows_NH = hidden_TH.detach().index_select(0, positions_N[tile]).requires_grad_(grad_TH is not None)
            with torch.set_grad_enabled(takes_gradient):
                loss = chunked_cross_entropy(
                    norm.apply_to(rows_NH),
                    targets_N[tile],
                    head,
                    logit_shape,
                    chunk_tokens=chunk_tokens,
                    gradient_scale=gradient_scale,
                    total=total,
                )
            total = loss.detach()
            leaves = [*(trained if takes_gradient else ()), *([] if grad_TH is None else [rows_NH])]
            found = list(torch.autograd.grad(loss, leaves)) if leaves else []
            if grad_TH is not None:
                grad_TH.index_copy_(0, positions_N[tile], found.pop())
            for sum_H, own_H in zip(sums, found, strict=True):
                sum_H.add_(own_H)
            del found, leaves
            del rows_NH, loss
        ctx.grad_TH, ctx.sums = grad_TH, sums
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH, sums), ctx.grad_TH, ctx.sums = (ctx.grad_TH, ctx.sums), None, None
        scaled = [None if own is None else own.mul_(grad_outputs[0].to(own.dtype)) for own in (grad_TH, *sums)]
        return (scaled[0], *[None] * 9, *scaled[1:])  # given away: multiplied in place, and gone with who gets it
