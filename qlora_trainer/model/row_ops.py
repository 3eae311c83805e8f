"""RMSNorm, rotary embedding and gated activation, forward and backward, each one operation that says what it keeps;
and sums of rows.

transformers computes them out of five to ten operations each, every one of which reads, writes and (for backward) keeps
a tensor of the size of the activations. Here forward keeps one scale a row or nothing, and backward works in place.
On a GPU each is one kernel (`hardware/triton_rows.py`, sums torch's), elsewhere a few operations over blocks of rows.
Sources: Zhang and Sennrich, RMSNorm (2019); Su et al., RoFormer (2021), in the split-half form of transformers;
Shazeer, GLU variants (2020).

Legend: T rows (tokens, or tokens x heads), H width of a row, n heads, D head size, I intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qlora_trainer.hardware.row_blocks import by_rows
from qlora_trainer.hardware.row_kernels import has_row_kernels, row_kernels

SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_tanh"


@torch.library.custom_op("qlora_trainer::rms_norm", mutates_args=())
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * (offset + weight)` in x's dtype, and 1 / rms [T, 1] in fp32 for backward."""
    out_TH, inverse_T1 = _empty_norm(x_TH)
    if has_row_kernels(x_TH.device):
        row_kernels().rms_norm(out_TH, inverse_T1, x_TH, weight_H, eps, offset)
    else:
        by_rows(_rms_norm, (out_TH, inverse_T1, x_TH), weight_H, eps, offset)
    return out_TH, inverse_T1


@rms_norm.register_fake
def _(x_TH: Tensor, weight_H: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _empty_norm(x_TH)


def _empty_norm(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty((x_TH.shape[0], 1), dtype=torch.float32)


def _rms_norm(out_TH: Tensor, inverse_T1: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float, offset: float) -> None:
    x_TH = x_TH.float()
    squares_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True).square_()
    inverse_T1.copy_(squares_T1.div_(x_TH.shape[1]).add_(eps).rsqrt_())
    _set_to_scaled_(out_TH, x_TH, inverse_T1, _factor(weight_H, offset))


@torch.library.custom_op("qlora_trainer::rms_norm_again", mutates_args=())
def rms_norm_again(x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float) -> Tensor:
    """What `rms_norm` returned first, from what it returned second."""
    out_TH = x_TH.new_empty(x_TH.shape)
    if has_row_kernels(x_TH.device):
        row_kernels().rms_norm_again(out_TH, x_TH, inverse_T1, weight_H, offset)
    else:
        by_rows(_rms_norm_again, (out_TH, x_TH, inverse_T1), weight_H, offset)
    return out_TH


@rms_norm_again.register_fake
def _(x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


def _rms_norm_again(out_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float) -> None:
    _set_to_scaled_(out_TH, x_TH.float(), inverse_T1, _factor(weight_H, offset))


def _set_to_scaled_(out_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, factor_H: Tensor) -> None:
    """`x * inverse * factor`, of which x is fp32: in place where the result is, too."""
    if out_TH.dtype == torch.float32:
        torch.mul(x_TH, inverse_T1, out=out_TH).mul_(factor_H)
    else:
        out_TH.copy_((x_TH * inverse_T1).mul_(factor_H))


@torch.library.custom_op("qlora_trainer::rms_norm_backward_", mutates_args=("grad_TH",))
def rms_norm_backward_(
    grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float, added_TH: Tensor | None
) -> None:
    """Turns the gradient of the normed rows into that of x, in place; `added_TH`, if any, is added to it."""
    if has_row_kernels(grad_TH.device):
        row_kernels().rms_norm_backward(grad_TH, x_TH, inverse_T1, added_TH, weight_H, offset)
    elif added_TH is None:
        by_rows(_rms_norm_backward, (grad_TH, x_TH, inverse_T1), weight_H, offset)
    else:
        by_rows(_rms_norm_backward_added, (grad_TH, x_TH, inverse_T1, added_TH), weight_H, offset)


@rms_norm_backward_.register_fake
def _(
    grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float, added_TH: Tensor | None
) -> None:
    return None


def _rms_norm_backward(grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float) -> None:
    _to_grad_of_x(grad_TH, x_TH, inverse_T1, weight_H, offset, None)


def _rms_norm_backward_added(
    grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, added_TH: Tensor, weight_H: Tensor, offset: float
) -> None:
    _to_grad_of_x(grad_TH, x_TH, inverse_T1, weight_H, offset, added_TH)


def _to_grad_of_x(
    grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float, added_TH: Tensor | None
) -> None:
    # Of 16 bits times fp32 a CPU would make a copy in fp32 too, unseen, beside the result.
    scaled_TH, x_TH = grad_TH.float(), x_TH.float()  # of fp32 no copies
    scaled_TH.mul_(_factor(weight_H, offset))
    along_T1 = (scaled_TH * x_TH).mean(-1, keepdim=True).mul_(inverse_T1.pow(3))
    scaled_TH.mul_(inverse_T1).sub_(x_TH * along_T1)
    if added_TH is not None:
        scaled_TH.add_(added_TH)
    if scaled_TH is not grad_TH:
        grad_TH.copy_(scaled_TH)


@torch.library.custom_op("qlora_trainer::rms_norm_weight_gradient", mutates_args=())
def rms_norm_weight_gradient(grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor) -> Tensor:
    """The gradient of a norm's weight [H], fp32, from that of the normed rows."""
    total_H = grad_TH.new_zeros(grad_TH.shape[1], dtype=torch.float32)
    by_rows(_add_weight_gradient, (grad_TH, x_TH, inverse_T1), total_H)
    return total_H


@rms_norm_weight_gradient.register_fake
def _(grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor) -> Tensor:
    return grad_TH.new_empty(grad_TH.shape[1], dtype=torch.float32)


def _add_weight_gradient(grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, total_H: Tensor) -> None:
    total_H.add_((grad_TH.float() * x_TH.float()).mul_(inverse_T1).sum(0))


def _factor(weight_H: Tensor, offset: float) -> Tensor:
    return weight_H.float() + offset if offset else weight_H.float()


@torch.library.custom_op("qlora_trainer::rotate_", mutates_args=("x_TnD",))
def rotate_(x_TnD: Tensor, cos_TD: Tensor, sin_TD: Tensor, is_back: bool) -> None:
    """Rotates each head by its position, in place; `is_back` by the negative angle, which is the gradient's way."""
    sign = -1.0 if is_back else 1.0
    if has_row_kernels(x_TnD.device):
        row_kernels().rotate(x_TnD, cos_TD, sin_TD, sign)
    else:
        by_rows(_rotate, (x_TnD, cos_TD, sin_TD), sign)


@rotate_.register_fake
def _(x_TnD: Tensor, cos_TD: Tensor, sin_TD: Tensor, is_back: bool) -> None:
    return None


def _rotate(x_TnD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: float) -> None:
    half = x_TnD.shape[-1] // 2
    first, second = x_TnD[..., :half], x_TnD[..., half:]
    cos, sin = (table[:, None, :half] for table in (cos_TD, sin_TD))
    rotated = (first * cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(first, sin, value=sign)
    first.copy_(rotated)


@torch.library.custom_op("qlora_trainer::gated", mutates_args=())
def gated(gate_TI: Tensor, up_TI: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`."""
    out_TI = gate_TI.new_empty(gate_TI.shape)
    if has_row_kernels(gate_TI.device):
        row_kernels().gated(out_TI, gate_TI, up_TI, activation)
    else:
        by_rows(_gated, (out_TI, gate_TI, up_TI), activation)
    return out_TI


@gated.register_fake
def _(gate_TI: Tensor, up_TI: Tensor, activation: str) -> Tensor:
    return gate_TI.new_empty(gate_TI.shape)


def _gated(out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    torch.mul(_activated(gate_TI, activation), up_TI, out=out_TI)


@torch.library.custom_op("qlora_trainer::gated_backward_", mutates_args=("grad_TI", "gate_TI", "up_TI"))
def gated_backward_(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    """Gradients of `gated`, in place of gate and up themselves; into `grad_TI` comes what `gated` returned."""
    if has_row_kernels(grad_TI.device):
        row_kernels().gated_backward(grad_TI, gate_TI, up_TI, activation)
    else:
        by_rows(_gated_backward, (grad_TI, gate_TI, up_TI), activation)


@gated_backward_.register_fake
def _(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    return None


def _gated_backward(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    activated_TI = _activated(gate_TI, activation)
    grad_activated_TI = grad_TI * up_TI
    out_TI = activated_TI * up_TI
    torch.mul(activated_TI, grad_TI, out=up_TI)
    grad_TI.copy_(out_TI)
    if activation == SILU:
        gate_TI.copy_(torch.ops.aten.silu_backward(grad_activated_TI, gate_TI))
    else:
        approximate = "tanh" if activation == GELU_TANH else "none"
        gate_TI.copy_(torch.ops.aten.gelu_backward(grad_activated_TI, gate_TI, approximate=approximate))


def column_sums(x_TH: Tensor) -> Tensor:
    """The sum of all rows [H], fp32.

    Of 16 bits a CPU's `sum` makes a copy of the whole in fp32 first, unseen; in blocks that is one of a block. A GPU
    adds in fp32 as it reads.
    """
    if x_TH.device.type == "cpu" and x_TH.dtype != torch.float32:
        total_H: Tensor = summed_in_blocks(x_TH)
        return total_H
    return x_TH.sum(0, dtype=torch.float32)


@torch.library.custom_op("qlora_trainer::summed_in_blocks", mutates_args=())
def summed_in_blocks(x_TH: Tensor) -> Tensor:
    """`column_sums`, block by block."""
    total_H = x_TH.new_zeros(x_TH.shape[1], dtype=torch.float32)
    by_rows(_add_rows, (x_TH,), total_H)
    return total_H


@summed_in_blocks.register_fake
def _(x_TH: Tensor) -> Tensor:
    return x_TH.new_empty(x_TH.shape[1], dtype=torch.float32)


def _add_rows(x_TH: Tensor, total_H: Tensor) -> None:
    total_H.add_(x_TH.float().sum(0))


def _activated(gate_TI: Tensor, activation: str) -> Tensor:
    if activation == SILU:
        return functional.silu(gate_TI)
    return functional.gelu(gate_TI, approximate="tanh" if activation == GELU_TANH else "none")
