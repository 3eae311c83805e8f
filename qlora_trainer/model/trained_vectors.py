"""Biases and norms of the base that are trained: put onto a model in the place of the frozen ones, as its parameters,
in fp32.

An adapter of PEFT's `bias: lora_only` has the biases of its targets, one of `all` those of the other linears, of norms
and of the head, too; a norm in its `modules_to_save` is trained whole. The bias of a head belongs to its table
(`model.trained_tables`).

Legend: O out_features of a linear, H width of what a norm norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_biases import in_order
from qlora_trainer.model.final_norm import FinalNorm
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.trainable_norm import TrainableNorm, is_norm

_LEAVES = ("weight", "bias")
_Holder = NF4Linear | TrainableNorm | FinalNorm


def biased_modules(model: QuantizedModel) -> tuple[str, ...]:
    """Full names of all modules that have a bias: linears in model order, others by name, the head last."""
    found = [name for name, part in model.module.named_modules() if _has(part, "bias")]
    head = next(name for name, part in model.module.named_modules() if part is model.head)
    return in_order(found, list(model.linears), head)


def require_trainable_biases(module: PreTrainedModel, settings: LoraSettings) -> None:
    """Refuse a bias of a module that is neither a linear nor a norm, and computes with it in a way of its own.

    Args:
        module: a skeleton, or a model.
        settings: of which `biases` are looked at; a name that is no module's is passed over.

    Raises:
        ConfigError: names the first such module.
    """
    parts = dict(module.named_modules())
    for name in settings.biases:
        if name not in parts or not _has(parts[name], "bias"):
            continue
        if not (isinstance(parts[name], nn.Linear | NF4Linear | FrozenHead) or is_norm(parts[name])):
            raise ConfigError(
                where="trained biases",
                found=f"that of {name}, a {type(parts[name]).__name__}",
                expected="biases of linears and of norms, which are what can be trained",
                fix="An adapter that has trained it is merged with PEFT (merge_and_unload), and that taken as the "
                "base; a new run has lora.bias at none or lora_only.",
            )


def vector_weights(model: QuantizedModel, settings: LoraSettings) -> dict[str, Tensor]:
    """`{module}.bias` of those in `settings.biases`, and `{norm}.weight` and `{norm}.bias` of those in
    `settings.norms`, as they are now: the base's, until they are trained.

    A head's is not among them.
    """
    return {f"{name}.{leaf}": getattr(part, leaf).detach() for name, leaf, part in _chosen(model, settings)}


def train_vectors(model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]) -> None:
    """Put a copy of each bias and norm that `settings` name in the place of the frozen one, to be trained.

    Args:
        model: whose they are; what is replaced is gone.
        settings: which; a head's is passed over.
        weights: of each, under the names of `vector_weights`; other names are passed over.
    """
    for name, leaf, part in list(_chosen(model, settings)):
        parameter = nn.Parameter(weights[f"{name}.{leaf}"].to(device=model.device, dtype=torch.float32, copy=True))
        parameter.grad_dtype = torch.float32
        if isinstance(part, NF4Linear):
            del part.bias
            part.register_parameter("bias", parameter)
        else:
            part.hold(leaf, parameter)


def vector_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """Those that are trained, under the names of `vector_weights`, linears first."""
    return {
        f"{name}.{leaf}": parameter
        for name, part in _holders(model).items()
        for leaf in _LEAVES
        if isinstance(parameter := part._parameters.get(leaf), nn.Parameter) and parameter.requires_grad
    }


def held_vectors(
    model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """(module, leaf) -> a copy of each bias and norm that an adapter has in the place of the base's.

    Biases of linears are in the dtype that they are in, what norms have in the compute dtype. A head's is passed over.
    """
    held = {}
    for name, leaf, part in _chosen(model, settings):
        dtype = None if isinstance(part, NF4Linear) else model.compute_dtype
        own = weights[f"{name}.{leaf}"].to(device=model.device, dtype=dtype, copy=True)
        held[name, leaf] = own if isinstance(part, NF4Linear) else nn.Parameter(own, requires_grad=False)
    return held


def _chosen(model: QuantizedModel, settings: LoraSettings) -> Iterator[tuple[str, str, _Holder]]:
    """Module, leaf and the module itself, of all that is trained and there."""
    holders = _holders(model)
    for name in settings.biases:
        if name in holders and _has(holders[name], "bias"):
            yield name, "bias", holders[name]
    for name in settings.norms:
        if name in holders:
            for leaf in _LEAVES:
                if _has(holders[name], leaf):
                    yield name, leaf, holders[name]


def _holders(model: QuantizedModel) -> dict[str, _Holder]:
    return {**model.linears, **model.norms}


def _has(part: nn.Module, leaf: str) -> bool:
    return isinstance(getattr(part, leaf, None), Tensor)
