"""LoRA adapters on a quantized model: which linears get one, how they start, and their names.

Legend: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.random_draws import key32

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What a LoRA adapter is, apart from its weights.

    Attributes:
        rank: inner dimension R.
        alpha: the update is scaled by alpha / rank (Hu et al., 2021).
        dropout: probability on the input of the low-rank path, in training.
        targets: full names of the linears that carry an adapter, in model order.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def select_targets(linear_names: Sequence[str], target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """The linears that `target_modules` means, by PEFT's rules.

    Args:
        linear_names: full names of every linear but the head.
        target_modules: `all-linear`; a regular expression that a full name must match as a whole; or a list of names,
            each a full name or the end of one after a dot.

    Raises:
        ConfigError: no linear is meant, an entry of the list means none, or the expression is broken.
    """
    if target_modules == ALL_LINEAR:
        return tuple(linear_names)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear_names}))
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise _wrong_targets(f"{target_modules!r}, a broken regular expression ({error})", leaves) from error
        chosen = tuple(name for name in linear_names if pattern.fullmatch(name))
        if not chosen:
            raise _wrong_targets(f"{target_modules!r}, which matches no linear", leaves)
        return chosen
    for entry in target_modules:
        if not any(_is_meant(name, entry) for name in linear_names):
            raise _wrong_targets(f"{entry!r}, which names no linear", leaves)
    return tuple(name for name in linear_names if any(_is_meant(name, entry) for entry in target_modules))


def attach_new_adapters(model: QuantizedModel, settings: LoraSettings, *, dtype: torch.dtype, seed: int) -> None:
    """Give every target the adapter that training starts from, rounded to `dtype`; see `initial_weights`."""
    attach_adapters(model, settings, initial_weights(model, settings, seed=seed), dtype=dtype)


def initial_weights(model: QuantizedModel, settings: LoraSettings, *, seed: int) -> dict[str, Tensor]:
    """Fresh adapters: A uniform in +-1/sqrt(I) as in PEFT, B zero, so the model starts unchanged.

    Each A is drawn from (seed, its name) alone, in fp32.
    """
    weights = {}
    for name in settings.targets:
        linear = model.linears[name]
        generator = torch.Generator().manual_seed(key32(seed, "lora_A", name))
        bound = 1.0 / math.sqrt(linear.in_features)
        a_RI = torch.empty(settings.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        weights[f"{name}.lora_A"] = a_RI
        weights[f"{name}.lora_B"] = torch.zeros(linear.out_features, settings.rank)
    return weights


def attach_adapters(
    model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> None:
    """Give every target an adapter with the given weights, in place of any it had.

    Args:
        model: whose linears get the adapters.
        settings: which linears, and the scale.
        weights: `{target}.lora_A` [R, I] and `{target}.lora_B` [O, R]; exactly these names.
        dtype: what the adapter is held in. Gradients are accumulated in fp32 whatever it is.

    Raises:
        ConfigError: names or shapes differ from what the model and the settings ask for; the first five are named.
    """
    _require_fit(model, settings, weights)
    detach_adapters(model)
    for name in settings.targets:
        a_RI, b_OR = (
            weights[f"{name}.{leaf}"].to(device=model.device, dtype=dtype, copy=True) for leaf in ("lora_A", "lora_B")
        )
        adapter = LoraAdapter(
            a_RI,
            b_OR,
            scale=settings.scale,
            dropout=settings.dropout,
            layer_key=key32("dropout", name),
            keys=model.dropout_keys,
        )
        for parameter in adapter.parameters():
            parameter.grad_dtype = torch.float32
        adapter.train(model.module.training)
        model.linears[name].adapter = adapter


def detach_adapters(model: QuantizedModel) -> None:
    """Leave the base alone, without any adapter."""
    for linear in model.linears.values():
        linear.adapter = None


def trainable_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """`{target}.lora_A` and `{target}.lora_B` of every adapter, in model order."""
    return {
        f"{name}.{leaf}": parameter
        for name, linear in model.linears.items()
        if linear.adapter is not None
        for leaf, parameter in linear.adapter.named_parameters()
    }


def _is_meant(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _require_fit(model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name in settings.targets:
        linear = model.linears.get(name)
        if linear is not None:
            expected[f"{name}.lora_A"] = (settings.rank, linear.in_features)
            expected[f"{name}.lora_B"] = (linear.out_features, settings.rank)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differences = [
        f"{name}: adapter {found.get(name, 'has none')}, base {expected.get(name, 'has none')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:5])
        raise ConfigError(
            where="adapter",
            found=f"{len(differences)} weights that do not fit the base ({shown})",
            expected="an adapter of this base, with the same names and shapes",
            fix="Use the base that the adapter was trained on.",
        )


def _wrong_targets(found: str, leaves: str) -> ConfigError:
    return ConfigError(
        where="lora.target_modules",
        found=found,
        expected=f"{ALL_LINEAR!r}, a regular expression, or a list out of: {leaves}",
        fix="Correct lora.target_modules.",
    )
