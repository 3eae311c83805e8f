"""The packed attention op against dense attention with a mask, written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.hardware import causal_attention
from qlora_trainer.hardware.causal_attention import QUERY_CHUNK, AttentionShape
from qlora_trainer.model.attention import packed_attention, packed_attention_backward

PLAIN = AttentionShape(scale=0.3, window=0, softcap=0.0)
WINDOW = AttentionShape(scale=0.3, window=7, softcap=0.0)
SOFTCAP = AttentionShape(scale=0.3, window=0, softcap=1.5)
BOTH = AttentionShape(scale=0.3, window=7, softcap=1.5)
SHAPES = pytest.mark.parametrize("shape", [PLAIN, WINDOW, SOFTCAP, BOTH], ids=["plain", "window", "softcap", "both"])


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], shape: AttentionShape) -> Tensor:
    """The definition: one T x T mask that hides later tokens, other documents and what is outside the window."""
    num_groups = q.shape[1] // k.shape[1]
    k_BHTD, v_BHTD = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (k, v))
    scores_BHTT = q @ k_BHTD.transpose(-1, -2) * shape.scale
    if shape.softcap:
        scores_BHTT = shape.softcap * torch.tanh(scores_BHTT / shape.softcap)
    position_T = torch.arange(q.shape[2])
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance_TT = position_T[:, None] - position_T[None, :]
    visible_TT = (distance_TT >= 0) & (document_T[:, None] == document_T[None, :])
    if shape.window:
        visible_TT &= distance_TT < shape.window
    weights_BHTT = scores_BHTT.masked_fill(~visible_TT, -torch.inf).softmax(-1)
    return (weights_BHTT @ v_BHTD).transpose(1, 2)


def _tensors(
    num_tokens: int, *, num_rows: int = 1, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(num_rows, heads, num_tokens, 16, generator=generator).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


def _ours(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], shape: AttentionShape) -> Tensor:
    out_BTHD: Tensor = packed_attention(q, k, v, list(lengths), shape.scale, shape.window, shape.softcap)[0]
    return out_BTHD


def _require_equal(tensors: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int], shape: AttentionShape) -> None:
    expected = _dense_attention(*tensors, lengths, shape)
    found = _ours(*tensors, lengths, shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, tensors, grad)
    found_grads = torch.autograd.grad(found, tensors, grad)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-4, atol=2e-5)


@SHAPES
@pytest.mark.parametrize("num_heads,num_kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [(40,), (13, 1, 26), (5, 35)])
def test_equals_dense_attention(
    shape: AttentionShape, num_heads: int, num_kv_heads: int, lengths: tuple[int, ...]
) -> None:
    _require_equal(_tensors(sum(lengths), num_heads=num_heads, num_kv_heads=num_kv_heads), lengths, shape)


def test_a_gpus_operations_give_the_same_inside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and a backward that runs its forward again, in an operation that autograd does not look into."""
    monkeypatch.setattr(causal_attention, "_has_cpu_kernel", lambda _q: False)
    for num_kv_heads in (4, 2, 1):
        _require_equal(_tensors(40, num_kv_heads=num_kv_heads), (5, 1, 34), PLAIN)


@SHAPES
def test_rows_are_cut_alike_and_kept_apart(shape: AttentionShape) -> None:
    _require_equal(_tensors(24, num_rows=3), (10, 14), shape)


@SHAPES
@pytest.mark.parametrize("num_tokens", [1, 6, 7, 8, 9, 15, 16, 17, 33])
def test_chunk_boundaries(shape: AttentionShape, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "QUERY_CHUNK", 8)
    _require_equal(_tensors(num_tokens), (num_tokens,), shape)


@pytest.mark.parametrize("num_tokens", [QUERY_CHUNK, QUERY_CHUNK + 1, 2 * QUERY_CHUNK + 3])
@pytest.mark.parametrize("window", [1, QUERY_CHUNK - 1, QUERY_CHUNK, QUERY_CHUNK + 1, 10 * QUERY_CHUNK])
def test_windows_around_the_real_chunk_size(num_tokens: int, window: int) -> None:
    tensors = _tensors(num_tokens, num_heads=2, num_kv_heads=1)
    _require_equal(tensors, (num_tokens,), AttentionShape(scale=0.3, window=window, softcap=2.0))


def test_no_temporary_is_quadratic() -> None:
    q, k, v = (tensor.detach() for tensor in _tensors(8 * QUERY_CHUNK, num_heads=1, num_kv_heads=1))
    shape = AttentionShape(scale=0.3, window=QUERY_CHUNK, softcap=2.0)
    with _LargestResult() as forward:
        out_BHTD, lse_BHT = causal_attention.attend(q, k, v, shape)
    with _LargestResult() as backward:
        causal_attention.attend_backward(torch.ones_like(out_BHTD), q, k, v, out_BHTD, lse_BHT, shape)
    for mode in (forward, backward):
        assert 0 < mode.num_elements <= QUERY_CHUNK * 2 * QUERY_CHUNK


class _LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@SHAPES
def test_a_document_is_not_changed_by_its_neighbour(shape: AttentionShape) -> None:
    q, k, v = (tensor.detach().clone() for tensor in _tensors(30))
    before = _ours(q, k, v, (12, 18), shape)
    for tensor in (q, k, v):
        tensor[:, :, :12] += 1.0
    after = _ours(q, k, v, (12, 18), shape)
    assert torch.equal(after[:, 12:], before[:, 12:])
    assert not torch.equal(after[:, :12], before[:, :12])


@pytest.mark.parametrize("lengths", [(29,), (31,), (10, 10), ()])
def test_lengths_that_are_not_the_row_are_refused(lengths: tuple[int, ...]) -> None:
    q, k, v = _tensors(30)
    with pytest.raises(ValueError, match="document_lengths sum to"):
        _ours(q, k, v, lengths, PLAIN)


@SHAPES
def test_the_op_keeps_what_it_declares(shape: AttentionShape) -> None:
    tensors = _tensors(20)
    arguments = ([8, 12], shape.scale, shape.window, shape.softcap)
    torch.library.opcheck(packed_attention, (*tensors, *arguments))
    out_BTHD, lse_BHT = (tensor.detach() for tensor in packed_attention(*tensors, *arguments))
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(
        packed_attention_backward, (torch.ones_like(out_BTHD), *detached, out_BTHD, lse_BHT, *arguments)
    )


@SHAPES
def test_bf16_is_as_close_as_dense_bf16(shape: AttentionShape) -> None:
    tensors = _tensors(40)
    exact = _dense_attention(*tensors, (15, 25), shape)
    q, k, v = (tensor.detach().bfloat16().requires_grad_() for tensor in tensors)
    found = _ours(q, k, v, (15, 25), shape)
    assert found.dtype == torch.bfloat16
    dense = _dense_attention(q, k, v, (15, 25), shape)
    assert (found - exact).norm() <= 1.2 * (dense - exact).norm()
    grad = torch.ones_like(exact)
    exact_grads = torch.autograd.grad(exact, tensors, grad)
    found_grads = torch.autograd.grad(found, (q, k, v), grad.bfloat16())
    dense_grads = torch.autograd.grad(dense, (q, k, v), grad.bfloat16())
    for exact_grad, found_grad, dense_grad in zip(exact_grads, found_grads, dense_grads, strict=True):
        assert found_grad.dtype == torch.bfloat16
        assert (found_grad - exact_grad).norm() <= 1.2 * (dense_grad - exact_grad).norm()
