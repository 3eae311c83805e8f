"""Output projection and cross-entropy in chunks, over supervised positions only: full logits never exist.

Forward computes the gradient too, chunk by chunk, while the logits are at hand, so each is made once and nothing but
one [N, H] gradient is kept for backward (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al., 2024).

Where the head is trained, the gradients of its weight and bias are added to their `.grad`, which is fp32, in the same
go: a block of [V, H] in the compute dtype is all that is made for it. They cannot wait for backward, and so they get no
factor from there: `gradient_scale` has to say all.

A projection that is stored in 16 bits and multiplied in fp32, that is stored in NF4, or that lives on the host, is
multiplied in blocks of tokens of the vocabulary (`model.vocabulary_blocks`).

`logsumexp` and `cross_entropy` make copies of the logits inside, which no trace can see and no budget has room for; the
softmax is written out, in place, so that one fp32 [C, V] is all there is (and its 16-bit form for the products).

Legend: N supervised positions, C positions in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.nf4 import BLOCKSIZE, BlockScales
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.model.vocabulary_blocks import VocabularyBlocks, rows_in_block
from qlora_trainer.step.batch import ROW_MULTIPLE


def chunked_cross_entropy(
    hidden_NH: Tensor,
    targets_N: Tensor,
    head: FrozenHead,
    logit_shape: LogitShape,
    *,
    chunk_tokens: int,
    gradient_scale: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of all N positions, in nats: a 0-dim fp32 tensor, differentiable in `hidden_NH`.

    With gradients enabled, those of a trained head are added to its `.grad` here, also where it alone is trained.

    Args:
        hidden_NH: what the head sees at each supervised position, in the compute dtype.
        targets_N: int64 token to predict there.
        head: output projection.
        logit_shape: scale and soft cap.
        chunk_tokens: C; the largest temporaries are one or two fp32 [C, V].
        gradient_scale: what the gradient, not the loss, is multiplied by before it is rounded to the compute dtype:
            0-dim fp32, on the same device. None for 1.
        total: what the sum begins with, 0-dim fp32, so that positions one call after the other add up as in one.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden_NH.requires_grad or head.is_trained)
    scales = head.scales
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NH,
        targets_N,
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        logit_shape.scale,
        logit_shape.softcap,
        chunk_tokens,
        needs_gradient,
        gradient_scale,
        head.is_on_host,
        total,
        *(_own_gradient(parameter) if needs_gradient else None for parameter in (head.weight, head.bias)),
        *((None,) * 4 if scales is None else (scales.absmax, scales.nested_absmax, scales.offset, scales.code)),
    )
    return loss


def _own_gradient(parameter: Tensor | None) -> Tensor | None:
    """What a trained weight's gradients add up in."""
    if parameter is None or not parameter.requires_grad:
        return None
    assert parameter.grad is not None, "the gradient of a trained head has no place yet"
    return parameter.grad


class _ChunkedLoss(torch.autograd.Function):
    """`loss_and_gradient`, whose gradient waits for backward. An operation that writes into what it is given, the
    gradients of the head, cannot have a formula for its own."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss: Tensor
        loss, grad_NH = loss_and_gradient(*args)
        ctx.save_for_backward(grad_NH)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_loss.to(grad_NH.dtype), *(None,) * 16


def largest_bytes(hidden_NH: Tensor, head: FrozenHead, logit_shape: LogitShape, *, chunk_tokens: int) -> int:
    """What `chunked_cross_entropy` takes of memory at most: a chunk's logits in all their forms, and the head's own."""
    itemsize = hidden_NH.itemsize
    num_rows = min(hidden_NH.shape[0], chunk_tokens)
    chunk_elements = num_rows * head.out_features
    num_bytes = 4 * chunk_elements * (1 if logit_shape.softcap == 0.0 else 2)
    if hidden_NH.dtype != torch.float32:
        num_bytes += (
            itemsize * (num_rows + _num_missing(num_rows, hidden_NH.device, hidden_NH.dtype)) * head.out_features
        )
    if head.weight.dtype != hidden_NH.dtype:
        num_bytes += itemsize * rows_in_block(head.weight) * head.in_features
    if head.scales is not None:
        num_bytes += 4 * rows_in_block(head.weight) * head.in_features // BLOCKSIZE
    if head.weight.requires_grad and hidden_NH.dtype != torch.float32:
        num_bytes += (itemsize + 4) * rows_in_block(head.weight) * head.in_features
    return num_bytes + hidden_NH.nbytes


def chunk_logits(hidden_CH: Tensor, head: FrozenHead, logit_shape: LogitShape) -> Tensor:
    """fp32 logits [C, V] of a few positions, scaled and capped; what is upcast of the head is a block at a time.

    Args:
        hidden_CH: what the head sees, in the compute dtype; no gradient is taken.
        head: frozen output projection.
        logit_shape: scale and soft cap.
    """
    out_CV = hidden_CH.new_empty((hidden_CH.shape[0], head.out_features), dtype=torch.float32)
    blocks = VocabularyBlocks.of(head.weight, hidden_CH, is_on_host=head.is_on_host, scales=head.scales)
    logits_CV = _logits(hidden_CH, blocks, out_CV)
    if head.bias is not None:
        logits_CV += head.bias.float()
    _shape_logits_(logits_CV, logit_shape.scale, logit_shape.softcap)
    return logits_CV


def add_cross_entropy_(loss: Tensor, logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Add the cross-entropies of a chunk to `loss`, 0-dim fp32; its logits are written over.

    Returns:
        exp(logits - highest), in the place of the logits, and its sums over the vocabulary.
    """
    highest_C1 = logits_CV.amax(-1, keepdim=True)
    loss += (highest_C1 - logits_CV.gather(1, targets_C1)).sum()
    exp_CV = logits_CV.sub_(highest_C1).exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    loss += sum_C1.log().sum()
    return exp_CV, sum_C1


@torch.library.custom_op("qlora_trainer::chunked_cross_entropy", mutates_args=("weight_grad_VH", "bias_grad_V"))
def loss_and_gradient(
    hidden_NH: Tensor,
    targets_N: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float,
    chunk_tokens: int,
    needs_gradient: bool,
    gradient_scale: Tensor | None = None,
    is_on_host: bool = False,
    total: Tensor | None = None,
    weight_grad_VH: Tensor | None = None,
    bias_grad_V: Tensor | None = None,
    absmax: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    code: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed loss, 0-dim fp32, and its gradient [N, H] in hidden's dtype (empty where it is not needed).

    `is_on_host`: whether the projection lives on the host (see `model.vocabulary_blocks`). `total`: what the sum begins
    with. The gradients of weight and bias are added to those two, fp32, where they are given. The last four are the
    scales of a projection in NF4, which is uint8 [V, H / 2] then; None for one that is dense.
    """
    scales = None if absmax is None else BlockScales(absmax, nested_absmax, offset, code)
    loss = hidden_NH.new_zeros((), dtype=torch.float32) if total is None else total.clone()
    grad_NH = torch.empty_like(hidden_NH) if needs_gradient else hidden_NH.new_empty(0)
    num_positions = hidden_NH.shape[0]
    # One buffer for all chunks: so large a block comes from the system each time, and its pages are zeroed.
    buffer_CV = hidden_NH.new_empty((min(num_positions, chunk_tokens), weight_VH.shape[0]), dtype=torch.float32)
    blocks = VocabularyBlocks.of(weight_VH, hidden_NH, is_on_host=is_on_host, scales=scales)
    for first in range(0, num_positions, chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        logits_CV = _logits(hidden_NH[chunk], blocks, buffer_CV[: min(chunk_tokens, num_positions - first)])
        if bias_V is not None:
            logits_CV += bias_V.float()
        tanh_CV = _shape_logits_(logits_CV, scale, softcap)
        targets_C1 = targets_N[chunk].unsqueeze(1)
        exp_CV, sum_C1 = add_cross_entropy_(loss, logits_CV, targets_C1)
        if needs_gradient:
            grad_CV = exp_CV.div_(sum_C1)
            grad_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1.0, dtype=torch.float32))
            if tanh_CV is not None:
                grad_CV.mul_(tanh_CV.square_().neg_().add_(1.0))
            if scale != 1.0:
                grad_CV.mul_(scale)
            if gradient_scale is not None:
                grad_CV.mul_(gradient_scale)
            if bias_grad_V is not None:
                bias_grad_V += grad_CV.sum(0)
            rounded_CV = _filled(grad_CV, hidden_NH.dtype)
            if weight_grad_VH is not None:
                _add_product_(weight_grad_VH, rounded_CV[: grad_CV.shape[0]], hidden_NH[chunk])
            _set_to_product_(grad_NH[chunk], rounded_CV, blocks)
            del grad_CV, rounded_CV
        del tanh_CV  # before the next chunk's is made
    return loss, grad_NH


def _logits(hidden_CH: Tensor, blocks: VocabularyBlocks, out_CV: Tensor) -> Tensor:
    """The logits of a chunk, in fp32, in the place of `out_CV`."""
    for block, part_VH in blocks.each():
        if hidden_CH.dtype == torch.float32:
            torch.mm(hidden_CH, part_VH.t(), out=out_CV[:, block])
        else:
            filled_CH = _filled(hidden_CH, hidden_CH.dtype)
            out_CV[:, block] = torch.mm(filled_CH, part_VH.t())[: hidden_CH.shape[0]]
        del part_VH  # before the next one is unpacked
    return out_CV


def _num_missing(num_rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows of zeros that fill a product of 16 bits on a CPU up to a multiple of `ROW_MULTIPLE`.

    oneDNN compiles such a product for each number of rows and keeps it, 0.3 MiB each: what chunks leave over has
    another number at each step.
    """
    return -num_rows % ROW_MULTIPLE if device.type == "cpu" and dtype != torch.float32 else 0


def _filled(rows_CW: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in that dtype, and as many of zeros behind them as are missing."""
    num_rows, width = rows_CW.shape
    missing = _num_missing(num_rows, rows_CW.device, dtype)
    if not missing:
        return rows_CW.to(dtype)
    out_CW = rows_CW.new_zeros((num_rows + missing, width), dtype=dtype)
    out_CW[:num_rows] = rows_CW
    return out_CW


def _set_to_product_(out_CH: Tensor, grad_CV: Tensor, blocks: VocabularyBlocks) -> None:
    """`out` becomes the gradient of the chunk's hidden states; rows of the gradient beyond its own are zeros."""
    # In 16 bits a sum over many blocks would be rounded with each.
    is_summed_apart = (blocks.is_on_host or blocks.scales is not None) and out_CH.dtype != torch.float32
    sum_CH = torch.zeros_like(out_CH, dtype=torch.float32) if is_summed_apart else out_CH
    for block, part_VH in blocks.each():
        if not is_summed_apart:
            if grad_CV.shape[0] > sum_CH.shape[0]:
                assert block.start == 0  # a dense projection in 16 bits is one block
                sum_CH.copy_(torch.mm(grad_CV[:, block], part_VH)[: sum_CH.shape[0]])
            else:
                sum_CH.addmm_(grad_CV[:, block], part_VH, beta=float(block.start > 0))  # with beta = 0 it is not read
        else:
            sum_CH += torch.mm(grad_CV[:, block], part_VH)[: sum_CH.shape[0]]
        del part_VH
    if is_summed_apart:
        out_CH.copy_(sum_CH)


def _add_product_(weight_grad_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add the chunk's gradient of the weight: each product in the compute dtype, their sum in fp32."""
    if hidden_CH.dtype == torch.float32:
        weight_grad_VH.addmm_(grad_CV.t(), hidden_CH)
        return
    rows = rows_in_block(weight_grad_VH)
    for first in range(0, weight_grad_VH.shape[0], rows):
        block = slice(first, first + rows)
        # In fp32 by name: a CPU makes that copy of a 16-bit term anyway, where no trace sees it.
        weight_grad_VH[block] += torch.mm(grad_CV[:, block].t(), hidden_CH).float()


@loss_and_gradient.register_fake
def _(
    hidden_NH: Tensor,
    targets_N: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float,
    chunk_tokens: int,
    needs_gradient: bool,
    *_others: object,
) -> tuple[Tensor, Tensor]:
    grad_NH = torch.empty_like(hidden_NH) if needs_gradient else hidden_NH.new_empty(0)
    return hidden_NH.new_empty((), dtype=torch.float32), grad_NH


def _shape_logits_(logits_CV: Tensor, scale: float, softcap: float) -> Tensor | None:
    """Scale and cap in place; returns tanh of the scaled logits over the cap where there is one."""
    if scale != 1.0:
        logits_CV.mul_(scale)
    if softcap == 0.0:
        return None
    tanh_CV = torch.div(logits_CV, softcap).tanh_()
    torch.mul(tanh_CV, softcap, out=logits_CV)
    return tanh_CV
