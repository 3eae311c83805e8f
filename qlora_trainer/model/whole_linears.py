"""Linears inside the layers that an adapter has trained whole, PEFT's `modules_to_save`, as LoRA of full rank.

Here such a linear stays in NF4 as the others do, and what was learned is beside it: W' = W + B A, of which one is the
change and the other the identity, of as many ranks as the smaller side of W has.

Legend: O out_features, I in_features, R the smaller of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Never in a file: a field that is not known is refused.
WHOLE_LINEARS = "whole_linears"
_WEIGHT = ".weight"
_WRAPPED = (".modules_to_save", ".original_module")  # of PEFT's copies, beside the module's own name


def trained_whole(shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Which modules of an adapter's file were trained whole, by full name.

    Args:
        shapes: of its tensors, by their names in the file without PEFT's prefix.

    Returns:
        Linears in numbered layers, with the shape [O, I] of their weights; and all others, tables and norms.
    """
    names: dict[str, tuple[int, ...]] = {
        name.removesuffix(_WEIGHT): tuple(shape)
        for name, shape in shapes.items()
        if name.endswith(_WEIGHT) and ".lora_" not in name and not name.removesuffix(_WEIGHT).endswith(_WRAPPED)
    }
    linears = {name: names[name] for name in names if len(names[name]) == 2 and _is_in_a_layer(name)}
    return linears, tuple(name for name in names if name not in linears)


def with_whole_linears(
    fields: Mapping[str, Any], linears: Mapping[str, tuple[int, ...]], others: Sequence[str], with_lora: Sequence[str]
) -> dict[str, Any]:
    """The checked fields of an adapter whose linears have LoRA of full rank where they were trained whole.

    Args:
        fields: of the file.
        linears, others: of `trained_whole`.
        with_lora: full names of the modules that have LoRA in the file.
    """
    if not linears:
        return {**fields, WHOLE_LINEARS: ()}
    ranks = {re.escape(name): min(shape) for name, shape in linears.items()}
    alphas = {name: math.sqrt(rank) if fields.get("use_rslora") else rank for name, rank in ranks.items()}
    elsewhere = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))  # the file has decided
    return {
        **fields,
        **elsewhere,
        "target_modules": [*with_lora, *linears],
        "modules_to_save": list(others) or None,
        "rank_pattern": {**ranks, **(fields.get("rank_pattern") or {})},
        "alpha_pattern": {**alphas, **(fields.get("alpha_pattern") or {})},
        WHOLE_LINEARS: tuple(linears),
    }


def lora_of_full_rank(trained_OI: Tensor, base_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] in fp32, whose product is what training has changed."""
    change_OI = trained_OI.float() - base_OI.float()
    num_outputs, num_inputs = change_OI.shape
    if num_outputs < num_inputs:
        return change_OI, torch.eye(num_outputs)
    return torch.eye(num_inputs), change_OI


def _is_in_a_layer(name: str) -> bool:
    return any(map(str.isdigit, name.split(".")))
