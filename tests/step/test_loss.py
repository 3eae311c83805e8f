"""The chunked loss against PyTorch's cross-entropy on full logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PreTrainedConfig

from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.step.loss import chunked_cross_entropy, largest_bytes
from tests.hardware.profiled_memory import allocated_by

NUM_HIDDEN, NUM_VOCABULARY = 24, 50


def _plain_loss(hidden_NH: Tensor, targets_N: Tensor, head: FrozenHead, logit_shape: LogitShape) -> Tensor:
    bias_V = None if head.bias is None else head.bias.float()
    logits_NV = torch.nn.functional.linear(hidden_NH, head.weight.to(hidden_NH.dtype)).float()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    logits_NV = logits_NV * logit_shape.scale
    if logit_shape.softcap:
        logits_NV = logit_shape.softcap * torch.tanh(logits_NV / logit_shape.softcap)
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")


def _inputs(num_positions: int, *, bias: bool, seed: int = 0) -> tuple[Tensor, Tensor, FrozenHead]:
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.randn(NUM_VOCABULARY, NUM_HIDDEN, generator=generator).bfloat16()
    bias_V = torch.randn(NUM_VOCABULARY, generator=generator).bfloat16() if bias else None
    hidden_NH = torch.randn(num_positions, NUM_HIDDEN, generator=generator).requires_grad_()
    targets_N = torch.randint(0, NUM_VOCABULARY, (num_positions,), generator=generator)
    return hidden_NH, targets_N, FrozenHead(weight_VH, bias_V)


@settings(max_examples=60, deadline=None)
@given(
    num_positions=st.integers(1, 40),
    chunk_tokens=st.integers(1, 50),
    scale=st.sampled_from([1.0, 0.0625, 2.0]),
    softcap=st.sampled_from([0.0, 5.0, 30.0]),
    bias=st.booleans(),
)
def test_equals_cross_entropy(num_positions: int, chunk_tokens: int, scale: float, softcap: float, bias: bool) -> None:
    hidden_NH, targets_N, head = _inputs(num_positions, bias=bias)
    shape = LogitShape(scale, softcap)
    expected = _plain_loss(hidden_NH, targets_N, head, shape)
    found = chunked_cross_entropy(hidden_NH, targets_N, head, shape, chunk_tokens=chunk_tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (expected_grad_NH,) = torch.autograd.grad(expected / 7, hidden_NH)
    (found_grad_NH,) = torch.autograd.grad(found / 7, hidden_NH)
    torch.testing.assert_close(found_grad_NH, expected_grad_NH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_bf16_is_as_close_as_plain_bf16(softcap: float) -> None:
    hidden_NH, targets_N, head = _inputs(64, bias=True)
    shape = LogitShape(1.0, softcap)
    (exact_NH,) = torch.autograd.grad(_plain_loss(hidden_NH, targets_N, head, shape), hidden_NH)
    low_NH = hidden_NH.detach().bfloat16().requires_grad_()
    (plain_NH,) = torch.autograd.grad(_plain_loss(low_NH, targets_N, head, shape), low_NH)
    loss = chunked_cross_entropy(low_NH, targets_N, head, shape, chunk_tokens=16)
    (found_NH,) = torch.autograd.grad(loss, low_NH)
    assert found_NH.dtype == torch.bfloat16
    assert (found_NH - exact_NH).norm() <= 1.2 * (plain_NH - exact_NH).norm()


def test_no_positions_is_no_loss() -> None:
    hidden_NH, targets_N, head = _inputs(0, bias=False)
    loss = chunked_cross_entropy(hidden_NH, targets_N, head, LogitShape(1.0, 0.0), chunk_tokens=4)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden_NH.grad is not None
    assert hidden_NH.grad.shape == (0, NUM_HIDDEN)


def test_one_gradient_is_saved_and_no_logits() -> None:
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    hidden_NH, targets_N, head = _inputs(32, bias=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_cross_entropy(hidden_NH, targets_N, head, LogitShape(1.0, 5.0), chunk_tokens=8)
    assert saved == [(32, NUM_HIDDEN)]


def test_evaluation_makes_no_gradient() -> None:
    hidden_NH, targets_N, head = _inputs(32, bias=False)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden_NH, targets_N, head, LogitShape(1.0, 0.0), chunk_tokens=8)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _plain_loss(hidden_NH, targets_N, head, LogitShape(1.0, 0.0)).detach())


@pytest.mark.parametrize(
    "config,expected",
    [
        (LlamaConfig(), LogitShape(1.0, 0.0)),
        (Gemma2Config(), LogitShape(1.0, 30.0)),
        (CohereConfig(), LogitShape(0.0625, 0.0)),
        (GraniteConfig(logits_scaling=8.0), LogitShape(0.125, 0.0)),
    ],
)
def test_logit_shapes_of_architectures(config: PreTrainedConfig, expected: LogitShape) -> None:
    assert LogitShape.of(config) == expected
    logits_NV = torch.linspace(-60, 60, 11)
    capped = logits_NV * expected.scale
    if expected.softcap:
        capped = expected.softcap * torch.tanh(capped / expected.softcap)
    torch.testing.assert_close(expected.apply(logits_NV), capped)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_positions", [100, 600])
def test_the_room_it_asks_for_is_what_it_takes(
    num_positions: int, dtype: torch.dtype, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = FrozenHead(torch.randn(3000, 64).bfloat16(), None)
    hidden_NH = torch.randn(num_positions, 64).to(dtype).requires_grad_()
    targets_N = torch.randint(0, 3000, (num_positions,))
    shape = LogitShape(1.0, softcap)

    def run() -> Tensor:
        return chunked_cross_entropy(hidden_NH, targets_N, head, shape, chunk_tokens=256)

    # Without oneDNN, whose scratch buffer is in the plan, not in what is asked for here.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    taken = allocated_by(run).peak_bytes
    assert 0.98 * taken <= largest_bytes(hidden_NH, head, shape, chunk_tokens=256) <= 1.02 * taken


@pytest.mark.parametrize("num_positions", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_fill_a_product_of_16_bits_change_nothing(num_positions: int, bias: bool) -> None:
    """As though the positions were filled up, by some that have a loss and a gradient of their own."""
    hidden_NH, targets_N, head = _inputs(num_positions, bias=bias)
    hidden_NH = hidden_NH.detach().bfloat16().requires_grad_()
    shape = LogitShape(2.0, 5.0)
    expected = _plain_loss(hidden_NH, targets_N, head, shape)
    found = chunked_cross_entropy(hidden_NH, targets_N, head, shape, chunk_tokens=128)
    (expected_grad_NH,), (found_grad_NH,) = (torch.autograd.grad(own, hidden_NH) for own in (expected, found))
    assert found_grad_NH.shape == hidden_NH.shape
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(found_grad_NH, expected_grad_NH, rtol=3e-2, atol=3e-2)
    whole_NH = torch.cat([hidden_NH.detach(), torch.ones(-num_positions % 64, NUM_HIDDEN).bfloat16()]).requires_grad_()
    more_N = torch.zeros(len(whole_NH) - num_positions, dtype=torch.int64)
    filled = chunked_cross_entropy(whole_NH, torch.cat([targets_N, more_N]), head, shape, chunk_tokens=128)
    (filled_grad_NH,) = torch.autograd.grad(filled, whole_NH)
    assert torch.equal(filled_grad_NH[:num_positions], found_grad_NH)
