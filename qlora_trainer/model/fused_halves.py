"""The two halves of a decoder layer, x + attention(norm(x)) and x + mlp(norm(x)), as one autograd function each.

What they save for backward is x, one scale a row, the rotated queries, keys and values, attention's output and its
log-sum-exp; and x, one scale a row, gate and up. Normed inputs and the gated product are computed again: they are one
pass over what is read anyway. The residual is added inside the product that makes the output, its gradient inside the
norm's.

Legend: B rows, T tokens (of all rows, where B is not named), H hidden size, n heads, D head size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.causal_attention import AttentionShape, working_bytes
from qlora_trainer.model.attention import packed_attention, packed_attention_backward
from qlora_trainer.model.linear import (
    NF4Linear,
    adapter_parameters,
    bias_gradients,
    input_gradient,
    low_rank_gradients,
    multiply,
    parameter_gradients,
)
from qlora_trainer.model.row_ops import (
    gated,
    gated_backward_,
    rms_norm,
    rms_norm_again,
    rms_norm_backward_,
    rms_norm_weight_gradient,
    rotate_,
)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: `x / rms(x) * (offset + weight)`.

    Attributes:
        trained_H: the parameter that the weight was rounded from, where it is trained.
    """

    weight_H: Tensor
    eps: float
    offset: float
    trained_H: nn.Parameter | None = None


@dataclass(frozen=True, slots=True)
class AttentionHalf:
    """The modules and numbers of the first half.

    Attributes:
        norm: before the projections.
        q, k, v, o: the projections.
        q_norm, k_norm: of each head (Qwen 3), or None.
        head_dim: D.
        scale, window, softcap: see `hardware.causal_attention.AttentionShape`.
    """

    norm: Norm
    q: NF4Linear
    k: NF4Linear
    v: NF4Linear
    o: NF4Linear
    q_norm: Norm | None
    k_norm: Norm | None
    head_dim: int
    scale: float
    window: int
    softcap: float

    @property
    def inputs(self) -> tuple[NF4Linear, ...]:
        return (self.q, self.k, self.v)

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        return (self.norm, self.q_norm, self.k_norm)


@dataclass(frozen=True, slots=True)
class MlpHalf:
    """The modules of the second half; `activation` as `row_ops` names it."""

    norm: Norm
    gate: NF4Linear
    up: NF4Linear
    down: NF4Linear
    activation: str

    @property
    def inputs(self) -> tuple[NF4Linear, ...]:
        return (self.gate, self.up)

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        return (self.norm,)


def attention_half(
    x_BTH: Tensor, half: AttentionHalf, cos_TD: Tensor, sin_TD: Tensor, document_lengths: Sequence[int]
) -> Tensor:
    """x + attention(norm(x)) [B, T, H]; the tables have a row for each of the B x T tokens."""
    parameters = [*adapter_parameters([*half.inputs, half.o]), *norm_parameters(half)]
    out_BTH: Tensor = _AttentionFunction.apply(  # type: ignore[no-untyped-call]
        x_BTH, cos_TD, sin_TD, half, tuple(document_lengths), *parameters
    )
    return out_BTH


def mlp_half(x_BTH: Tensor, half: MlpHalf) -> Tensor:
    """x + mlp(norm(x)) [B, T, H]."""
    parameters = [*adapter_parameters([*half.inputs, half.down]), *norm_parameters(half)]
    out_BTH: Tensor = _MlpFunction.apply(x_BTH, half, *parameters)  # type: ignore[no-untyped-call]
    return out_BTH


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTH: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        half: AttentionHalf,
        document_lengths: tuple[int, ...],
        *parameters: Tensor | None,
    ) -> Tensor:
        num_rows = x_BTH.shape[0]
        x_TH = x_BTH.flatten(0, 1)
        normed_TH, inverse_T1 = rms_norm(x_TH, half.norm.weight_H, half.norm.eps, half.norm.offset)
        (q, k, v), low_ranks = multiply(half.inputs, normed_TH)
        del normed_TH
        q_TnD, k_TnD, v_TnD = (tensor.unflatten(1, (-1, half.head_dim)) for tensor in (q, k, v))
        del q, k, v
        kept_heads: list[Tensor] = []
        if half.q_norm is not None and half.k_norm is not None:
            kept_heads = [q_TnD, k_TnD]
            q_TnD, q_inverse = normed_heads(q_TnD, half.q_norm)
            k_TnD, k_inverse = normed_heads(k_TnD, half.k_norm)
            kept_heads += [q_inverse, k_inverse]
        for rotated in (q_TnD, k_TnD):
            rotate_(rotated, cos_TD, sin_TD, False)
        _make_room(half, _by_head(q_TnD, num_rows), document_lengths)
        attended_BTnD, lse_BnT = packed_attention(
            *(_by_head(tensor, num_rows) for tensor in (q_TnD, k_TnD, v_TnD)),
            document_lengths,
            half.scale,
            half.window,
            half.softcap,
        )
        (out_TH,), low_out = multiply([half.o], attended_BTnD.flatten(2).flatten(0, 1), added_TO=x_TH)
        if kept_heads:  # rotated ones are made again of them
            q_TnD, k_TnD = kept_heads[0], kept_heads[1]
        ctx.save_for_backward(
            x_TH, inverse_T1, cos_TD, sin_TD, q_TnD, k_TnD, v_TnD, attended_BTnD, lse_BnT,
            *kept_heads[2:], *low_ranks, *low_out,
        )  # fmt: skip
        ctx.half, ctx.document_lengths, ctx.num_low_out = half, document_lengths, len(low_out)
        return out_TH.view(x_BTH.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        half: AttentionHalf = ctx.half
        x_TH, inverse_T1, cos_TD, sin_TD, q_TnD, k_TnD, v_TnD, attended_BTnD, lse_BnT, *rest = ctx.saved_tensors
        grad_BTH = grad_outputs[0]
        num_rows = grad_BTH.shape[0]
        grad_TH = grad_BTH.flatten(0, 1)
        before_norm = None
        if half.q_norm is not None and half.k_norm is not None:
            (q_inverse, k_inverse, *rest), before_norm = rest, (q_TnD, k_TnD)
            q_TnD, k_TnD = _normed_again(q_TnD, q_inverse, half.q_norm), _normed_again(k_TnD, k_inverse, half.k_norm)
            for rotated in (q_TnD, k_TnD):
                rotate_(rotated, cos_TD, sin_TD, False)
        num_low_ranks = len(rest) - ctx.num_low_out
        low_ranks, low_out = rest[:num_low_ranks], rest[num_low_ranks:]

        low_grads = low_rank_gradients([half.o], [grad_TH])
        grad_attended = input_gradient([half.o], [grad_TH], low_grads).view(attended_BTnD.shape)
        attended_TI = attended_BTnD.flatten(2).flatten(0, 1)
        o_grads = parameter_gradients([half.o], attended_TI, [grad_TH], low_out, low_grads)
        _make_room(half, _by_head(q_TnD, num_rows), ctx.document_lengths)
        grad_heads = packed_attention_backward(
            grad_attended,
            *(_by_head(tensor, num_rows) for tensor in (q_TnD, k_TnD, v_TnD)),
            attended_BTnD,
            lse_BnT,
            ctx.document_lengths,
            half.scale,
            half.window,
            half.softcap,
        )
        del grad_attended, attended_TI, q_TnD, k_TnD
        grad_q, grad_k, grad_v = (grad.transpose(1, 2).flatten(0, 1).contiguous() for grad in grad_heads)
        del grad_heads
        for rotated in (grad_q, grad_k):
            rotate_(rotated, cos_TD, sin_TD, True)
        head_norm_grads: list[Tensor | None] = [None, None]
        if before_norm is not None and half.q_norm is not None and half.k_norm is not None:
            head_norm_grads = [
                heads_backward_(grad_q, before_norm[0], q_inverse, half.q_norm),
                heads_backward_(grad_k, before_norm[1], k_inverse, half.k_norm),
            ]
        grads = [grad.flatten(1) for grad in (grad_q, grad_k, grad_v)]
        del grad_q, grad_k, grad_v

        grad_x_TH, in_grads, norm_grad = _inputs_backward(
            half, x_TH, inverse_T1, grads, low_ranks, grad_TH if ctx.needs_input_grad[0] else None
        )
        grad_x_BTH = None if grad_x_TH is None else grad_x_TH.view(grad_BTH.shape)
        return grad_x_BTH, None, None, None, None, *in_grads, *o_grads, norm_grad, *head_norm_grads


def _make_room(half: AttentionHalf, q_BnTD: Tensor, document_lengths: Sequence[int]) -> None:
    """For attention over the longest document."""
    shape = AttentionShape(half.scale, half.window, half.softcap)
    half.o.resident_limit.make_room(working_bytes(q_BnTD, max(document_lengths), shape))


class _MlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTH: Tensor, half: MlpHalf, *parameters: Tensor | None) -> Tensor:
        x_TH = x_BTH.flatten(0, 1)
        normed_TH, inverse_T1 = rms_norm(x_TH, half.norm.weight_H, half.norm.eps, half.norm.offset)
        (gate_TI, up_TI), low_ranks = multiply(half.inputs, normed_TH)
        del normed_TH
        gated_TI = gated(gate_TI, up_TI, half.activation)
        (out_TH,), low_out = multiply([half.down], gated_TI, added_TO=x_TH)
        ctx.save_for_backward(x_TH, inverse_T1, gate_TI, up_TI, *low_ranks, *low_out)
        ctx.half, ctx.num_low_out = half, len(low_out)
        return out_TH.view(x_BTH.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        half: MlpHalf = ctx.half
        x_TH, inverse_T1, gate_TI, up_TI, *rest = ctx.saved_tensors
        grad_BTH = grad_outputs[0]
        grad_TH = grad_BTH.flatten(0, 1)
        num_low_ranks = len(rest) - ctx.num_low_out
        low_ranks, low_out = rest[:num_low_ranks], rest[num_low_ranks:]

        low_grads = low_rank_gradients([half.down], [grad_TH])
        grad_TI = input_gradient([half.down], [grad_TH], low_grads)
        gated_backward_(grad_TI, gate_TI, up_TI, half.activation)
        grads, gated_TI = [gate_TI, up_TI], grad_TI
        down_grads = parameter_gradients([half.down], gated_TI, [grad_TH], low_out, low_grads)
        del gate_TI, up_TI, grad_TI, gated_TI

        grad_x_TH, in_grads, norm_grad = _inputs_backward(
            half, x_TH, inverse_T1, grads, low_ranks, grad_TH if ctx.needs_input_grad[0] else None
        )
        grad_x_BTH = None if grad_x_TH is None else grad_x_TH.view(grad_BTH.shape)
        return grad_x_BTH, None, *in_grads, *down_grads, norm_grad


def _inputs_backward(
    half: AttentionHalf | MlpHalf,
    x_TH: Tensor,
    inverse_T1: Tensor,
    grads: Sequence[Tensor],
    low_ranks: Sequence[Tensor],
    added_TH: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Back through a half's first linears and its norm: the gradient of x, those of the linears' adapters, the norm's.

    `added_TH` is the residual's gradient, which goes into that of x; None where x needs none.
    """
    norm = half.norm
    low_grads = low_rank_gradients(half.inputs, grads)
    if low_grads is None:
        parameter_grads = bias_gradients(half.inputs, grads)
    else:
        normed_TH = rms_norm_again(x_TH, inverse_T1, norm.weight_H, norm.offset)
        parameter_grads = parameter_gradients(half.inputs, normed_TH, grads, low_ranks, low_grads)
        del normed_TH
    if added_TH is None and norm.trained_H is None:
        return None, parameter_grads, None
    grad_x_TH = input_gradient(half.inputs, grads, low_grads)
    norm_grad = norm_gradient(norm, grad_x_TH, x_TH, inverse_T1)
    if added_TH is None:
        return None, parameter_grads, norm_grad
    rms_norm_backward_(grad_x_TH, x_TH, inverse_T1, norm.weight_H, norm.offset, added_TH)
    return grad_x_TH, parameter_grads, norm_grad


def norm_parameters(half: AttentionHalf | MlpHalf) -> list[Tensor | None]:
    """Weights of the norms, None for what is not trained: so autograd functions take and answer them."""
    return [None if norm is None else norm.trained_H for norm in half.norms]


def norm_gradient(norm: Norm, grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor) -> Tensor | None:
    """That of its weight [H], fp32, from that of the normed rows; None where it is not trained."""
    return None if norm.trained_H is None else rms_norm_weight_gradient(grad_TH, x_TH, inverse_T1)


def _by_head(tensor_TnD: Tensor, num_rows: int) -> Tensor:
    """[B x T, n, D] as [B, n, T, D], a view."""
    by_head_BnTD: Tensor = tensor_TnD.unflatten(0, (num_rows, -1)).transpose(1, 2)
    return by_head_BnTD


def normed_heads(heads_TnD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of each head [T, n, D], and 1 / rms [T x n, 1] for backward."""
    normed, inverse = rms_norm(heads_TnD.flatten(0, 1), norm.weight_H, norm.eps, norm.offset)
    return _as_heads(normed, heads_TnD), inverse


def _as_heads(normed: Tensor, heads_TnD: Tensor) -> Tensor:
    again_TnD: Tensor = normed.view(heads_TnD.shape)
    return again_TnD


def _normed_again(heads_TnD: Tensor, inverse: Tensor, norm: Norm) -> Tensor:
    normed = rms_norm_again(heads_TnD.flatten(0, 1), inverse, norm.weight_H, norm.offset)
    return _as_heads(normed, heads_TnD)


def heads_backward_(grad_TnD: Tensor, heads_TnD: Tensor, inverse: Tensor, norm: Norm) -> Tensor | None:
    """Turns the gradient of normed heads into that of the heads, in place; returns that of the norm's weight."""
    grad, heads = grad_TnD.flatten(0, 1), heads_TnD.flatten(0, 1)
    norm_grad = norm_gradient(norm, grad, heads, inverse)
    rms_norm_backward_(grad, heads, inverse, norm.weight_H, norm.offset, None)
    return norm_grad
