"""RMSNorm, rotary embedding and gated activation against autograd over their formulas, also across blocks of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_trainer.hardware import row_blocks
from qlora_trainer.model import row_ops

T, H, HEADS, D = 37, 48, 3, 16
DTYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])


@pytest.fixture(autouse=True, params=[row_blocks.CPU_BLOCK_ELEMENTS, 5 * H])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, and five at a time, the last block being smaller."""
    monkeypatch.setattr(row_blocks, "CPU_BLOCK_ELEMENTS", request.param)


def normed(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (offset + weight)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(found.float() - expected) <= tolerance * torch.linalg.vector_norm(expected)


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("has_added", [True, False])
def test_rms_norm_and_its_gradient(dtype: torch.dtype, tolerance: float, offset: float, has_added: bool) -> None:
    x, grad, added = (drawn(T, H, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    weight = drawn(H, dtype=dtype, seed=3)
    leaf = x.float().requires_grad_()
    expected = normed(leaf, weight.float(), offset)
    expected.backward(grad.float())
    assert leaf.grad is not None

    out, inverse = row_ops.rms_norm(x, weight, 1e-5, offset)
    require_close(out, expected.detach(), tolerance)
    assert inverse.dtype == torch.float32
    assert torch.equal(row_ops.rms_norm_again(x, inverse, weight, offset), out)
    row_ops.rms_norm_backward_(grad, x, inverse, weight, offset, added if has_added else None)
    require_close(grad, leaf.grad + added.float() if has_added else leaf.grad, tolerance)


@DTYPES
def test_rotation_is_transformers_and_back_is_its_transpose(dtype: torch.dtype, tolerance: float) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads = drawn(T, HEADS, D, dtype=dtype, seed=0)
    angles = torch.rand(T, D // 2, generator=torch.Generator().manual_seed(1)) * 6.0
    cos, sin = (torch.cat((table, table), -1).to(dtype) for table in (angles.cos(), angles.sin()))
    leaf = heads.float().requires_grad_()
    by_head = leaf.transpose(0, 1).unsqueeze(0)
    expected, _ = apply_rotary_pos_emb(by_head, by_head, cos.float()[None], sin.float()[None])
    grad = drawn(T, HEADS, D, dtype=dtype, seed=2)
    expected.backward(grad.float().transpose(0, 1).unsqueeze(0))
    assert leaf.grad is not None

    row_ops.rotate_(heads, cos, sin, False)
    require_close(heads, expected.detach()[0].transpose(0, 1), tolerance)
    row_ops.rotate_(grad, cos, sin, True)
    require_close(grad, leaf.grad, tolerance)


@DTYPES
@pytest.mark.parametrize("activation", [row_ops.SILU, row_ops.GELU, row_ops.GELU_TANH])
def test_a_gated_activation_and_its_gradients(dtype: torch.dtype, tolerance: float, activation: str) -> None:
    gate, up, grad = (drawn(T, H, dtype=dtype, seed=seed) for seed in range(3))
    leaves = [tensor.float().requires_grad_() for tensor in (gate, up)]
    if activation == row_ops.SILU:
        activated = functional.silu(leaves[0])
    else:
        approximate = "tanh" if activation == row_ops.GELU_TANH else "none"
        activated = functional.gelu(leaves[0], approximate=approximate)
    expected = activated * leaves[1]
    expected.backward(grad.float())

    require_close(row_ops.gated(gate, up, activation), expected.detach(), tolerance)
    row_ops.gated_backward_(grad, gate, up, activation)
    for found, wanted in ((gate, leaves[0].grad), (up, leaves[1].grad), (grad, expected.detach())):
        assert wanted is not None
        require_close(found, wanted, tolerance)


@DTYPES
def test_column_sums_are_added_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    """In 16 bits one row in eight would be lost to rounding: all have one sign."""
    x = drawn(T, H, dtype=dtype, seed=0).abs_()
    found = row_ops.column_sums(x)
    assert found.dtype == torch.float32
    require_close(found, x.double().sum(0).float(), 1e-6)
    require_close(row_ops.column_sums(x[:, 5:].t()), x[:, 5:].t().double().sum(0).float(), 1e-6)
