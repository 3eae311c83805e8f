"""What is planned for the inside of our own operations is what they take, however many documents are in the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.hardware.causal_attention import AttentionShape, attend, working_bytes
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model import attention, nf4, row_ops
from qlora_trainer.model.attention import packed_attention, packed_attention_backward
from qlora_trainer.planning import inside
from qlora_trainer.planning.inside import ATTENTION, ROW_OPS, bytes_of
from qlora_trainer.planning.tracker import Inside, TensorSpec
from tests.hardware.profiled_memory import bytes_beyond_results

HEADS, HEAD_SIZE, NUM_TOKENS = 3, 32, 400
SCALE, SOFTCAP = 0.2, 0.0
TOLERANCE_BYTES = 4096  # of a handful of small tensors, such as positions


def spec(num_tokens: int) -> TensorSpec:
    return TensorSpec((1, HEADS, num_tokens, HEAD_SIZE), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("window", [100, 300])
@pytest.mark.parametrize("num_documents", [1, 2, 3])
def test_chunked_attention_takes_what_one_document_takes(window: int, num_documents: int) -> None:
    """Mutation tried: the op keeps a document's result while it works on the next one, 2 % of an evaluation."""
    lengths = [NUM_TOKENS] * num_documents
    q, k, v = (torch.randn(1, sum(lengths), HEADS, HEAD_SIZE).transpose(1, 2) for _ in range(3))
    out: list[Tensor] = []
    with torch.no_grad():

        def forward() -> tuple[Tensor, ...]:
            out[:] = packed_attention(q, k, v, lengths, SCALE, window, SOFTCAP)
            return tuple(out)

        found_bytes = bytes_beyond_results(forward)
        grad = torch.ones_like(out[0])

        def backward() -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = packed_attention_backward(
                grad, q, k, v, out[0], out[1], lengths, SCALE, window, SOFTCAP
            )
            return grads

        found_backward_bytes = bytes_beyond_results(backward)
    planned_bytes, planned_backward_bytes = planned(NUM_TOKENS, (NUM_TOKENS,), window)
    assert found_bytes == pytest.approx(planned_bytes, abs=TOLERANCE_BYTES)
    assert found_backward_bytes == pytest.approx(planned_backward_bytes, abs=TOLERANCE_BYTES)


def planned(num_tokens: int, lengths: Sequence[int], window: int) -> tuple[int, int]:
    """Of forward and backward over a row of documents of these lengths."""
    settings = (tuple(lengths), SCALE, window, SOFTCAP)
    qkv = (spec(num_tokens),) * 3
    out_spec = TensorSpec((1, num_tokens, HEADS, HEAD_SIZE), torch.float32, torch.device("cpu"))
    lse_spec = TensorSpec((1, HEADS, num_tokens), torch.float32, torch.device("cpu"))
    return (
        bytes_of(Inside(0, ATTENTION[0], (*qkv, *settings))),
        bytes_of(Inside(0, ATTENTION[1], (out_spec, *qkv, out_spec, lse_spec, *settings))),
    )


@pytest.mark.parametrize("num_kv_heads, copies", [(8, 2), (32, 0), (1, 0)])
def test_attention_of_cards_without_bf16_has_keys_and_values_for_every_query_head(
    num_kv_heads: int, copies: int
) -> None:
    """Forward: torch's kernel there takes no grouped heads. Backward has those, too, and tiles in place of rows."""
    gpu = python_accelerator()
    assert gpu is not None

    def taken(dtype: torch.dtype) -> tuple[int, int]:
        q, kv, out = (
            TensorSpec(shape, dtype, gpu) for shape in ((1, 32, 512, 64), (1, num_kv_heads, 512, 64), (1, 512, 32, 64))
        )
        lse = TensorSpec((1, 32, 512), torch.float32, gpu)
        settings = ((512,), SCALE, 0, SOFTCAP)
        forward = bytes_of(Inside(0, ATTENTION[0], (q, kv, kv, *settings)))
        return forward, bytes_of(Inside(0, ATTENTION[1], (out, q, kv, kv, out, lse, *settings)))

    new, old = taken(torch.bfloat16), taken(torch.float16)
    q_bytes = 2 * 32 * 512 * 64
    assert old[0] - new[0] == copies * q_bytes
    assert copies * q_bytes <= old[1] - new[1] <= copies * q_bytes + 0.1 * q_bytes


@pytest.mark.parametrize("lengths", [(400, 400, 120), (120, 400, 30, 120), (64,)])
def test_documents_of_one_length_are_worked_out_once(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length is asked for, none twice, and the bytes are those of the largest one.

    Fails where each document is walked through: a pinned micro-batch of 10^9 tokens has half a million of them.
    """
    asked: list[int] = []

    def see(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor | None]:
        asked.append(q.shape[2])
        return attend(q, k, v, shape)

    monkeypatch.setattr(attention, "attend", see)
    alone = [planned(length, (length,), 300) for length in lengths]
    asked.clear()
    inside._traced_bytes.cache_clear()
    assert planned(sum(lengths), lengths, 300) == tuple(map(max, zip(*alone, strict=True)))
    assert asked == list(dict.fromkeys(lengths))


def test_a_row_operation_takes_nothing_as_a_kernel_and_a_block_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows make it more; a norm without its kernel takes at least its rows in fp32."""
    norm = next(op for op in ROW_OPS if op.endswith("::rms_norm"))

    gpu, cpu = python_accelerator(), torch.device("cpu")
    assert gpu is not None

    def taken(device: torch.device, num_rows: int) -> int:
        rows, weight = (TensorSpec(shape, torch.bfloat16, device) for shape in ((num_rows, 64), (64,)))
        return bytes_of(Inside(0, norm, (rows, weight, 1e-5, 0.0)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert taken(gpu, 100) == 0
    assert taken(cpu, 100) >= 4 * 64 * 100
    assert taken(cpu, 10**9) == taken(cpu, 10**6)
    monkeypatch.setattr(inside, "expects_row_kernels", lambda _device: False)
    assert taken(gpu, 100) >= 4 * 64 * 100


@pytest.mark.parametrize("num_tokens", [400, 1500])
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (300, 0.0), (0, 30.0), (100, 30.0)])
def test_room_is_made_for_what_attention_takes(num_tokens: int, window: int, softcap: float) -> None:
    """Too little, and the resident set passes the plan (by 100 MB of Gemma 2's 2,500 tokens); too much costs time."""
    settings = ((num_tokens,), SCALE, window, softcap)
    qkv = (spec(num_tokens),) * 3
    out_spec = TensorSpec((1, num_tokens, HEADS, HEAD_SIZE), torch.float32, torch.device("cpu"))
    lse_spec = TensorSpec((1, HEADS, num_tokens), torch.float32, torch.device("cpu"))
    taken = bytes_of(Inside(0, ATTENTION[1], (out_spec, *qkv, out_spec, lse_spec, *settings)))

    query = torch.empty(qkv[0].shape, device="meta")
    asked = working_bytes(query, num_tokens, AttentionShape(SCALE, window, softcap))

    assert 0.9 * taken <= asked <= 2.5 * taken


NUM_ROWS, WIDTH = 600, 1024  # two blocks and a part of one
ROWS, SCALES, WEIGHT = (NUM_ROWS, WIDTH), (NUM_ROWS, 1), (WIDTH,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "op, shapes, others",
    [
        (row_ops.rms_norm, [ROWS, WEIGHT], [1e-5, 0.0]),
        (row_ops.rms_norm_again, [ROWS, SCALES, WEIGHT], [1.0]),
        (row_ops.rms_norm_backward_, [ROWS, ROWS, SCALES, WEIGHT], [0.0, None]),
        (row_ops.rotate_, [(NUM_ROWS, 8, WIDTH // 8), (NUM_ROWS, WIDTH // 8), (NUM_ROWS, WIDTH // 8)], [True]),
        (row_ops.gated, [ROWS, ROWS], [row_ops.SILU]),
        (row_ops.gated_backward_, [ROWS, ROWS, ROWS], [row_ops.SILU]),
        (row_ops.gated_backward_, [ROWS, ROWS, ROWS], [row_ops.GELU_TANH]),
        (row_ops.summed_in_blocks, [ROWS], []),
    ],
    ids=str,
)
def test_a_row_operation_takes_what_the_profiler_counts(
    op: Any, shapes: list[tuple[int, ...]], others: list[object], dtype: torch.dtype
) -> None:
    """Fails where a result that is given as `out=` counts as made inside: a gated product too much in each layer."""
    tensors = [torch.randn(shape, dtype=torch.float32 if shape == SCALES else dtype) for shape in shapes]
    specs = [TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors]

    planned_bytes = bytes_of(Inside(0, op._qualname, (*specs, *others)))

    assert planned_bytes > 0
    found_bytes = bytes_beyond_results(lambda: op(*tensors, *others))
    assert found_bytes == pytest.approx(planned_bytes, abs=TOLERANCE_BYTES)


@pytest.mark.parametrize("vocabulary", [32_000, 49_155, 151_936])
@pytest.mark.parametrize("is_on_host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk, needs_gradient, softcap", [(64, True, 0.0), (64, False, 30.0), (256, True, 30.0)])
def test_blocks_of_a_vocabulary_are_a_line(
    vocabulary: int, is_on_host: bool, dtype: torch.dtype, chunk: int, needs_gradient: bool, softcap: float
) -> None:
    """Two chunks with a projection of tens of blocks, against a trace of every block.

    Mutations tried: the last block, which is not whole, left out; a block more.
    """
    device = torch.device("cpu")
    hidden = TensorSpec((2 * chunk, 2048), dtype, device)
    targets = TensorSpec((2 * chunk,), torch.int64, device)
    weight = TensorSpec((vocabulary, 2048), torch.bfloat16, device)
    arguments = (hidden, targets, weight, None, 1.0, softcap, chunk, needs_gradient, None, is_on_host)
    assert bytes_of(Inside(0, inside.LOSS, arguments)) == inside._traced_bytes(inside.LOSS, arguments)


@pytest.mark.parametrize("vocabulary", [32_000, 49_155])
@pytest.mark.parametrize("dtype, double_quant", [(torch.float32, True), (torch.bfloat16, False)])
def test_blocks_of_a_vocabulary_in_nf4_are_a_line(vocabulary: int, dtype: torch.dtype, double_quant: bool) -> None:
    """Its blocks end with those of its scales, of which they take a part."""
    device = torch.device("cpu")
    code = torch.empty(256, device="meta") if double_quant else None
    packed = nf4.empty((vocabulary, 2048), code=code, device=torch.device("meta"))
    weight = TensorSpec((vocabulary, 1024), torch.uint8, device)
    scales = (packed.absmax, packed.nested_absmax, packed.offset, packed.code)
    specs = (None if one is None else TensorSpec(tuple(one.shape), one.dtype, device) for one in scales)
    hidden, targets = TensorSpec((128, 2048), dtype, device), TensorSpec((128,), torch.int64, device)
    arguments = (hidden, targets, weight, None, 1.0, 0.0, 64, True, None, False, None, None, None, *specs)
    assert bytes_of(Inside(0, inside.LOSS, arguments)) == inside._traced_bytes(inside.LOSS, arguments)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=6),
    kv_heads=st.sampled_from([1, 2, 4]),
    tile=st.sampled_from([16, 40, 64]),
    op=st.sampled_from(inside.IN_PARTS),
)
@settings(max_examples=60)
def test_no_documents_take_more_of_attention_in_parts_than_is_planned(
    lengths: list[int], kv_heads: int, tile: int, op: str
) -> None:
    """However a micro-batch is cut, if only no document is longer than the longest that was planned for.

    Mutation tried: short documents fill a whole tile with all heads at once, which took 3.9 times of what was planned.
    """
    longest, num_tokens = max(lengths), sum(lengths)
    planned_bytes = bytes_of(Inside(0, op, _of_attention_in_parts(op, (longest,), num_tokens, kv_heads, tile)))

    arguments = _of_attention_in_parts(op, tuple(lengths), num_tokens, kv_heads, tile)
    assert inside._traced_bytes(op, arguments) <= planned_bytes
    if longest >= tile:
        alone = _of_attention_in_parts(op, (longest,), longest, kv_heads, tile)
        assert planned_bytes == inside._traced_bytes(op, alone), "no more than that one takes"


def _of_attention_in_parts(
    op: str, lengths: tuple[int, ...], num_tokens: int, kv_heads: int, tile: int
) -> tuple[Any, ...]:
    heads, hidden, rank = 4, 96, 4

    def tensor(*shape: int) -> TensorSpec:
        return TensorSpec(shape, torch.bfloat16, torch.device("cpu"))

    q, kv = tensor(num_tokens, heads, HEAD_SIZE), tensor(num_tokens, kv_heads, HEAD_SIZE)
    others = (lengths, SCALE, 0, SOFTCAP, tile)
    if op == inside.IN_PARTS[0]:
        return (q, kv, kv, *others)
    lse = TensorSpec((heads, num_tokens), torch.float32, torch.device("cpu"))
    projection = (tensor(num_tokens, hidden), tensor(hidden, heads * HEAD_SIZE), tensor(num_tokens, rank))
    return (q, kv, kv, q, lse, *projection, tensor(rank, heads * HEAD_SIZE), None, None, *others)
