"""Attention over packed documents: one custom op, known to transformers as the attention implementation `packed`.

Documents are isolated by construction: each is attended to on its own, no mask is ever built. The boundaries reach the
op as a keyword argument of the model's forward, `document_lengths`. Because `packed` is *not* registered with
transformers' `AttentionMaskInterface`, transformers (5.23, `_preprocess_mask_arguments`) builds no mask for it.

Legend: B rows, H query heads, K key/value heads, T tokens a row, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qlora_trainer.hardware.causal_attention import AttentionShape, attend, attend_backward, working_bytes
from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model.linear import NF4Linear

IMPLEMENTATION = "packed"


@torch.library.custom_op("qlora_trainer::packed_attention", mutates_args=())
def packed_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document of a row.

    Args:
        q_BHTD, k_BKTD, v_BKTD: queries, keys and values, rotated.
        document_lengths: how many tokens each document has, in order; they sum to T and hold for every row.
        scale, window, softcap: see `AttentionShape`.

    Returns:
        out [B, T, H, D] in q's dtype, and the log-sum-exp [B, H, T] in fp32, unwritten where backward needs none.

    Raises:
        ValueError: the lengths do not sum to T.
    """
    num_rows, num_heads, num_tokens, _ = q_BHTD.shape
    if sum(document_lengths) != num_tokens:
        raise ValueError(f"document_lengths sum to {sum(document_lengths)}; expected the row length {num_tokens}")
    shape = AttentionShape(scale, window, softcap)
    out_BTHD = q_BHTD.new_empty((num_rows, num_tokens, num_heads, v_BKTD.shape[-1]))
    lse_BHT = q_BHTD.new_empty((num_rows, num_heads, num_tokens), dtype=torch.float32)
    for tokens in _documents(document_lengths):
        out_BHLD, lse_BHL = attend(q_BHTD[:, :, tokens], k_BKTD[:, :, tokens], v_BKTD[:, :, tokens], shape)
        out_BTHD[:, tokens] = out_BHLD.transpose(1, 2)
        if lse_BHL is not None:
            lse_BHT[:, :, tokens] = lse_BHL
        del out_BHLD, lse_BHL  # else they are there beside all that the next document needs
    return out_BTHD, lse_BHT


@packed_attention.register_fake
def _(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, num_tokens, _ = q_BHTD.shape
    out_BTHD = q_BHTD.new_empty((num_rows, num_tokens, num_heads, v_BKTD.shape[-1]))
    return out_BTHD, q_BHTD.new_empty((num_rows, num_heads, num_tokens), dtype=torch.float32)


@torch.library.custom_op("qlora_trainer::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_BTHD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BTHD: Tensor,
    lse_BHT: Tensor,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to q, k and v."""
    shape = AttentionShape(scale, window, softcap)
    grads = tuple(torch.empty_like(tensor) for tensor in (q_BHTD, k_BKTD, v_BKTD))
    for tokens in _documents(document_lengths):
        own_grads = attend_backward(
            grad_BTHD[:, tokens].transpose(1, 2),
            q_BHTD[:, :, tokens],
            k_BKTD[:, :, tokens],
            v_BKTD[:, :, tokens],
            out_BTHD[:, tokens].transpose(1, 2),
            lse_BHT[:, :, tokens],
            shape,
        )
        # As one kernel on a GPU: to torch, a row's tokens of all heads are what a kernel can go through in order.
        torch._foreach_copy_([_by_token(grad[:, :, tokens]) for grad in grads], [_by_token(own) for own in own_grads])
        del own_grads
    return grads[0], grads[1], grads[2]


@packed_attention_backward.register_fake
def _(
    grad_BTHD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BTHD: Tensor,
    lse_BHT: Tensor,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BHTD), torch.empty_like(k_BKTD), torch.empty_like(v_BKTD)


def _by_token(tensor_BHLD: Tensor) -> Tensor:
    """[L, H, D] of the one row, [B, L, H, D] of several; a view."""
    return tensor_BHLD.transpose(1, 2).squeeze(0)


def _documents(document_lengths: Sequence[int]) -> Iterator[slice]:
    """Tokens of each."""
    first = 0
    for length in document_lengths:
        yield slice(first, first + length)
        first += length


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHTD, k_BKTD, v_BKTD, *ctx.arguments = inputs
    ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BTHD: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
    grads = packed_attention_backward(grad_BTHD, *ctx.saved_tensors, *ctx.arguments)
    return *grads, None, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save_for_backward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over `packed_attention`.

    `query` [B, H, T, D], `key` and `value` [B, K, T, D]; returns ([B, T, H, D], None). Keyword arguments that other
    implementations want are passed to all of them, hence `**_`; one that changes the result shows in `acceptance`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = [query.shape[2]] if document_lengths is None else list(document_lengths)
    limit = _resident_limit(module)
    working = working_bytes(query, max(lengths), AttentionShape(scale, sliding_window or 0, softcap or 0.0))
    limit.make_room(working)
    out_BTHD, _lse = packed_attention(query, key, value, lengths, scale, sliding_window or 0, softcap or 0.0)
    if out_BTHD.requires_grad:
        out_BTHD.register_hook(lambda _grad: limit.make_room(working))
    return out_BTHD, None


def _resident_limit(module: nn.Module) -> ResidentLimit:
    """That of the projections beside it; none where no linear of it is quantized."""
    return next((part.resident_limit for part in module.modules() if isinstance(part, NF4Linear)), ResidentLimit())


AttentionInterface.register(IMPLEMENTATION, attention_forward)
