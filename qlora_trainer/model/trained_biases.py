"""Biases of linears that are trained: put onto a model in the place of the frozen ones, as its parameters, in fp32.

An adapter of PEFT's `bias: lora_only` has those of its targets, one of `all` those of the other linears, too.

Legend: O out_features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel


def biased_linears(model: QuantizedModel) -> tuple[str, ...]:
    """Full names of the linears that have a bias, in model order."""
    return tuple(name for name, linear in model.linears.items() if linear.bias is not None)


def bias_weights(model: QuantizedModel, settings: LoraSettings) -> dict[str, Tensor]:
    """`{linear}.bias` [O] of those in `settings.biases`, as they are now: the base's, until they are trained."""
    found = {}
    for name in settings.biases:
        linear = model.linears.get(name)
        if linear is not None and linear.bias is not None:
            found[f"{name}.bias"] = linear.bias.detach()
    return found


def train_biases(model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]) -> None:
    """Put a copy of each bias that `settings` name in the place of the frozen one, to be trained.

    Args:
        model: whose biases they are; what is replaced is gone.
        settings: which.
        weights: `{linear}.bias` [O] of each; other names are passed over.
    """
    for name in settings.biases:
        given_O = weights[f"{name}.bias"]
        parameter = nn.Parameter(given_O.to(device=model.device, dtype=torch.float32, copy=True))
        parameter.grad_dtype = torch.float32
        linear = model.linears[name]
        del linear.bias
        linear.register_parameter("bias", parameter)


def bias_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """`{linear}.bias` of all that are trained, in model order."""
    return {
        f"{name}.bias": linear.trained_bias for name, linear in model.linears.items() if linear.trained_bias is not None
    }


def held_biases(
    model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """(linear, "bias") -> a copy of each bias that an adapter has in the place of the base's, in the dtype it is in."""
    return {(name, "bias"): weights[f"{name}.bias"].to(device=model.device, copy=True) for name in settings.biases}
