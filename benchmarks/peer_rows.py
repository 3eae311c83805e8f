"""What a published row says, what of it cannot be handled, and which release of transformers it was measured with.

A row is what someone else wrote: nothing in it is taken for granted, and what is wrong with it becomes its reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The peer keeps its pinned packages beside its results (scripts/benchmarks/refs/requirements*.txt): transformers 4.45.2
# and, for the update of the loss and the dependencies, 4.48.1. a100_80gb.csv is of after the update: its rows with the
# fused loss have exactly 2 bytes a logit more than the same rows of a100_80gb_liger.csv, which is what 4.46 changed.
RELEASE_OF_FILE = {"a100_80gb_liger.csv": "4.45", "a100_80gb_granite.csv": "4.45"}
LATEST_RELEASE = "4.48"
EXPECTED: Mapping[str, tuple[str, ...]] = {
    "quant": ("nf4", "fp4"),
    "loss": ("transformers_fp32", "fused_over_full_logits", "chunked_linear"),
    "optimizer": ("adamw_torch",),
    "attention": ("flash_attention_2",),
    "lora_dtype": ("float32",),
}
FLAGS = ("double_quant", "kbit_fp32_upcast", "activation_checkpointing")
COUNTS = ("lora_rank", "micro_batch", "seq_len")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
MIXTURE = "a mixture of experts: how many tokens an expert gets depends on the data, not on shapes"
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
MAX_LAYERS = 1000  # far more than any model has; each one is built
# fms-acceleration-foak 0.6.0, framework_plugin_fast_kernels.py, restricted_model_archs: the dense ones with q_proj.
FUSED_MODEL_TYPES = ("granite", "llama", "mistral")
FUSED_PARTS = ("lora", "rmsnorm", "rope")


class CannotHandle(Exception):
    """Why a row has no prediction."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A line that holds no row."""

    reason: str


@contextmanager
def as_reason(what: str) -> Iterator[None]:
    """Whatever fails inside is a reason for the row that was worked on, not the end of the report."""
    try:
        yield
    except CannotHandle:
        raise
    except Exception as error:
        raise CannotHandle(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def read_rows(text: str) -> list[Any]:
    """The value of each line that is not empty; `Unreadable` where there is none."""
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split inside a JSON string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                rows.append(Unreadable(f"line {number} is not JSON: {error}"))
    return rows


def release_of(row: Mapping[str, Any]) -> str:
    """The release of transformers that the row's file was measured with."""
    return RELEASE_OF_FILE.get(PurePosixPath(row.get("path") or "").name, LATEST_RELEASE)


def check(row: Any) -> None:
    """Whether the row is of a kind that we know how to rebuild.

    Raises:
        CannotHandle: it is not.
    """
    if isinstance(row, Unreadable):
        raise CannotHandle(row.reason)
    if not isinstance(row, Mapping):
        raise CannotHandle(f"a row is a JSON object, not {_shown(row)}")
    _check_config(row.get("config"))
    for key, known in EXPECTED.items():
        if row.get(key) not in known:
            raise CannotHandle(f"{key}: {_shown(row.get(key))} is none of {', '.join(known)}")
    for key in FLAGS:
        if not isinstance(row.get(key), bool):
            raise CannotHandle(f"{key}: {_shown(row.get(key))} is neither true nor false")
    for key in COUNTS:
        _check_count(key, row.get(key))
    if not _is_number(row.get("lora_alpha")):
        raise CannotHandle(f"lora_alpha: {_shown(row.get('lora_alpha'))} is no number")
    if not _is_number(row.get("lora_dropout")) or not 0 <= row["lora_dropout"] < 1:
        raise CannotHandle(f"lora_dropout: {_shown(row.get('lora_dropout'))} is no share from 0 to 1")
    if not isinstance(row.get("path") or "", str):
        raise CannotHandle(f"path: {_shown(row['path'])} is no file's name")
    _check_targets(row.get("target_modules"))
    _check_kernels(row.get("peer_kernels"), row["loss"], row["config"]["model_type"])


def _check_config(config: Any) -> None:
    if not isinstance(config, Mapping):
        raise CannotHandle(f"config: {_shown(config)} is no object")
    if any(config.get(key) for key in EXPERT_KEYS):
        raise CannotHandle(MIXTURE)
    if not isinstance(config.get("model_type"), str):
        raise CannotHandle("its config has no model_type")
    if config.get("num_hidden_layers") is None:
        raise CannotHandle("its config has no num_hidden_layers")
    _check_count("num_hidden_layers", config["num_hidden_layers"])
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise CannotHandle(f"num_hidden_layers: {config['num_hidden_layers']} is more than {MAX_LAYERS}")


def _check_targets(targets: Any) -> None:
    if targets == ALL_LINEAR:
        return
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) and name for name in targets):
        raise CannotHandle(f"target_modules: {_shown(targets)} is neither a list of names nor {ALL_LINEAR}")


def _check_kernels(kernels: Any, loss: str, model_type: str) -> None:
    if not isinstance(kernels, str):
        raise CannotHandle(f"peer_kernels: {_shown(kernels)} is no text")
    if kernels == "stock":
        if loss != "transformers_fp32":
            raise CannotHandle(f"loss: {loss} without the plugin's kernels is no configuration of the peer")
    elif not all(part in kernels.lower() for part in FUSED_PARTS):
        raise CannotHandle(f"peer_kernels: {kernels} is neither stock nor fused LoRA, RMSNorm and RoPE together")
    elif model_type not in FUSED_MODEL_TYPES:
        raise CannotHandle(f"the plugin has no fused kernels for {model_type}, or none that we know")


def _check_count(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CannotHandle(f"{key}: {_shown(value)} is no whole number from 1 on")


def check_model(model: nn.Module) -> None:
    """Refuse a model with weights that are neither of linear layers nor a table nor a vector.

    Raises:
        CannotHandle: with the first of them, or because it has experts: also where its config relies on a default.
    """
    config = getattr(model, "config", None)
    if any(getattr(config, key, None) for key in EXPERT_KEYS):
        raise CannotHandle(MIXTURE)
    for name, module in model.named_modules():
        if "experts" in name.rpartition(".")[2]:
            raise CannotHandle(MIXTURE)
        is_known = isinstance(module, nn.Linear | nn.Embedding)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not is_known:
                raise CannotHandle(f"{name}.{key} is no weight of a linear layer or of a table")


def at_depth(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The config with fewer layers: lists with an entry a layer (layer_types) are cut, too."""
    num_all = config["num_hidden_layers"]
    cut = {
        key: value[:num_layers] for key, value in config.items() if isinstance(value, list) and len(value) == num_all
    }
    return {**config, **cut, "num_hidden_layers": num_layers}


def published(row: Mapping[str, Any], key: str) -> float | None:
    """A published figure, or None where there is none.

    Raises:
        CannotHandle: there is something else.
    """
    value = row.get(key)
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise CannotHandle(f"{key}: {_shown(value)} is no figure")
    return float(value)


def _is_number(value: Any) -> bool:
    """A number that can be calculated with; Python reads NaN, and whole numbers of any length."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15 and math.isfinite(value)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
