"""LoRA adapters on a quantized model: which linears get one, how they start, and their names.

Legend: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.dora import set_row_norms_
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.random_draws import key32
from qlora_trainer.model.trained_tables import table_parameters, table_shapes, table_weights, train_tables
from qlora_trainer.model.trained_vectors import train_vectors, vector_parameters, vector_weights

MAGNITUDE = "lora_magnitude_vector"  # of DoRA, as PEFT calls it
BIAS_OF_B = "lora_B_bias"


def attach_new_adapters(model: QuantizedModel, settings: LoraSettings, *, dtype: torch.dtype, seed: int) -> None:
    """Give every target the adapter that training starts from, rounded to `dtype`; see `initial_weights`."""
    attach_adapters(model, settings, initial_weights(model, settings, seed=seed), dtype=dtype)


def initial_weights(model: QuantizedModel, settings: LoraSettings, *, seed: int) -> dict[str, Tensor]:
    """Fresh adapters: A uniform in +-1/sqrt(I) as in PEFT, B zero, so the model starts unchanged.

    Each A is drawn from (seed, its name) alone, in fp32. DoRA's magnitudes are the lengths that the rows have. Biases,
    norms and tables that are trained are what the model has.
    """
    weights = {}
    for name in settings.targets:
        linear = model.linears[name]
        generator = torch.Generator().manual_seed(key32(seed, "lora_A", name))
        bound = 1.0 / math.sqrt(linear.in_features)
        a_RI = torch.empty(settings.rank_of(name), linear.in_features).uniform_(-bound, bound, generator=generator)
        weights[f"{name}.lora_A"] = a_RI
        weights[f"{name}.lora_B"] = torch.zeros(linear.out_features, settings.rank_of(name))
        if settings.use_dora:
            magnitude_O = torch.empty(linear.out_features, dtype=torch.float32, device=model.device)
            set_row_norms_(magnitude_O, linear, of_zeros=0.0)
            weights[f"{name}.{MAGNITUDE}"] = magnitude_O
        if settings.lora_bias:
            weights[f"{name}.{BIAS_OF_B}"] = torch.zeros(linear.out_features)
    return weights | vector_weights(model, settings) | table_weights(model, settings)


def attach_adapters(
    model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> None:
    """Give every target an adapter with the given weights, in place of any it had; see `build_adapters`.

    Biases, norms and tables that are trained take the place of the base's, which are gone.
    """
    put_adapters(model, build_adapters(model, settings, weights, dtype=dtype))
    model.of_tokens.work_from(settings.invocation_tokens)
    train_vectors(model, settings, weights)
    train_tables(model, settings, weights, dtype=dtype)


def build_adapters(
    model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> dict[str, LoraAdapter]:
    """An adapter for every target, by the target's name; the model is left as it is.

    Args:
        model: whose linears they are for.
        settings: which linears, and the scale.
        weights: `{target}.lora_A` [R, I] and `{target}.lora_B` [O, R], with DoRA `{target}.lora_magnitude_vector` [O],
            with `lora_bias` `{target}.lora_B_bias` [O], and what else is trained (see `model.trained_vectors`,
            `model.trained_tables`); exactly these names. They are copied.
        dtype: what the matrices are held in; magnitudes and biases are fp32. Gradients are accumulated in fp32
            whatever it is.

    Raises:
        ConfigError: names or shapes differ from what the model and the settings ask for; the first five are named.
    """
    require_shapes(adapter_shapes(model, settings), weights)
    adapters = {}
    for name in settings.targets:
        a_RI, b_OR = (
            weights[f"{name}.{leaf}"].to(device=model.device, dtype=dtype, copy=True) for leaf in ("lora_A", "lora_B")
        )
        magnitude_O, bias_O = (
            weights[f"{name}.{leaf}"].to(device=model.device, dtype=torch.float32, copy=True) if is_there else None
            for leaf, is_there in ((MAGNITUDE, settings.use_dora), (BIAS_OF_B, settings.lora_bias))
        )
        adapters[name] = LoraAdapter(
            a_RI,
            b_OR,
            scale=settings.scale_of(name),
            dropout=settings.dropout,
            layer_key=key32("dropout", name),
            of_tokens=model.of_tokens,
            magnitude_O=magnitude_O,
            lora_B_bias_O=bias_O,
        )
        norm_O = adapters[name].norm_O
        if norm_O is not None:
            set_row_norms_(norm_O, model.linears[name], a_RI, b_OR, settings.scale_of(name))
        for parameter in adapters[name].parameters():
            parameter.grad_dtype = torch.float32
    return adapters


def put_adapters(model: QuantizedModel, adapters: Mapping[str, LoraAdapter]) -> None:
    """Set these adapters onto the linears they are named by, in place of any there were; no weight is copied."""
    is_training = model.module.training
    for name, linear in model.linears.items():
        adapter = adapters.get(name)
        if linear.adapter is not adapter:  # looked at first: setting a module's attribute takes five times longer
            linear.adapter = adapter
        if adapter is not None and adapter.training != is_training:
            adapter.train(is_training)


def detach_adapters(model: QuantizedModel) -> None:
    """Leave the base alone, without any adapter."""
    for linear in model.linears.values():
        linear.adapter = None


def trainable_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """`{target}.lora_A`, `{target}.lora_B`, and `{target}.lora_magnitude_vector` or `{target}.lora_B_bias` where there
    are such, in model order.

    Behind them the biases and norms that are trained, then the tables that are trained whole.
    """
    low_rank = {
        f"{name}.{leaf}": parameter
        for name, linear in model.linears.items()
        if linear.adapter is not None
        for leaf, parameter in linear.adapter.named_parameters()
    }
    return low_rank | vector_parameters(model) | table_parameters(model)


def adapter_shapes(model: QuantizedModel, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that `settings` ask for on this base, in the order of `trainable_parameters`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in model.linears.items():
        if name in settings.targets:
            rank = settings.rank_of(name)
            shapes[f"{name}.lora_A"] = (rank, linear.in_features)
            shapes[f"{name}.lora_B"] = (linear.out_features, rank)
            if settings.use_dora:
                shapes[f"{name}.{MAGNITUDE}"] = (linear.out_features,)
            if settings.lora_bias:
                shapes[f"{name}.{BIAS_OF_B}"] = (linear.out_features,)
    vectors = {name: tuple(own.shape) for name, own in vector_weights(model, settings).items()}
    return shapes | vectors | table_shapes(model, settings)


def require_shapes(
    expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], *, where: str = "adapter"
) -> None:
    """Refuse an adapter that does not fit its base.

    Args:
        expected: name -> shape of all that an adapter of this kind has on this base.
        weights: what it has.
        where: what to call it in an error.

    Raises:
        ConfigError: names or shapes differ; the first five are named.
    """
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differences = [
        f"{name}: adapter {found.get(name, 'has none')}, base {expected.get(name, 'has none')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:5])
        raise ConfigError(
            where=where,
            found=f"{len(differences)} weights that do not fit the base ({shown})",
            expected="an adapter of this base, with the same names and shapes",
            fix="Use the base that the adapter was trained on.",
        )
