"""Output projection and cross-entropy in chunks, over supervised positions only: full logits never exist.

Forward computes the gradient too, chunk by chunk, while the logits are at hand, so each is made once and nothing but
one [N, H] gradient is kept for backward (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al., 2024).

Legend: N supervised positions, C positions in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape


def chunked_cross_entropy(
    hidden_NH: Tensor, targets_N: Tensor, head: FrozenHead, logit_shape: LogitShape, *, chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropies of all N positions, in nats: a 0-dim fp32 tensor, differentiable in `hidden_NH`.

    Args:
        hidden_NH: what the head sees at each supervised position, in the compute dtype.
        targets_N: int64 token to predict there.
        head: frozen output projection.
        logit_shape: scale and soft cap.
        chunk_tokens: C; the largest temporaries are two or three fp32 [C, V].
    """
    arguments = (hidden_NH, targets_N, head, logit_shape, chunk_tokens)
    loss: Tensor = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: FrozenHead, logit_shape: LogitShape, chunk_tokens: int
    ) -> Tensor:
        weight_VH = head.weight.to(hidden_NH.dtype)
        bias_V = None if head.bias is None else head.bias.float()
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        grad_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for first in range(0, hidden_NH.shape[0], chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            logits_CV = torch.mm(hidden_NH[chunk], weight_VH.t()).float()
            if bias_V is not None:
                logits_CV += bias_V
            tanh_CV = _shape_logits_(logits_CV, logit_shape)
            targets_C1 = targets_N[chunk].unsqueeze(1)
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss += (lse_C1 - logits_CV.gather(1, targets_C1)).sum()
            if grad_NH is None:
                continue
            grad_CV = logits_CV.sub_(lse_C1).exp_()
            grad_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1.0, dtype=torch.float32))
            if tanh_CV is not None:
                grad_CV.mul_(tanh_CV.square_().neg_().add_(1.0))
            if logit_shape.scale != 1.0:
                grad_CV.mul_(logit_shape.scale)
            grad_NH[chunk] = torch.mm(grad_CV.to(weight_VH.dtype), weight_VH)
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_outputs[0].to(grad_NH.dtype), None, None, None, None


def _shape_logits_(logits_CV: Tensor, logit_shape: LogitShape) -> Tensor | None:
    """Scale and cap in place; returns tanh of the scaled logits over the cap where there is one."""
    if logit_shape.scale != 1.0:
        logits_CV.mul_(logit_shape.scale)
    if logit_shape.softcap == 0.0:
        return None
    tanh_CV = torch.tanh(logits_CV / logit_shape.softcap)
    torch.mul(tanh_CV, logit_shape.softcap, out=logits_CV)
    return tanh_CV
