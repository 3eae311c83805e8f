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


def is_saved(entries: Sequence[str], name: str) -> bool:
    """Whether an entry of `modules_to_save` means a module or what it lies in: PEFT takes every name that ends so."""
    parts = name.split(".")
    return any(".".join(parts[: count + 1]).endswith(tuple(entries)) for count in range(len(parts)))


def whole_linears(fields: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The modules in numbered layers that the fields mean, and whose weight is a matrix: full name -> [O, I].

    Args:
        fields: checked.
        shapes: of the tensors in the file, by their names there without PEFT's prefix.
    """
    saved = fields.get("modules_to_save") or ()
    found = {}
    for key, shape in shapes.items():
        name = key.removesuffix(_WEIGHT)
        is_meant = key.endswith(_WEIGHT) and ".lora_" not in key and is_saved(saved, name)
        if is_meant and len(shape) == 2 and any(map(str.isdigit, name.split("."))):
            found[name] = tuple(shape)
    return found


def with_whole_linears(fields: Mapping[str, Any], linears: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The checked fields of an adapter in whose file these are whole: LoRA of full rank, at a scale of 1.

    Args:
        fields: of the file.
        linears: of `whole_linears`.
    """
    if not linears:
        return {**fields, WHOLE_LINEARS: ()}
    ranks = {re.escape(name): min(shape) for name, shape in linears.items()}
    alphas = {name: math.sqrt(rank) if fields.get("use_rslora") else rank for name, rank in ranks.items()}
    return {
        **fields,
        "rank_pattern": before_others(ranks, fields.get("rank_pattern")),
        "alpha_pattern": before_others(alphas, fields.get("alpha_pattern")),
        WHOLE_LINEARS: tuple(linears),
    }


def before_others(own: Mapping[str, Any], others: Mapping[str, Any] | None) -> dict[str, Any]:
    """A pattern in which `own` decides: the first that fits does, and a key that both have is `own`'s."""
    return {**own, **{key: value for key, value in (others or {}).items() if key not in own}}


def lora_of_full_rank(trained_OI: Tensor, base_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] in fp32, whose product is what training has changed."""
    change_OI = trained_OI.float() - base_OI.float()
    num_outputs, num_inputs = change_OI.shape
    if num_outputs < num_inputs:
        return change_OI, torch.eye(num_outputs)
    return torch.eye(num_inputs), change_OI
