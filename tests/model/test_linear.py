"""The NF4 linear with its adapter against the same formula on dense tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model import nf4
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_adapter import LoraAdapter, OfTokens
from qlora_trainer.model.random_draws import dropout_factors, token_keys
from tests.model.tiny_models import relative_error

NUM_TOKENS, NUM_IN, NUM_OUT, RANK = 12, 96, 64, 4
SCALE = 1.5
TOLERANCE = 1e-6


def _layer(*, bias: bool, adapter: bool = True, dropout: float = 0.0, dora: bool = False, seed: int = 0) -> NF4Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = nf4.quantize(torch.randn(NUM_OUT, NUM_IN, generator=generator), double_quant=True)
    layer = NF4Linear(weight, torch.randn(NUM_OUT, generator=generator) if bias else None)
    if adapter:
        layer.adapter = LoraAdapter(
            torch.randn(RANK, NUM_IN, generator=generator),
            torch.randn(NUM_OUT, RANK, generator=generator),
            scale=SCALE,
            dropout=dropout,
            layer_key=7,
            of_tokens=OfTokens(token_keys([11, 12], [5, NUM_TOKENS - 5])),
            magnitude_O=torch.rand(NUM_OUT, generator=generator) if dora else None,
        )
        if layer.adapter.norm_O is not None:
            layer.adapter.norm_O.uniform_(0.5, 2.0, generator=generator)
    return layer


def _dense(layer: NF4Linear, x_TI: Tensor) -> Tensor:
    """x W^T + bias + scale * drop(x) A^T B^T, by PyTorch alone."""
    out_TO = torch.nn.functional.linear(x_TI, nf4.dequantize(layer.weight, x_TI.dtype), layer.bias)
    adapter = layer.adapter
    if adapter is None:
        return out_TO
    factors_TI = adapter.draw_dropout(x_TI.shape[0], x_TI.dtype)
    dropped_TI = x_TI if factors_TI is None else x_TI * factors_TI
    return out_TO + adapter.scale * dropped_TI @ adapter.lora_A.t() @ adapter.lora_B.t()


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equals_the_dense_formula(bias: bool, adapter: bool, dropout: float) -> None:
    layer = _layer(bias=bias, adapter=adapter, dropout=dropout)
    x_TI = _x(NUM_TOKENS, NUM_IN)
    leaves = [x_TI, *(layer.adapter.parameters() if layer.adapter else ())]
    expected, found = _dense(layer, x_TI), layer(x_TI)
    assert relative_error(found.detach(), expected.detach()) <= TOLERANCE
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    found_grads = torch.autograd.grad(found, leaves, grad)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert relative_error(found_grad, expected_grad) <= TOLERANCE


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_small_changes(dropout: float, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(bias=True, dropout=dropout, dora=dora).double()
    assert layer.adapter is not None

    def run(*_inputs: Tensor) -> Tensor:
        x_TI = _inputs[0]
        out_TO: Tensor = layer(x_TI)
        return out_TO[:, :3]  # all outputs would take a minute

    # bitsandbytes unpacks to 16 and 32 bits only; the values of fp32 are exact in fp64.
    dense_OI = nf4.dequantize(_layer(bias=True).weight, torch.float32).double()

    def dequantize(_weight: nf4.NF4Weight, _dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Tensor:
        return dense_OI if row_scale_O is None else dense_OI * row_scale_O.unsqueeze(1)

    monkeypatch.setattr(nf4, "dequantize", dequantize)
    inputs = (_x(NUM_TOKENS, NUM_IN).detach().double().requires_grad_(), *layer.adapter.parameters())
    assert len(inputs) == (4 if dora else 3)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_leading_dimensions_are_kept() -> None:
    layer = _layer(bias=True)
    x_BTI = _x(3, 4, NUM_IN)
    assert layer(x_BTI).shape == (3, 4, NUM_OUT)
    assert torch.equal(layer(x_BTI).view(NUM_TOKENS, -1), layer(x_BTI.view(NUM_TOKENS, -1)))


def test_a_frozen_input_gets_no_gradient_and_no_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(bias=False)
    assert layer.adapter is not None
    out_TO = layer(_x(NUM_TOKENS, NUM_IN).detach())
    monkeypatch.delattr(nf4, "dequantize")  # backward would fail if it unpacked
    out_TO.sum().backward()
    assert layer.adapter.lora_A.grad is not None
    assert layer.adapter.lora_B.grad is not None


def test_nothing_dense_is_saved() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    layer = _layer(bias=True, dropout=0.5)
    x_TI = _x(NUM_TOKENS, NUM_IN)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x_TI).sum().backward()
    shapes = sorted(tuple(tensor.shape) for tensor in saved)
    assert shapes == [(NUM_TOKENS, RANK), (NUM_TOKENS, NUM_IN)]
    saved.clear()
    layer.adapter = None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x_TI).sum().backward()
    assert saved == []


def test_backward_reads_the_weight_that_is_there_by_then() -> None:
    # Where layers are streamed through one buffer, it is filled again before backward; a kept copy would be stale.
    layer, other = _layer(bias=False, adapter=False), _layer(bias=False, adapter=False, seed=1)
    x_TI = _x(NUM_TOKENS, NUM_IN)
    out_TO = layer(x_TI)
    for name, tensor in layer.named_buffers():
        tensor.copy_(other.get_buffer(name))
    (found_TI,) = torch.autograd.grad(out_TO.sum(), x_TI)
    (expected_TI,) = torch.autograd.grad(other(x_TI).sum(), x_TI)
    assert torch.equal(found_TI, expected_TI)


def test_bf16_adapters_give_fp32_gradients_where_asked() -> None:
    layer = _layer(bias=False).bfloat16()
    assert layer.adapter is not None
    for parameter in layer.adapter.parameters():
        parameter.grad_dtype = torch.float32
    layer(_x(NUM_TOKENS, NUM_IN).detach().bfloat16()).sum().backward()
    assert {parameter.grad.dtype for parameter in layer.adapter.parameters() if parameter.grad is not None} == {
        torch.float32
    }


def test_dropout_is_off_in_eval_mode_and_without_keys() -> None:
    layer = _layer(bias=False, dropout=0.5)
    assert layer.adapter is not None
    x_TI = _x(NUM_TOKENS, NUM_IN)
    dropped = layer(x_TI)
    without = _layer(bias=False)(x_TI)
    assert not torch.allclose(dropped, without)
    layer.eval()
    assert torch.equal(layer(x_TI), without)
    layer.train()
    layer.adapter.of_tokens.row_keys_T = None
    assert torch.equal(layer(x_TI), without)


def test_dropout_keys_of_another_row_are_refused() -> None:
    layer = _layer(bias=False, dropout=0.5)
    with pytest.raises(ValueError, match="12 dropout keys for 11 tokens"):
        layer(_x(NUM_TOKENS - 1, NUM_IN))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    factors_TI = dropout_factors(token_keys([5], [400]), 3, 500, 0.1, torch.float32)
    assert factors_TI.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert float((factors_TI == 0).float().mean()) == pytest.approx(0.1, abs=0.003)
    assert float(factors_TI.mean()) == pytest.approx(1.0, abs=0.003)


def test_it_asks_for_room_before_each_product() -> None:
    asked: list[int] = []

    class Asked(ResidentLimit):
        def make_room(self, num_bytes: int) -> None:
            asked.append(num_bytes)

    layer = _layer(bias=False)
    layer.resident_limit = Asked()
    out_TO = layer(_x(NUM_TOKENS, NUM_IN))
    assert len(asked) == 1
    out_TO.sum().backward()
    assert len(asked) == 2
    assert all(num_bytes > 4 * (NUM_IN * NUM_OUT + NUM_TOKENS * NUM_IN) for num_bytes in asked)
