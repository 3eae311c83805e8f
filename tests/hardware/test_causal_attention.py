"""Attention and its hand-written backward against plain fp64 attention over all pairs of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qlora_trainer.hardware import causal_attention
from qlora_trainer.hardware.causal_attention import (
    QUERY_CHUNK,
    AttentionShape,
    attend,
    attend_backward,
    fused_attention,
    fused_attention_backward,
)

SHAPES = {
    "plain": AttentionShape(scale=0.25, window=0, softcap=0.0),
    "window": AttentionShape(scale=0.25, window=7, softcap=0.0),
    "window of one": AttentionShape(scale=0.25, window=1, softcap=0.0),
    "window of all": AttentionShape(scale=0.25, window=10_000, softcap=0.0),
    "soft cap": AttentionShape(scale=0.25, window=0, softcap=2.0),
    "window and soft cap": AttentionShape(scale=0.125, window=30, softcap=5.0),
}
LONG = QUERY_CHUNK + 37  # more than one chunk of queries


def plain_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] and log-sum-exp [B, H, T], from all T x T scores."""
    num_tokens, num_groups = q_BHTD.shape[2], q_BHTD.shape[1] // k_BKTD.shape[1]
    k_BHTD, v_BHTD = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (k_BKTD, v_BKTD))
    scores_BHTT = q_BHTD @ k_BHTD.transpose(-1, -2) * shape.scale
    if shape.softcap:
        scores_BHTT = torch.tanh(scores_BHTT / shape.softcap) * shape.softcap
    distance_TT = torch.arange(num_tokens).unsqueeze(1) - torch.arange(num_tokens)
    hidden_TT = (distance_TT < 0) | (distance_TT >= (shape.window or num_tokens))
    scores_BHTT = scores_BHTT.masked_fill(hidden_TT, -torch.inf)
    return scores_BHTT.softmax(-1) @ v_BHTD, scores_BHTT.logsumexp(-1)


def make_inputs(num_tokens: int, *, num_kv_heads: int, dtype: torch.dtype, value_size: int = 16) -> list[Tensor]:
    """q, k, v and the gradient of the output; 2 rows, 4 query heads."""
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = [(4, 16), (num_kv_heads, 16), (num_kv_heads, value_size), (4, value_size)]
    return [
        torch.randn(2, heads, num_tokens, size, generator=generator, dtype=torch.float64).to(dtype)
        for heads, size in sizes
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("num_tokens", [1, 5, LONG])
@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients(
    name: str, num_tokens: int, num_kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    shape = SHAPES[name]
    q_BHTD, k_BKTD, v_BKTD, grad_BHTD = make_inputs(num_tokens, num_kv_heads=num_kv_heads, dtype=dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (q_BHTD, k_BKTD, v_BKTD)]
    expected_BHTD, expected_lse_BHT = plain_attention(leaves[0], leaves[1], leaves[2], shape)

    out_BHTD, lse_BHT = attend(q_BHTD, k_BKTD, v_BKTD, shape)
    found = attend_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, shape)

    assert out_BHTD.dtype == dtype
    assert relative_error(out_BHTD, expected_BHTD.detach()) < tolerance
    assert lse_BHT is not None
    torch.testing.assert_close(lse_BHT, expected_lse_BHT.detach().float(), rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(expected_BHTD, leaves, grad_BHTD.double())
    largest = max(float(gradient.norm()) for gradient in expected)
    for gradient, wanted, tensor in zip(found, expected, (q_BHTD, k_BKTD, v_BKTD), strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == tensor.shape
        # Against the largest: with one token in sight, q and k have no gradient at all.
        assert float((gradient.double() - wanted).norm()) < tolerance * largest


@pytest.mark.parametrize("name", ["plain", "window and soft cap"])
def test_values_may_have_another_size_than_keys(name: str) -> None:
    shape = SHAPES[name]
    q_BHTD, k_BKTD, v_BKTD, grad_BHTD = make_inputs(20, num_kv_heads=2, dtype=torch.float64, value_size=8)
    leaves = [tensor.clone().requires_grad_() for tensor in (q_BHTD, k_BKTD, v_BKTD)]
    expected_BHTD, _ = plain_attention(leaves[0], leaves[1], leaves[2], shape)

    out_BHTD, lse_BHT = attend(q_BHTD, k_BKTD, v_BKTD, shape)
    found = attend_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, shape)

    assert relative_error(out_BHTD, expected_BHTD.detach()) < 1e-5
    for gradient, wanted in zip(found, torch.autograd.grad(expected_BHTD, leaves, grad_BHTD), strict=True):
        assert relative_error(gradient, wanted) < 1e-5


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_no_token_sees_a_later_one_or_one_beyond_the_window(name: str) -> None:
    shape = SHAPES[name]
    q_BHTD, k_BKTD, v_BKTD, _ = make_inputs(LONG, num_kv_heads=2, dtype=torch.float32)
    before, _ = attend(q_BHTD, k_BKTD, v_BKTD, shape)
    changed = 100
    k_BKTD[:, :, changed] += 1.0
    v_BKTD[:, :, changed] += 1.0

    after, _ = attend(q_BHTD, k_BKTD, v_BKTD, shape)

    sees = (after != before).any(-1).all(0).all(0)
    last = min(LONG, changed + shape.window) if shape.window else LONG
    expected = torch.zeros(LONG, dtype=torch.bool)
    expected[changed:last] = True
    assert torch.equal(sees, expected)


def cuda_kernel(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, *, enable_gqa: bool, capability: tuple[int, int]
) -> str:
    """What torch 2.13 takes for causal attention (ATen/native/transformers/cuda/sdp_utils.cpp)."""
    head_dim, heads = q_BHTD.shape[-1], {tensor.shape[1] for tensor in (q_BHTD, k_BKTD, v_BKTD)}
    has_16_bits = q_BHTD.dtype in (torch.float16, torch.bfloat16)
    is_hole = 192 < head_dim <= 224 and capability in ((8, 6), (8, 9), (12, 0))
    if capability >= (8, 0) and has_16_bits and head_dim <= 256 and not is_hole and (len(heads) == 1 or enable_gqa):
        return "flash"
    alignment = 8 if has_16_bits else 4 if capability >= (8, 0) else 1
    is_known = q_BHTD.dtype != torch.bfloat16 or capability >= (8, 0)
    return "efficient" if is_known and len(heads) == 1 and head_dim % alignment == 0 else "T x T matrices"


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 80, 100, 128, 208, 256, 288])
def test_a_gpu_never_gets_the_kernel_that_makes_all_scores(
    capability: tuple[int, int], dtype: torch.dtype, num_kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations tried: heads left grouped in fp16, in which Turing trains; every size of head taken as plain."""
    kernels = []

    def chosen(*tensors: Tensor, is_causal: bool, scale: float, enable_gqa: bool) -> Tensor:
        assert is_causal
        kernels.append(cuda_kernel(*tensors, enable_gqa=enable_gqa, capability=capability))
        return torch.empty_like(tensors[0])

    if capability < (8, 0) and dtype == torch.bfloat16:
        return  # refused: `hardware.device.require_has`
    monkeypatch.setattr(causal_attention, "scaled_dot_product_attention", chosen)
    q_BHTD, k_BKTD = (torch.empty(1, heads, 3, head_dim, dtype=dtype, device="meta") for heads in (4, num_kv_heads))
    if SHAPES["plain"].is_plain(q_BHTD, k_BKTD):
        causal_attention._library_attention(q_BHTD, k_BKTD, k_BKTD, 1.0)
        assert kernels in (["flash"], ["efficient"])
    else:
        assert head_dim not in (16, 80, 128, 256)  # those of the models that are known by name


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
def test_what_a_gpu_is_asked_for_is_attention(num_kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    """On the CPU here, the operations that a run has on a GPU.

    Mutations tried: heads repeated in another order; `enable_grad` alone, which inside an operation records nothing.
    """
    q_BHTD, k_BKTD, v_BKTD, grad_BHTD = make_inputs(LONG, num_kv_heads=num_kv_heads, dtype=dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (q_BHTD, k_BKTD, v_BKTD)]
    expected_BHTD, _ = plain_attention(leaves[0], leaves[1], leaves[2], SHAPES["plain"])

    out_BHTD = fused_attention(q_BHTD, k_BKTD, v_BKTD, 0.25).transpose(1, 2)
    found: Any = fused_attention_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, 0.25)

    assert relative_error(out_BHTD, expected_BHTD.detach()) < tolerance
    for gradient, wanted in zip(found, torch.autograd.grad(expected_BHTD, leaves, grad_BHTD.double()), strict=True):
        assert (gradient.dtype, gradient.requires_grad) == (dtype, False)
        assert relative_error(gradient, wanted) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_has_a_kernel_without_all_scores(
    dtype: torch.dtype, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q_BHTD, k_BKTD, v_BKTD, grad_BHTD = (
        tensor.cuda() for tensor in make_inputs(LONG, num_kv_heads=num_kv_heads, dtype=dtype)
    )

    def without_math(*arguments: Any, **options: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return scaled_dot_product_attention(*arguments, **options)

    monkeypatch.setattr(causal_attention, "scaled_dot_product_attention", without_math)
    out_BHTD = fused_attention(q_BHTD, k_BKTD, v_BKTD, 0.25)
    gradients: Any = fused_attention_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, 0.25)
    assert all(bool(tensor.isfinite().all()) for tensor in (out_BHTD, *gradients))
