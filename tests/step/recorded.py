"""Small adapter parameters, gradients that depend on the step alone, and our optimizer driven by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings

# The first two do not fill their last block of 256 elements.
SHAPES = {"q.lora_A": (4, 300), "q.lora_B": (257, 4), "up.lora_A": (16, 512), "up.lora_B": (512, 16)}


def make_parameters(dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    """Parameters as `attach_adapters` makes them, with the same values at every call (rounded to `dtype`)."""
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        value = 0.05 * torch.randn(shape, generator=generator)
        parameters[name] = nn.Parameter(value.bfloat16().to(dtype))
        parameters[name].grad_dtype = torch.float32
    return parameters


def recorded_gradients(step: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """fp32 gradients of optimizer step `step`: one direction that lasts, and noise of the same size."""
    lasting, noise = torch.Generator().manual_seed(999), torch.Generator().manual_seed(step)
    return {
        name: 1e-3 * (torch.randn(shape, generator=lasting) + torch.randn(shape, generator=noise))
        for name, shape in shapes.items()
    }


def make_settings(**changes: Any) -> OptimizerSettings:
    """32 bits, resident, no decay, but for `changes`."""
    plain: dict[str, Any] = {"bits": 32, "residency": "device", "weight_decay": 0.0, "paging_folder": Path("nowhere")}
    return OptimizerSettings(**(plain | changes))


def run_steps(
    optimizer: AdapterOptimizer, parameters: Mapping[str, nn.Parameter], steps: Iterable[int], learning_rate: float
) -> None:
    """Update with the recorded gradients of `steps`."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for step in steps:
        for name, gradient in recorded_gradients(step, shapes).items():
            accumulated = parameters[name].grad
            assert accumulated is not None
            accumulated.copy_(gradient)
        optimizer.update(learning_rate)


def copied_state(optimizer: AdapterOptimizer) -> dict[str, Tensor]:
    """The state dict, detached from the optimizer's buffers."""
    return {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit, or that only one side has."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or not same_bits(found[name], expected[name])
    )


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal in dtype, shape and every bit: -0.0 is not 0.0, and a NaN equals itself."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected))
    return torch.equal(left, right)
