"""Biases of the base that are trained: put onto a model in the place of the frozen ones, as its parameters, in fp32.

An adapter of PEFT's `bias: lora_only` has those of its targets, one of `all` those of the other linears, of norms and
of the head, too. That of the head belongs to its table (`model.trained_tables`).

Legend: O out_features of a linear, H hidden size of a norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_biases import in_order
from qlora_trainer.model.biased_norm import BiasedNorm
from qlora_trainer.model.final_norm import FinalNorm
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel

_TRAINABLE = (nn.Linear, nn.LayerNorm, NF4Linear, BiasedNorm, FrozenHead)


def biased_modules(model: QuantizedModel) -> tuple[str, ...]:
    """Full names of all modules that have a bias: linears in model order, others by name, the head last."""
    found = [name for name, part in model.module.named_modules() if _has_bias(part)]
    head = next(name for name, part in model.module.named_modules() if part is model.head)
    return in_order(found, list(model.linears), head)


def require_trainable_biases(module: PreTrainedModel, settings: LoraSettings) -> None:
    """Refuse a bias of a module of a class that computes with it in a way of its own.

    Args:
        module: a skeleton, or a model.
        settings: of which `biases` are looked at; a name that is no module's is passed over.

    Raises:
        ConfigError: names the first such module.
    """
    parts = dict(module.named_modules())
    for name in settings.biases:
        if name in parts and _has_bias(parts[name]) and _class_of(parts[name]) not in _TRAINABLE:
            raise ConfigError(
                where="trained biases",
                found=f"that of {name}, a {_class_of(parts[name]).__name__}",
                expected="biases of linears and of nn.LayerNorm, which are what can be trained",
                fix="An adapter that has trained it is merged with PEFT (merge_and_unload), and that taken as the "
                "base; a new run has lora.bias at none or lora_only.",
            )


def bias_weights(model: QuantizedModel, settings: LoraSettings) -> dict[str, Tensor]:
    """`{module}.bias` of those in `settings.biases`, as they are now: the base's, until they are trained.

    A head's is not among them.
    """
    parts = _chosen(model, settings)
    return {f"{name}.bias": part.bias.detach() for name, part in parts.items() if part.bias is not None}


def train_biases(model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]) -> None:
    """Put a copy of each bias that `settings` name in the place of the frozen one, to be trained.

    Args:
        model: whose biases they are; what is replaced is gone.
        settings: which; a head's is passed over.
        weights: `{module}.bias` of each; other names are passed over.
    """
    for name, part in _chosen(model, settings).items():
        parameter = nn.Parameter(weights[f"{name}.bias"].to(device=model.device, dtype=torch.float32, copy=True))
        parameter.grad_dtype = torch.float32
        if isinstance(part, NF4Linear):
            del part.bias
            part.register_parameter("bias", parameter)
        else:
            part.hold_bias(parameter)


def bias_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """`{module}.bias` of all that are trained, linears first, but for a head's."""
    return {
        f"{name}.bias": part.bias
        for name, part in _holders(model).items()
        if isinstance(part.bias, nn.Parameter) and part.bias.requires_grad
    }


def held_biases(
    model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """(module, "bias") -> a copy of each bias that an adapter has in the place of the base's, but for a head's.

    Those of linears are in the dtype that they are in, those of norms in the compute dtype.
    """
    held = {}
    for name, part in _chosen(model, settings).items():
        dtype = None if isinstance(part, NF4Linear) else model.compute_dtype
        own = weights[f"{name}.bias"].to(device=model.device, dtype=dtype, copy=True)
        held[name, "bias"] = own if isinstance(part, NF4Linear) else nn.Parameter(own, requires_grad=False)
    return held


def _chosen(model: QuantizedModel, settings: LoraSettings) -> dict[str, NF4Linear | BiasedNorm | FinalNorm]:
    holders = _holders(model)
    return {name: holders[name] for name in settings.biases if name in holders}


def _holders(model: QuantizedModel) -> dict[str, NF4Linear | BiasedNorm | FinalNorm]:
    return {**model.linears, **model.biased_norms}


def _class_of(part: nn.Module) -> type[nn.Module]:
    return type(part.norm if isinstance(part, FinalNorm) else part)


def _has_bias(part: nn.Module) -> bool:
    return isinstance(getattr(part, "bias", None), Tensor)
