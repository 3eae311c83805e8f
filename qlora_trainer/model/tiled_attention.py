"""A layer's attention over tiles of tokens: beside queries, keys, values and output nothing of it is there whole.

Norm, projections and rotation go tile by tile, and so does the output projection, each weight being unpacked once a
pass. Attention itself goes part by part (`attention_in_parts`), which in backward turns queries, keys and values into
their gradients where they are; the gradient of the input then takes the place of that of the output, tile by tile.
The gradients of adapters add up over the tiles in fp32.

Legend: B rows, T tokens (of all rows, where B is not named), H hidden size, n query heads, K key/value heads, D head
size, I = n x D, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.hardware.causal_attention import AttentionShape, working_bytes
from qlora_trainer.model.attention_in_parts import attention_in_parts_, attention_in_parts_backward_, run_tokens
from qlora_trainer.model.fused_halves import (
    AttentionHalf,
    heads_backward_,
    norm_gradient,
    norm_parameters,
    normed_heads,
)
from qlora_trainer.model.linear import (
    adapter_parameters,
    dense_weights,
    first_products,
    input_gradient,
    low_rank_gradients,
    multiply,
    no_parameter_gradients,
    parameter_gradients,
    unpacked_once,
)
from qlora_trainer.model.row_ops import rms_norm, rms_norm_backward_, rotate_
from qlora_trainer.model.token_tiles import add_, drawn_for, tiles


def tiled_attention_half(
    x_BTH: Tensor,
    half: AttentionHalf,
    cos_TD: Tensor,
    sin_TD: Tensor,
    document_lengths: Sequence[int],
    tile_tokens: int,
    *,
    keeps_queries: bool = True,
) -> Tensor:
    """x + attention(norm(x)) [B, T, H], as `fused_halves.attention_half` computes it.

    Args:
        x_BTH: the input, kept for backward beside queries, keys, values and attention's output.
        half: the modules.
        cos_TD, sin_TD: a row for each of the B x T tokens.
        document_lengths: tokens of each document of a row; the same in every row.
        tile_tokens: tokens at a time.
        keeps_queries: False where nothing is kept for backward, or what is kept is computed again before that: then
            attention's output takes the place of the queries.

    Returns:
        What has one reader: in backward the gradient of the input takes the place of its gradient.
    """
    parameters = [*adapter_parameters([*half.inputs, half.o]), *norm_parameters(half)]
    lengths = tuple(document_lengths) * x_BTH.shape[0]  # rows one after the other: documents are apart in any case
    out_BTH: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
        x_BTH, cos_TD, sin_TD, half, lengths, tile_tokens, keeps_queries, *parameters
    )
    return out_BTH


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTH: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        half: AttentionHalf,
        document_lengths: tuple[int, ...],
        tile_tokens: int,
        keeps_queries: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        x_TH = x_BTH.flatten(0, 1)
        q_TnD, k_TKD, v_TKD = _projected(half, x_TH, cos_TD, sin_TD, tile_tokens)
        _make_room(half, q_TnD, document_lengths, tile_tokens)
        attended_TnD = q_TnD.clone() if keeps_queries else q_TnD
        lse_nT = attention_in_parts_(
            attended_TnD, k_TKD, v_TKD, document_lengths, half.scale, half.window, half.softcap, tile_tokens
        )
        out_TH = torch.empty_like(x_TH)
        with unpacked_once([half.o]):
            for tile in tiles(x_TH.shape[0], tile_tokens):
                with drawn_for([half.o], tile):
                    (own_TH,), _ = multiply([half.o], attended_TnD[tile].flatten(1), added_TO=x_TH[tile])
                    out_TH[tile] = own_TH
                    del own_TH
        ctx.save_for_backward(x_TH, cos_TD, sin_TD, q_TnD, k_TKD, v_TKD, attended_TnD, lse_nT)
        ctx.half, ctx.document_lengths, ctx.tile_tokens = half, document_lengths, tile_tokens
        return out_TH.view(x_BTH.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        half: AttentionHalf = ctx.half
        x_TH, cos_TD, sin_TD, q_TnD, k_TKD, v_TKD, attended_TnD, lse_nT = ctx.saved_tensors
        grad_TH = grad_outputs[0].flatten(0, 1)
        low_grads_TR = low_rank_gradients([half.o], [grad_TH])
        with unpacked_once([half.o]):
            o_grads = _output_gradients(half, attended_TnD, grad_TH, low_grads_TR, ctx.tile_tokens)
            _make_room(half, q_TnD, ctx.document_lengths, ctx.tile_tokens)
            _to_gradients_(
                half, (q_TnD, k_TKD, v_TKD), attended_TnD, lse_nT, grad_TH, low_grads_TR, ctx.document_lengths,
                ctx.tile_tokens,
            )  # fmt: skip
        del attended_TnD, lse_nT, low_grads_TR
        grads = (q_TnD, k_TKD, v_TKD)
        num_norms = len(half.norms)
        in_grads = [*no_parameter_gradients(half.inputs), *[None] * num_norms]
        with unpacked_once(half.inputs):
            for tile in tiles(x_TH.shape[0], ctx.tile_tokens):
                with drawn_for(half.inputs, tile):
                    own_TH = grad_TH[tile] if ctx.needs_input_grad[0] else None
                    own = [grad[tile] for grad in grads]
                    add_(in_grads, _inputs_backward(half, x_TH[tile], cos_TD[tile], sin_TD[tile], own, own_TH))
        grad_x_BTH = grad_TH.view(grad_outputs[0].shape) if ctx.needs_input_grad[0] else None
        in_grads, norm_grads = in_grads[:-num_norms], in_grads[-num_norms:]
        return grad_x_BTH, None, None, None, None, None, None, *in_grads, *o_grads, *norm_grads


def _projected(
    half: AttentionHalf, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, rotated."""
    num_tokens = x_TH.shape[0]
    q_TnD, k_TKD, v_TKD = (
        x_TH.new_empty((num_tokens, linear.out_features // half.head_dim, half.head_dim)) for linear in half.inputs
    )
    with unpacked_once(half.inputs):
        for tile in tiles(num_tokens, tile_tokens):
            with drawn_for(half.inputs, tile):
                normed_TH, _ = rms_norm(x_TH[tile], half.norm.weight_H, half.norm.eps, half.norm.offset)
                made, _ = multiply(half.inputs, normed_TH)
                del normed_TH
            q, k, v = (own.unflatten(1, (-1, half.head_dim)) for own in made)
            del made
            if half.q_norm is not None and half.k_norm is not None:
                (q, _), (k, _) = normed_heads(q, half.q_norm), normed_heads(k, half.k_norm)
            for rotated in (q, k):
                rotate_(rotated, cos_TD[tile], sin_TD[tile], False)
            q_TnD[tile], k_TKD[tile], v_TKD[tile] = q, k, v
            del q, k, v, rotated
    return q_TnD, k_TKD, v_TKD


def _output_gradients(
    half: AttentionHalf, attended_TnD: Tensor, grad_TH: Tensor, low_grads_TR: Tensor | None, tile_tokens: int
) -> list[Tensor | None]:
    """Those of the output projection's adapter."""
    sums = no_parameter_gradients([half.o])
    for tile in tiles(grad_TH.shape[0], tile_tokens):
        with drawn_for([half.o], tile):
            attended_TI = attended_TnD[tile].flatten(1)
            low_ranks = first_products([half.o], attended_TI)
            low_grads = None if low_grads_TR is None else low_grads_TR[tile]
            add_(sums, parameter_gradients([half.o], attended_TI, [grad_TH[tile]], low_ranks, low_grads))
    return sums


def _to_gradients_(
    half: AttentionHalf,
    qkv: tuple[Tensor, Tensor, Tensor],
    attended_TnD: Tensor,
    lse_nT: Tensor,
    grad_TH: Tensor,
    low_grads_TR: Tensor | None,
    document_lengths: tuple[int, ...],
    tile_tokens: int,
) -> None:
    """Queries, keys and values become their gradients."""
    adapter = half.o.adapter
    weight_HI, change_HI = dense_weights(half.o, grad_TH.dtype)
    attention_in_parts_backward_(
        *qkv,
        attended_TnD,
        lse_nT,
        grad_TH,
        weight_HI,
        low_grads_TR,
        None if adapter is None else adapter.lora_A.detach().to(grad_TH.dtype),
        change_HI,
        adapter.of_tokens.row_keys_T if adapter is not None and adapter.drops else None,
        document_lengths,
        half.scale,
        half.window,
        half.softcap,
        tile_tokens,
        0.0 if adapter is None else adapter.dropout,
        0 if adapter is None else adapter.layer_key,
    )


def _inputs_backward(
    half: AttentionHalf,
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    grads: Sequence[Tensor],
    grad_TH: Tensor | None,
) -> list[Tensor | None]:
    """One tile: the gradient of x takes the place of `grad_TH`, if any; those of adapters and norms are returned.

    `grads` are of rotated queries and keys, and of values; they are written into.
    """
    norm = half.norm
    normed_TH, inverse_T1 = rms_norm(x_TH, norm.weight_H, norm.eps, norm.offset)
    for rotated in grads[:2]:
        rotate_(rotated, cos_TD, sin_TD, True)
    head_norm_grads: list[Tensor | None] = []
    if half.q_norm is not None and half.k_norm is not None:
        # Projected once more: to keep them from before their norms would take as much as rotated ones do.
        before, _ = multiply(half.inputs[:2], normed_TH)
        for grad_TnD, own, head_norm in zip(grads, before, (half.q_norm, half.k_norm), strict=False):
            heads_TnD = own.unflatten(1, (-1, half.head_dim))
            _, inverse = normed_heads(heads_TnD, head_norm)
            head_norm_grads.append(heads_backward_(grad_TnD, heads_TnD, inverse, head_norm))
        del before, own, heads_TnD, inverse
    outs = [grad.flatten(1) for grad in grads]
    low_grads = low_rank_gradients(half.inputs, outs)
    low_ranks = first_products(half.inputs, normed_TH)
    parameter_grads = parameter_gradients(half.inputs, normed_TH, outs, low_ranks, low_grads)
    del normed_TH, low_ranks
    norm_grad = None
    if grad_TH is not None or norm.trained_H is not None:
        own_TH = input_gradient(half.inputs, outs, low_grads)
        norm_grad = norm_gradient(norm, own_TH, x_TH, inverse_T1)
        if grad_TH is not None:
            rms_norm_backward_(own_TH, x_TH, inverse_T1, norm.weight_H, norm.offset, grad_TH)
            grad_TH.copy_(own_TH)
    return [*parameter_grads, norm_grad, *(head_norm_grads or (None, None))]


def _make_room(half: AttentionHalf, q_TnD: Tensor, document_lengths: Sequence[int], tile_tokens: int) -> None:
    """For attention over the longest document, or a key-value head of it."""
    shape, longest = AttentionShape(half.scale, half.window, half.softcap), max(document_lengths)
    num_kv_heads = half.k.out_features // half.head_dim
    num_parts = num_kv_heads if longest > run_tokens(tile_tokens, num_kv_heads) else 1
    working = working_bytes(q_TnD.transpose(0, 1).unsqueeze(0), longest, shape)
    half.o.resident_limit.make_room(working // num_parts)
