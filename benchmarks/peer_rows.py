"""What a published row says, what of it cannot be handled, and which release of transformers it was measured with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The peer keeps its pinned packages beside its results (scripts/benchmarks/refs/requirements*.txt): transformers 4.45.2
# and, for the update of the loss and the dependencies, 4.48.1. a100_80gb.csv is of after the update: its rows with the
# fused loss have exactly 2 bytes a logit more than the same rows of a100_80gb_liger.csv, which is what 4.46 changed.
RELEASE_OF_FILE = {"a100_80gb_liger.csv": "4.45", "a100_80gb_granite.csv": "4.45"}
LATEST_RELEASE = "4.48"
LOSSES = ("transformers_fp32", "fused_over_full_logits", "chunked_linear")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class CannotHandle(Exception):
    """Why a row has no prediction."""


def release_of(row: Mapping[str, Any]) -> str:
    """The release of transformers that the row's file was measured with."""
    return RELEASE_OF_FILE.get(PurePosixPath(row.get("path", "")).name, LATEST_RELEASE)


def check(row: Mapping[str, Any]) -> None:
    """Whether the row is of a kind that we know how to rebuild.

    Raises:
        CannotHandle: it is not.
    """
    config = row["config"]
    if any(config.get(key) for key in EXPERT_KEYS):
        raise CannotHandle("a mixture of experts: how many tokens an expert gets depends on the data, not on shapes")
    if "num_hidden_layers" not in config:
        raise CannotHandle("its config has no num_hidden_layers")
    expected: dict[str, tuple[Any, ...]] = {
        "quant": ("nf4", "fp4"),
        "loss": LOSSES,
        "optimizer": ("adamw_torch",),
        "attention": ("flash_attention_2",),
        "lora_dtype": ("float32",),
    }
    for key, known in expected.items():
        if row[key] not in known:
            raise CannotHandle(f"{key}: {row[key]} is none of {', '.join(known)}")
    if row["loss"] != "transformers_fp32" and row["peer_kernels"] == "stock":
        raise CannotHandle(f"loss: {row['loss']} without the plugin's kernels is no configuration of the peer")
