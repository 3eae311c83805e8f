"""Which biases an adapter has trained: what `lora.bias` asks for, and what a PEFT file holds.

PEFT names a target's bias `{linear}.base_layer.bias`, before 0.6 `{linear}.bias`, another linear's `{linear}.bias`, and
loads whatever the file has, `bias: none` or not. With `lora_bias` each B has a bias of its own, `{linear}.lora_B.bias`,
which it passes over where the config does not say so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.table_names import BaseTables

_KEY = "lora.bias"
# What it puts into the name of a module that it has copied, and of all in it.
_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|original_module)\.")
_OWN, _OWN_OF_TARGET, _OF_B, _OUR_OF_B = ".bias", ".base_layer.bias", ".lora_B.bias", ".lora_B_bias"


def asked_biases(wanted: str, *, targets: Collection[str], biased: Sequence[str]) -> tuple[str, ...]:
    """The modules whose bias is trained.

    Args:
        wanted: "none", "lora_only" (those of the targets) or "all" (every one, as in PEFT).
        targets: full names of the linears with an adapter.
        biased: full names of the modules with a bias of their own, in the order of `in_order`.

    Raises:
        ConfigError: some are asked for, and there are none.
    """
    if wanted == "none":
        return ()
    found = tuple(name for name in biased if wanted == "all" or name in targets)
    if not found:
        whose = "linear of lora.target_modules" if biased else "module of this base"
        raise ConfigError(
            where=_KEY,
            found=f"{wanted}, and no {whose} with a bias",
            expected="none, or a module whose bias can be trained",
            fix=f"Leave {_KEY} out.",
        )
    return found


def in_order(names: Collection[str], linear_names: Sequence[str], head: str | None) -> tuple[str, ...]:
    """Modules whose bias is trained: linears in model order, others by name, the head last."""
    others = sorted(set(names) - {*linear_names, head})
    last = [head] if head is not None and head in names else []
    return (*(name for name in linear_names if name in names), *others, *last)


def has_biases(names: Collection[str]) -> bool:
    """Whether an adapter's file has any bias, by the names in it."""
    return any(name.endswith(_OWN) for name in names)


def take_biases(
    weights: dict[str, Tensor],
    *,
    lora_bias: bool,
    linear_names: Sequence[str],
    tables: BaseTables | None,
    whole: Collection[str],
    where: Path,
) -> tuple[str, ...]:
    """Bring the biases in an adapter's weights into our names.

    Args:
        weights: by our names but for biases; those of linears become `{linear}.bias`, those of a B
            `{linear}.lora_B_bias`.
        lora_bias: whether the config says that each B has one.
        linear_names: of the base.
        tables: of the base: of these, only a head's bias is looked at, where nothing else of it was trained.
        whole: full names of the modules that the file has whole; of linears among them the bias is one that is trained
            beside LoRA.
        where: the file, for errors.

    Returns:
        The modules that have a bias of their own, see `in_order`; whether the base has them there is not asked.

    Raises:
        ConfigError: a bias twice, or one of a B that is to have none.

    Of what is in `modules_to_save` and has a bias, PEFT writes that three times under `bias: all`: as the module's, as
    its wrapper's copy, and the base's own.
    """
    found: set[str] = set()
    _forget_copies(weights, whole, where)
    for name in [name for name in weights if name.endswith(_OWN)]:
        leaf = next(leaf for leaf in (_OF_B, _OWN_OF_TARGET, _OWN) if name.endswith(leaf))
        owner = name.removesuffix(leaf)
        names = () if tables is None else (*tables.names, *whole)
        if owner not in linear_names and any(owner == own or owner.startswith(f"{own}.") for own in names):
            if tables is not None and owner == tables.head and owner not in whole:
                found.add(owner)
            continue
        if leaf == _OF_B and not lora_bias:
            raise ConfigError(
                where=str(where),
                found=f"{name}, and no lora_bias in {ADAPTER_CONFIG_FILE}",
                expected="both or neither: PEFT computes such a bias only where its config says so",
                fix="Write lora_bias: true there if the adapter was trained with it, else take these weights out.",
            )
        ours = f"{owner}{_OUR_OF_B if leaf == _OF_B else _OWN}"
        if leaf != _OWN and ours in weights:
            raise ConfigError(
                where=str(where), found=f"{ours} twice", expected="each weight once", fix="Save it again."
            )
        weights[ours] = weights.pop(name)
        if leaf != _OF_B:
            found.add(owner)
    return in_order(found, linear_names, None if tables is None else tables.head)


def _forget_copies(weights: dict[str, Tensor], whole: Collection[str], where: Path) -> None:
    """Those of PEFT's wrappers, around a module or around what it lies in: biases, and tables of its
    `save_embedding_layers`."""
    for name in list(weights):
        plain, num_copies = _WRAPPER.subn(".", name)
        if not num_copies or plain.rpartition(".")[0] not in whole:
            continue
        if ".original_module." in name:
            del weights[name]  # of the base, beside what PEFT computes with
        else:
            _forget_second(weights, name, plain, where)


def _forget_second(weights: dict[str, Tensor], second: str, first: str, where: Path) -> None:
    copy = weights.pop(second)
    if not torch.equal(weights.setdefault(first, copy), copy):
        raise ConfigError(
            where=str(where),
            found=f"{first} and {second}, which differ",
            expected="the same numbers in both",
            fix="Save it again.",
        )
