"""NF4 and the LoRA linear on a device, against a table and plain products in fp32.

Legend: O out_features, I in_features, N elements, B blocks of 64, R rank, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.device import DTYPES
from qlora_trainer.model import nf4
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.run.self_test.check import Check, attempted, judged, within

# Dettmers et al., QLoRA (2023), appendix E.
REFERENCE_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_TIE = 1e-6  # by which a level may be further away than the nearest: libraries divide by a scale in different ways
_FP32_ERROR = 1e-6
_LINEAR_ERRORS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # two and four times what rounding alone gives
_OUT, _IN, _RANK, _TOKENS = 192, 320, 8, 96  # whole blocks of 64, not a power of two
_SCALE = 1.5  # no power of two, by which nothing would be rounded


def numeric_checks(device: torch.device, dtype_name: str) -> Iterator[Check]:
    """Levels, quantization, dequantization and a linear with an adapter, in the dtype that training takes here."""
    dtype = DTYPES[dtype_name]
    yield from attempted("NF4 levels", lambda: _levels(device))
    yield from attempted("NF4 quantize", lambda: _quantize(device))
    for double_quant in (False, True):
        name = f"NF4 dequantize{', double quantization' * double_quant}"
        yield from attempted(name, lambda name=name, nested=double_quant: _dequantize(name, device, dtype, nested))  # type: ignore[misc]
    limit = _LINEAR_ERRORS[dtype_name]
    yield from attempted("LoRA linear", lambda: within("LoRA linear", _linear_error(device, dtype), limit))


def _levels(device: torch.device) -> Check:
    error = float((nf4.nf4_code(device).cpu() - torch.tensor(REFERENCE_LEVELS)).abs().max())
    return judged("NF4 levels", is_right=error == 0.0, found=f"off by {error:.1e}", expected="the paper's table")


def _quantize(device: torch.device) -> Check:
    """Each weight became the nearest level of its block's largest weight."""
    weight_OI = _normal(_OUT, _IN)
    quantized = nf4.quantize(weight_OI.to(device), double_quant=False)
    scale_B = weight_OI.view(-1, nf4.BLOCKSIZE).abs().amax(1)
    is_scale_right = torch.equal(quantized.absmax.cpu(), scale_B)
    levels_16 = torch.tensor(REFERENCE_LEVELS)
    distance_N16 = (weight_OI.view(-1, nf4.BLOCKSIZE) / scale_B.unsqueeze(1)).view(-1, 1).sub(levels_16).abs_()
    chosen_N = _level_numbers(quantized)
    excess = distance_N16.gather(1, chosen_N.unsqueeze(1)).squeeze(1) - distance_N16.amin(1)
    num_wrong = int((excess > _TIE).sum())
    found = f"{num_wrong} of {chosen_N.numel()} wrong, scales {'equal' if is_scale_right else 'differ'}"
    is_right = is_scale_right and num_wrong == 0
    return judged("NF4 quantize", is_right=is_right, found=found, expected="the nearest level, equal scales")


def _dequantize(name: str, device: torch.device, dtype: torch.dtype, double_quant: bool) -> Check:
    """Levels times scales, worked out here from the packed bytes; then rounded once, whatever the dtype."""
    quantized = nf4.quantize(_normal(_OUT, _IN).to(device), double_quant=double_quant)
    reference_OI = reference_weight(quantized)
    error = _relative_error(nf4.dequantize(quantized, torch.float32), reference_OI)
    rounded_OI = nf4.dequantize(quantized, dtype).float().cpu()
    step = torch.finfo(dtype).eps
    is_rounded_once = bool(((rounded_OI - reference_OI).abs() <= step * reference_OI.abs() + 1e-8).all())
    found = f"error {error:.1e}, {'rounded once' if is_rounded_once else 'rounded wrongly'}"
    return judged(
        name, is_right=error <= _FP32_ERROR and is_rounded_once, found=found, expected=f"at most {_FP32_ERROR:.0e}"
    )


def _linear_error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of the output and of the gradients of input, A and B."""
    quantized = nf4.quantize(_normal(_OUT, _IN, scale=_IN**-0.5).to(device), double_quant=True)
    a_RI, b_OR = _normal(_RANK, _IN, scale=_IN**-0.5), _normal(_OUT, _RANK, scale=0.1)
    x_TI, grad_TO = _normal(_TOKENS, _IN), _normal(_TOKENS, _OUT)
    a_RI, b_OR, x_TI, grad_TO = (tensor.to(dtype).float() for tensor in (a_RI, b_OR, x_TI, grad_TO))
    linear = NF4Linear(quantized, None)
    adapter = LoraAdapter(a_RI.to(device), b_OR.to(device), scale=_SCALE)
    linear.adapter = adapter
    own_x_TI = x_TI.to(device, dtype, copy=True).requires_grad_()
    out_TO = linear(own_x_TI)
    out_TO.backward(grad_TO.to(device, dtype))
    assert own_x_TI.grad is not None
    assert adapter.lora_A.grad is not None
    assert adapter.lora_B.grad is not None
    found = [out_TO.detach(), own_x_TI.grad, adapter.lora_A.grad, adapter.lora_B.grad]
    leaves = [tensor.clone().requires_grad_() for tensor in (x_TI, a_RI, b_OR)]
    plain_TO = (
        nn.functional.linear(leaves[0], reference_weight(quantized))
        + _SCALE * leaves[0] @ leaves[1].t() @ leaves[2].t()
    )
    expected = [plain_TO.detach(), *torch.autograd.grad(plain_TO, leaves, grad_TO)]
    return max(_relative_error(*pair) for pair in zip(found, expected, strict=True))


def reference_weight(quantized: nf4.NF4Weight) -> Tensor:
    """What packed bytes mean, fp32 [O, I] on the host, by the table alone."""
    scale_B = quantized.absmax.cpu()
    if quantized.nested_absmax is not None and quantized.offset is not None and quantized.code is not None:
        nested_scale_B = quantized.nested_absmax.cpu().repeat_interleave(nf4.NESTED_BLOCKSIZE)[: scale_B.numel()]
        scale_B = quantized.code.cpu()[scale_B.long()] * nested_scale_B + quantized.offset.cpu()
    levels_N = torch.tensor(REFERENCE_LEVELS)[_level_numbers(quantized)]
    return (levels_N.view(-1, nf4.BLOCKSIZE) * scale_B.unsqueeze(1)).view(quantized.shape)


def _level_numbers(quantized: nf4.NF4Weight) -> Tensor:
    """Two a byte, the first in its upper half."""
    packed = quantized.packed.cpu().view(-1).long()
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: math.prod(quantized.shape)]


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    # Its own generator: an examination leaves the global one alone.
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.detach().float().cpu() - expected)
    return float(difference / torch.linalg.vector_norm(expected))
