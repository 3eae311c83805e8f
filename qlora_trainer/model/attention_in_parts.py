"""Attention over packed documents part by part, whose backward takes no more room than one part needs.

A part is a run of short documents, or one key-value head (and its queries) of a longer one: no head depends on
another, no document either. A run has no more tokens times heads than one key-value head of a tile, so that no
documents take more than a document of a tile, or the longest one, would. Backward is given the gradient of what the
output projection made. Of a part it makes the gradient of attention's output and those of queries, keys and values,
and puts these into the places of queries, keys and values themselves: none of them is there whole beside what it is
the gradient of. Forward puts the output into the place of the queries.

Legend: T tokens of all rows, L tokens of a part, n query heads, K key/value heads, D head size, I = n x D, H hidden
size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.hardware.causal_attention import AttentionShape, attend, attend_backward
from qlora_trainer.model.random_draws import dropout_factors
from qlora_trainer.model.token_tiles import tiles


@dataclass(frozen=True, slots=True)
class Part:
    """What is taken at once.

    Attributes:
        tokens: of all its documents.
        documents: tokens of each.
        heads, kv_heads: query heads and key-value heads.
    """

    tokens: slice
    documents: tuple[slice, ...]
    heads: slice
    kv_heads: slice


def run_tokens(tile_tokens: int, num_kv_heads: int) -> int:
    """Most that a run has."""
    return max(1, tile_tokens // num_kv_heads)


def parts_of(document_lengths: Sequence[int], num_heads: int, num_kv_heads: int, tile_tokens: int) -> Iterator[Part]:
    """Runs of short documents, all heads; longer ones alone, a key-value head at a time."""
    most_tokens = run_tokens(tile_tokens, num_kv_heads)
    for run in _runs(document_lengths, most_tokens):
        tokens = slice(run[0].start, run[-1].stop)
        num_parts = num_kv_heads if tokens.stop - tokens.start > most_tokens else 1
        for part in range(num_parts):
            heads, kv_heads = (
                slice(part * count // num_parts, (part + 1) * count // num_parts) for count in (num_heads, num_kv_heads)
            )
            yield Part(tokens, run, heads, kv_heads)


def _runs(document_lengths: Sequence[int], most_tokens: int) -> Iterator[tuple[slice, ...]]:
    run: list[slice] = []
    first = 0
    for length in document_lengths:
        document = slice(first, first + length)
        if run and document.stop - run[0].start > most_tokens:
            yield tuple(run)
            run = []
        run.append(document)
        first += length
    if run:
        yield tuple(run)


@torch.library.custom_op("qlora_trainer::attention_in_parts_", mutates_args=("q_TnD",))
def attention_in_parts_(
    q_TnD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
    tile_tokens: int,
) -> Tensor:
    """Causal attention within each document, whose output takes the place of the queries.

    Args:
        q_TnD, k_TKD, v_TKD: queries, keys and values, rotated; heads of one size.
        document_lengths: tokens of each document, in order; they sum to T.
        scale, window, softcap: see `AttentionShape`.
        tile_tokens: see `run_tokens`.

    Returns:
        The log-sum-exp [n, T] in fp32, unwritten where backward needs none.

    Raises:
        ValueError: the lengths do not sum to T.
    """
    num_tokens, num_heads, _ = q_TnD.shape
    if sum(document_lengths) != num_tokens:
        raise ValueError(f"document_lengths sum to {sum(document_lengths)}; expected {num_tokens}")
    shape = AttentionShape(scale, window, softcap)
    lse_nT = q_TnD.new_empty((num_heads, num_tokens), dtype=torch.float32)
    for part in parts_of(document_lengths, num_heads, k_TKD.shape[1], tile_tokens):
        for tokens in part.documents:
            out_1nLD, lse_1nL = attend(
                _by_head(q_TnD, tokens, part.heads),
                _by_head(k_TKD, tokens, part.kv_heads),
                _by_head(v_TKD, tokens, part.kv_heads),
                shape,
            )
            _put(q_TnD, tokens, part.heads, out_1nLD)
            if lse_1nL is not None:
                lse_nT[part.heads, tokens] = lse_1nL[0]
            del out_1nLD, lse_1nL  # else they are there beside all that the next document needs
    return lse_nT


@attention_in_parts_.register_fake
def _(
    q_TnD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
    tile_tokens: int,
) -> Tensor:
    return q_TnD.new_empty((q_TnD.shape[1], q_TnD.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qlora_trainer::attention_in_parts_backward_", mutates_args=("q_TnD", "k_TKD", "v_TKD"))
def attention_in_parts_backward_(
    q_TnD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_TnD: Tensor,
    lse_nT: Tensor,
    grad_TH: Tensor,
    weight_HI: Tensor,
    low_grads_TR: Tensor | None,
    lora_A_RI: Tensor | None,
    change_HI: Tensor | None,
    row_keys_T: Tensor | None,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
    tile_tokens: int,
    dropout: float = 0.0,
    layer_key: int = 0,
) -> None:
    """Puts the gradients of queries, keys and values into their places.

    Args:
        q_TnD, k_TKD, v_TKD: what `attention_in_parts_` was given.
        out_TnD, lse_nT: what it made of them.
        grad_TH: of what the output projection made of `out_TnD`.
        weight_HI: that projection's, dense.
        low_grads_TR, lora_A_RI: the gradient of its adapter's scaled low-rank activations, and A; None without one.
        change_HI: with DoRA and dropout, the weight that multiplies only what is left of the input.
        row_keys_T: with dropout, the key of each token.
        document_lengths, scale, window, softcap, tile_tokens: as before.
        dropout, layer_key: of the adapter; see `LoraAdapter`.
    """
    shape = AttentionShape(scale, window, softcap)
    head_dim = out_TnD.shape[-1]
    for part in parts_of(document_lengths, q_TnD.shape[1], k_TKD.shape[1], tile_tokens):
        columns = slice(part.heads.start * head_dim, part.heads.stop * head_dim)
        num_tokens = part.tokens.stop - part.tokens.start
        grad_LC = grad_TH.new_empty((num_tokens, columns.stop - columns.start))
        # Dropout's factors, which are drawn in 64 bits, would be the largest tensors of all.
        for tile in tiles(num_tokens, num_tokens if row_keys_T is None else tile_tokens):
            tokens = slice(part.tokens.start + tile.start, part.tokens.start + tile.stop)
            own_LC = grad_LC[tile]
            own_LC.addmm_(grad_TH[tokens], weight_HI[:, columns], beta=0.0)  # what is there is not read
            if low_grads_TR is None or lora_A_RI is None:
                continue
            if row_keys_T is None:
                own_LC.addmm_(low_grads_TR[tokens], lora_A_RI[:, columns])
                continue
            added_LC = torch.mm(low_grads_TR[tokens], lora_A_RI[:, columns])
            if change_HI is not None:
                added_LC.addmm_(grad_TH[tokens], change_HI[:, columns])
            factors_LC = dropout_factors(
                row_keys_T[tokens], layer_key, lora_A_RI.shape[1], dropout, grad_LC.dtype, columns=columns
            )
            own_LC += added_LC.mul_(factors_LC)
            del added_LC, factors_LC
        grad_LnD = grad_LC.unflatten(1, (-1, head_dim))
        for tokens in part.documents:
            own = slice(tokens.start - part.tokens.start, tokens.stop - part.tokens.start)
            grads = attend_backward(
                _by_head(grad_LnD, own, slice(None)),
                _by_head(q_TnD, tokens, part.heads),
                _by_head(k_TKD, tokens, part.kv_heads),
                _by_head(v_TKD, tokens, part.kv_heads),
                _by_head(out_TnD, tokens, part.heads),
                lse_nT[part.heads, tokens].unsqueeze(0),
                shape,
            )
            for place, heads, grad_1nLD in zip(
                (q_TnD, k_TKD, v_TKD), (part.heads, part.kv_heads, part.kv_heads), grads, strict=True
            ):
                _put(place, tokens, heads, grad_1nLD)
            del grads, grad_1nLD
        del grad_LC, grad_LnD, own_LC


@attention_in_parts_backward_.register_fake
def _(
    q_TnD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_TnD: Tensor,
    lse_nT: Tensor,
    grad_TH: Tensor,
    weight_HI: Tensor,
    low_grads_TR: Tensor | None,
    lora_A_RI: Tensor | None,
    change_HI: Tensor | None,
    row_keys_T: Tensor | None,
    document_lengths: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
    tile_tokens: int,
    dropout: float = 0.0,
    layer_key: int = 0,
) -> None:
    return None


def _by_head(tensor_TnD: Tensor, tokens: slice, heads: slice) -> Tensor:
    """Some tokens and heads as [1, n, L, D], a view."""
    return tensor_TnD[tokens, heads].transpose(0, 1).unsqueeze(0)


def _put(tensor_TnD: Tensor, tokens: slice, heads: slice, own_1nLD: Tensor) -> None:
    tensor_TnD[tokens, heads] = own_1nLD[0].transpose(0, 1)
