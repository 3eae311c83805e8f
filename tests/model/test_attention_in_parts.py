"""Attention part by part against attention whole, with the output projection's gradient made before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.model.attention import packed_attention, packed_attention_backward
from qlora_trainer.model.attention_in_parts import attention_in_parts_, attention_in_parts_backward_, parts_of
from qlora_trainer.model.random_draws import dropout_factors
from tests.model.tiny_models import relative_error

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN, RANK = 6, 2, 16, 40, 3
LENGTHS, TILE = (70, 5, 9, 26, 15, 1, 2), 32  # a run has 16 tokens: two alone, runs of two, one that fills its run
SCALE = 0.25
SHAPES = pytest.mark.parametrize("window, softcap", [(0, 0.0), (16, 0.0), (16, 30.0)], ids=["plain", "window", "cap"])


def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def queries_keys_values(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    num_tokens = sum(LENGTHS)
    return made(*((num_tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)), dtype=dtype)


def by_head(tensor_TnD: Tensor) -> Tensor:
    return tensor_TnD.transpose(0, 1).unsqueeze(0)


def attended(qkv: list[Tensor], window: int, softcap: float) -> tuple[Tensor, Tensor]:
    out_TnD = qkv[0].clone()
    return out_TnD, attention_in_parts_(out_TnD, *qkv[1:], LENGTHS, SCALE, window, softcap, TILE)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([(6, 2), (4, 4), (8, 1)]),
    st.integers(1, 64),
)
def test_every_head_of_every_document_is_in_one_part(
    lengths: list[int], heads: tuple[int, int], tile_tokens: int
) -> None:
    seen: list[tuple[int, int]] = []
    documents: list[tuple[int, int]] = []
    for part in parts_of(lengths, *heads, tile_tokens):
        assert (part.tokens.start, part.tokens.stop) == (part.documents[0].start, part.documents[-1].stop)
        num_heads, num_kv_heads = part.heads.stop - part.heads.start, part.kv_heads.stop - part.kv_heads.start
        assert num_heads * heads[1] == num_kv_heads * heads[0], "queries and the head they share"
        assert part.heads.start * heads[1] == part.kv_heads.start * heads[0]
        num_tokens = part.tokens.stop - part.tokens.start
        assert num_tokens * num_kv_heads <= max(tile_tokens, num_tokens, heads[1]), "as one head of a tile"
        assert num_kv_heads in (1, heads[1])
        assert num_kv_heads == heads[1] or len(part.documents) == 1
        for document in part.documents:
            seen += [(document.start, head) for head in range(part.heads.start, part.heads.stop)]
            documents.append((document.start, document.stop))
    assert sorted(seen) == [(first, head) for first, _ in sorted(set(documents)) for head in range(heads[0])]
    assert [last - first for first, last in sorted(set(documents))] == lengths


@SHAPES
def test_outputs_are_the_same_to_the_bit(window: int, softcap: float) -> None:
    qkv = queries_keys_values()
    whole, whole_lse = packed_attention(*map(by_head, qkv), LENGTHS, SCALE, window, softcap)
    found, lse = attended(qkv, window, softcap)
    assert torch.equal(found, whole[0])
    assert torch.equal(lse, whole_lse[0])


def whole_gradients(qkv: list[Tensor], grad_attended_TI: Tensor, window: int, softcap: float) -> list[Tensor]:
    out, lse = packed_attention(*map(by_head, qkv), LENGTHS, SCALE, window, softcap)
    grads = packed_attention_backward(
        grad_attended_TI.view(out.shape), *map(by_head, qkv), out, lse, LENGTHS, SCALE, window, softcap
    )
    return [grad[0].transpose(0, 1) for grad in grads]


def gradients_in_place(
    qkv: list[Tensor],
    grad_TH: Tensor,
    weight_HI: Tensor,
    *others: Tensor | None,
    window: int,
    softcap: float,
    dropout: tuple[Any, ...] = (),
) -> list[Tensor]:
    out, lse = attended(qkv, window, softcap)
    places = [tensor.clone() for tensor in qkv]
    attention_in_parts_backward_(
        *places, out, lse, grad_TH, weight_HI, *others, LENGTHS, SCALE, window, softcap, TILE, *dropout
    )
    return places


@SHAPES
def test_gradients_are_the_same_to_the_bit(window: int, softcap: float) -> None:
    """Of an output projection that changes no number: attention's own gradient is the same in parts."""
    qkv, width = queries_keys_values(), NUM_HEADS * HEAD_DIM
    (grad_TH,) = made((sum(LENGTHS), width))
    found = gradients_in_place(qkv, grad_TH, torch.eye(width), *4 * [None], window=window, softcap=softcap)
    expected = whole_gradients(qkv, grad_TH, window, softcap)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@SHAPES
@pytest.mark.parametrize("adapter", ["lora", "dropout", "dora with dropout"])
def test_the_gradient_of_the_output_is_that_of_the_projection(adapter: str, window: int, softcap: float) -> None:
    qkv, width, num_tokens = queries_keys_values(), NUM_HEADS * HEAD_DIM, sum(LENGTHS)
    grad, weight, change, low, lora_A = made(
        (num_tokens, HIDDEN), (HIDDEN, width), (HIDDEN, width), (num_tokens, RANK), (RANK, width)
    )
    keys = None if adapter == "lora" else torch.arange(num_tokens)
    own_change = change if adapter == "dora with dropout" else None
    added = low @ lora_A
    if own_change is not None:
        added = added + grad @ own_change
    if keys is not None:
        added = added * dropout_factors(keys, 7, width, 0.3, grad.dtype)
    found = gradients_in_place(
        qkv, grad, weight, low, lora_A, own_change, keys, window=window, softcap=softcap, dropout=(0.3, 7)
    )
    expected = whole_gradients(qkv, grad @ weight + added, window, softcap)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_the_ops_keep_what_they_declare() -> None:
    qkv, width = queries_keys_values(), NUM_HEADS * HEAD_DIM
    settings = (list(LENGTHS), SCALE, 0, 0.0, TILE)
    torch.library.opcheck(attention_in_parts_, (*qkv, *settings))
    out, lse = attended(qkv, 0, 0.0)
    grad, weight = made((sum(LENGTHS), HIDDEN), (HIDDEN, width))
    torch.library.opcheck(attention_in_parts_backward_, (*qkv, out, lse, grad, weight, *4 * [None], *settings))


def test_lengths_that_are_not_all_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="document_lengths sum to"):
        attention_in_parts_(*queries_keys_values(), LENGTHS[1:], SCALE, 0, 0.0, TILE)
