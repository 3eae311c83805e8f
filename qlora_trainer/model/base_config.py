"""A base's config.json: read by transformers, with the sizes of a model that could be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qlora_trainer.config.strict_json import read_capped
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.skeleton import TRANSFORMERS_ERRORS, reason_of, without_warnings

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# No model has more; a copy of two layers and few heads is run, and each layer is looked at, before anything is planned.
_MOST_LAYERS, _MOST_HEAD_DIM = 1_024, 4_096


def read_config(folder: Path) -> PreTrainedConfig:
    """The transformers config of a folder; remote code is never run.

    Raises:
        ConfigError: it is missing, broken, without the model's sizes or with impossible ones, or of a type that
            transformers does not have.
    """
    path = folder / "config.json"
    try:
        text = read_capped(path)  # a few kB; what is larger than the cap is never parsed
        with without_warnings():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *TRANSFORMERS_ERRORS) as error:
        raise ConfigError(
            where=str(path),
            found=f"no config that transformers can read ({reason_of(error)})",
            expected="the config.json of a model type that transformers has",
            fix="Point model.base at a transformers folder; remote code is never run.",
        ) from error
    given = json.loads(text)
    if "text_config" not in given:  # its text part may leave out what it has by default
        _require_sizes(path, given, config)
    return config


def _require_sizes(path: Path, given: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """transformers fills what is missing with the sizes of some model, which would then be planned for."""
    names = [name for name in _SIZES if getattr(config, name, None) is not None]
    missing = [name for name in names if name not in given and config.attribute_map.get(name) not in given]
    if missing:
        raise _wrong(path, f"no {', '.join(missing)}", f"the sizes of the model: {', '.join(names)}")
    sizes = {name: size for name in names if isinstance(size := getattr(config, name), int)}
    for name, size in sizes.items():
        if size < 1:
            raise _wrong(path, f"{name} {size}", "at least 1")
    num_layers, num_heads = sizes.get("num_hidden_layers", 1), sizes.get("num_attention_heads", 1)
    if num_layers > _MOST_LAYERS:
        raise _wrong(path, f"num_hidden_layers {num_layers:,}", f"at most {_MOST_LAYERS:,}")
    num_kv_heads = getattr(config, "num_key_value_heads", None)
    if isinstance(num_kv_heads, int) and (num_kv_heads < 1 or num_heads % num_kv_heads):
        found = f"num_attention_heads {num_heads} that share num_key_value_heads {num_kv_heads}"
        raise _wrong(path, found, "as many for each of those")
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim if isinstance(head_dim, int) else sizes.get("hidden_size", 1) // num_heads
    if not 0 < head_dim <= _MOST_HEAD_DIM:
        raise _wrong(path, f"heads of {head_dim:,} numbers each", f"1 to {_MOST_HEAD_DIM:,}")


def _wrong(path: Path, found: str, expected: str) -> ConfigError:
    return ConfigError(where=str(path), found=found, expected=expected, fix="Copy the config.json of the base whole.")
