"""Biases of B (PEFT's `lora_bias`) in a merged model: a linear that has no bias in the base needs one there.

Whether it may have one, the architecture's config says, or cannot say: `attention_bias` and `mlp_bias` of Llama, say.
Such a field gives a bias to each linear that it means; those that the adapter has none for get zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_fit import modules_with_bias
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.skeleton import Parts, build_skeleton, find_parts


def added_bias_fields(
    config: PreTrainedConfig, parts: Parts, settings: LoraSettings, *, where: Path
) -> dict[str, bool]:
    """The fields of `config.json` that give every target with a bias of B a bias of its own; empty for none.

    Args:
        config: of the base.
        parts: of the base.
        settings: of the adapter.
        where: its folder, for the error.

    Raises:
        ConfigError: no field gives one to some of them.
    """
    missing = set(settings.targets) - set(modules_with_bias(parts)) if settings.lora_bias else set()
    fields: dict[str, bool] = {}
    for name in _switches(config) if missing else ():
        given = set(
            modules_with_bias(find_parts(build_skeleton(with_fields(config, {name: True}), with_buffers=False)))
        )
        if given & missing:
            fields[name] = True
            missing -= given
    if missing:
        raise ConfigError(
            where=str(where),
            found=f"{len(missing)} biases of B (lora_bias) on linears that cannot have one in a model of type "
            f"{config.model_type!r}, such as {min(missing)}",
            expected="an adapter whose sum with its base the architecture has a place for",
            fix="Use it beside its base, here or with PEFT, which cannot merge it either; or train without lora_bias.",
        )
    return fields


def with_fields(config: PreTrainedConfig, fields: dict[str, bool]) -> PreTrainedConfig:
    """A copy of the config with these fields set."""
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _switches(config: PreTrainedConfig) -> Sequence[str]:
    """Its fields that are off, and whose names say that they are about biases."""
    return [name for name, value in config.to_dict().items() if "bias" in name and value is False]
