"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, which PEFT, vLLM and llama.cpp read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE
from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapters import LoraSettings, select_targets
from qlora_trainer.model.safetensors_header import require_sane_header

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
# Fields of adapter_config.json that change the result; anything but these values is refused, never ignored.
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "alora_invocation_tokens": (None,),
    "alpha_pattern": ({}, None),
    "arrow_config": (None,),
    "bias": ("none",),
    "exclude_modules": (None, []),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others have changed the base itself
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "rank_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_rslora": (False,),
}


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter read from disk.

    Attributes:
        base_name: what the base is called in the adapter's config.
        revision: the base's hub revision, or None.
        settings: with targets resolved against the linears of a base.
        weights: `{target}.lora_A` and `{target}.lora_B`.
    """

    base_name: str
    revision: str | None
    settings: LoraSettings
    weights: dict[str, Tensor]


def adapter_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `adapter_model.safetensors` holds, by PEFT's names.

    Args:
        weights: `{target}.lora_A` [R, I] and `{target}.lora_B` [O, R].
    """
    return {f"{_PREFIX}{name}.weight": tensor for name, tensor in weights.items()}


def adapter_config(
    settings: LoraSettings, *, linear_names: Sequence[str], base_name: str, revision: str | None
) -> bytes:
    """The file `adapter_config.json`.

    Args:
        settings: rank, alpha, dropout, targets.
        linear_names: every linear of the base, to write targets as short names where that means the same.
        base_name, revision: what to call the base.
    """
    # Only the classic fields: older PEFT versions fail on ones they do not know.
    fields = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": revision,
        "target_modules": short_target_modules(settings.targets, linear_names),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        "use_dora": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def short_target_modules(targets: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """Last parts of the names (`q_proj`) where every linear so called is a target, else full names."""
    chosen = set(targets)
    short = set()
    for name in targets:
        leaf = name.rpartition(".")[2]
        namesakes = {other for other in linear_names if other == leaf or other.endswith("." + leaf)}
        short.add(leaf if namesakes <= chosen else name)
    return sorted(short)


def read_adapter_fields(folder: Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of a plain LoRA adapter.

    Raises:
        ConfigError: no adapter here, only a pickled one, or a variant that this version does not compute.
    """
    path = folder / ADAPTER_CONFIG_FILE
    pickled = [name for name in _PICKLES if (folder / name).exists()]
    if not (folder / WEIGHTS_FILE).is_file():
        found = f"only {pickled[0]}, a pickle, which is never read" if pickled else f"no {WEIGHTS_FILE}"
        raise _wrong_adapter(folder, found, f"an adapter folder with {ADAPTER_CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        fields = decode(read_capped(path))
        rank, alpha, targets = fields["r"], fields["lora_alpha"], fields["target_modules"]
        dropout = fields.get("lora_dropout", 0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _wrong_adapter(path, f"no adapter config ({type(error).__name__}: {error})", "PEFT's JSON") from error
    if not (type(rank) is int and rank > 0 and type(alpha) in (int, float) and type(dropout) in (int, float)):
        found = f"r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}"
        raise _wrong_adapter(path, found, "a positive whole number and two numbers")
    if not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(name, str) for name in targets))):
        raise _wrong_adapter(path, f"target_modules = {targets!r}", "a list of names or a regular expression")
    for name, allowed in _PLAIN_LORA.items():
        if name in fields and fields[name] not in allowed:
            raise _wrong_adapter(path, f"{name} = {fields[name]!r}", f"{allowed[0]!r} (plain LoRA)")
    return dict(fields)


def read_adapter_folder(folder: Path, *, linear_names: Sequence[str]) -> AdapterFolder:
    """Read a plain LoRA adapter; targets are resolved against `linear_names`, the linears of its base.

    Raises:
        ConfigError: see `read_adapter_fields`; or the weights file is broken or not safetensors.
    """
    fields = read_adapter_fields(folder)
    try:
        require_sane_header(folder / WEIGHTS_FILE)
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError, OSError) as error:
        raise _wrong_adapter(folder / WEIGHTS_FILE, f"no safetensors file ({error})", "safetensors") from error
    settings = LoraSettings(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields.get("lora_dropout", 0.0),
        targets=select_targets(linear_names, fields["target_modules"]),
    )
    weights = {name.removeprefix(_PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    return AdapterFolder(fields.get("base_model_name_or_path") or "", fields.get("revision"), settings, weights)


def _wrong_adapter(where: Path, found: str, expected: str) -> ConfigError:
    return ConfigError(where=str(where), found=found, expected=expected, fix="Point to another adapter folder.")
