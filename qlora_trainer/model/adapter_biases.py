"""Which biases an adapter has trained: what `lora.bias` asks for, and what a PEFT file holds.

PEFT names a target's bias `{linear}.base_layer.bias`, before 0.6 `{linear}.bias`, another linear's `{linear}.bias`, and
loads whatever the file has, `bias: none` or not. With `lora_bias` each B has a bias of its own, which only ever shows
added to the linear's, times the scale: here it becomes part of that.

Legend: O out_features of a linear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.table_names import BaseTables

_KEY = "lora.bias"
_OWN, _OWN_OF_TARGET, _OF_B = ".bias", ".base_layer.bias", ".lora_B.bias"
_MERGE = "Merge it into its base with PEFT (merge_and_unload), which keeps them, and take that as the base."


def asked_biases(wanted: str, *, targets: Collection[str], biased: Sequence[str]) -> tuple[str, ...]:
    """The linears whose bias is trained.

    Args:
        wanted: "none", "lora_only" (those of the targets) or "all" (those of every linear but the head).
        targets: full names of the linears with an adapter.
        biased: full names of the linears with a bias, in model order.

    Raises:
        ConfigError: some are asked for, and there are none.
    """
    if wanted == "none":
        return ()
    found = tuple(name for name in biased if wanted == "all" or name in targets)
    if not found:
        whose = "linear of lora.target_modules" if biased else "linear of this base"
        raise ConfigError(
            where=_KEY,
            found=f"{wanted}, and no {whose} with a bias",
            expected="none, or a linear whose bias can be trained",
            fix=f"Leave {_KEY} out.",
        )
    return found


def has_biases(names: Collection[str]) -> bool:
    """Whether an adapter's file has any bias, by the names in it."""
    return any(name.endswith(_OWN) for name in names)


def require_own_biases(additions: Collection[str], biased: Collection[str], *, where: str) -> None:
    """Refuse a bias of a B whose linear has none: here it could only become part of that.

    Args:
        additions: full names of the linears whose B has a bias.
        biased: of those that have one in the base.
        where: what to call the adapter in an error.

    Raises:
        ConfigError: there is such a one.
    """
    alone = [name for name in additions if name not in biased]
    if alone:
        raise ConfigError(
            where=where,
            found=f"{len(alone)} biases of B (lora_bias) on linears that have none in this base, such as {alone[0]}",
            expected="linears with a bias, which they become part of",
            fix="Use it in PEFT, which alone computes that and cannot merge it either, or train one without lora_bias.",
        )


def take_biases(
    weights: dict[str, Tensor],
    scales: Mapping[str, float],
    *,
    use_dora: bool,
    linear_names: Sequence[str],
    tables: BaseTables | None,
    where: Path,
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Bring the biases in an adapter's weights into our names.

    Args:
        weights: by our names but for biases; those of linears become `{linear}.bias`, those of a B are taken out.
        scales: full name of each target -> the factor on its update.
        use_dora: whether the adapter is DoRA, with which PEFT refuses a bias of B.
        linear_names: of the base.
        tables: of the base, whose own biases are left as they are.
        where: the file, for errors.

    Returns:
        The linears that have a bias of their own, in model order, and by the name of some of them what is to be added
        to the base's, [O], fp32, where the file has no other.

    Raises:
        ConfigError: a bias twice, one of what is neither a linear nor a table, or of a B that is no target's or DoRA's.
    """
    known = set(linear_names)
    additions: dict[str, Tensor] = {}
    for name in [name for name in weights if name.endswith(_OWN)]:
        leaf = next(leaf for leaf in (_OF_B, _OWN_OF_TARGET, _OWN) if name.endswith(leaf))
        owner = name.removesuffix(leaf)
        if tables is not None and any(owner == own or owner.startswith(f"{own}.") for own in tables.names):
            continue
        if owner not in known or (leaf == _OF_B and owner not in scales):
            what = "no linear of this base" if owner not in known else "no linear with LoRA"
            raise ConfigError(
                where=str(where), found=f"the bias {name}, of {what}", expected="biases of linears", fix=_MERGE
            )
        if leaf == _OF_B and use_dora:
            raise ConfigError(
                where=str(where),
                found=f"{name}, and use_dora",
                expected="one of them: PEFT's LoraConfig refuses the pair, and defines no result",
                fix="Take lora_bias's weights out, or train the adapter without DoRA.",
            )
        if leaf == _OF_B:
            additions[owner] = weights.pop(name).float() * scales[owner]
        elif leaf == _OWN_OF_TARGET:
            if f"{owner}{_OWN}" in weights:
                raise ConfigError(
                    where=str(where), found=f"{owner}{_OWN} twice", expected="each weight once", fix="Save it again."
                )
            weights[f"{owner}{_OWN}"] = weights.pop(name)
    for owner in [owner for owner in additions if f"{owner}{_OWN}" in weights]:
        own_O, added_O = weights[f"{owner}{_OWN}"], additions.pop(owner)
        if own_O.shape != added_O.shape:
            found = f"{owner}{_OF_B} of {tuple(added_O.shape)}, and a bias of {tuple(own_O.shape)}"
            raise ConfigError(where=str(where), found=found, expected="one shape", fix="Save it again.")
        weights[f"{owner}{_OWN}"] = own_O.float() + added_O
    return tuple(name for name in linear_names if f"{name}{_OWN}" in weights or name in additions), additions
