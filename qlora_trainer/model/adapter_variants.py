"""Variants of LoRA that PEFT computes and that are plain LoRA of an equal function: what a config says of them.

What they are in numbers is `model.plain_lora`'s part, which needs the base's weights. Read in PEFT 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.config.values import MAX_TOKEN
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.lora_settings import ALL_LINEAR, in_layers, pattern_fits
from qlora_trainer.model.table_names import means
from qlora_trainer.model.whole_linears import WHOLE_LINEARS, before_others

STARTS = ("pissa", "olora")  # values of `init_lora_weights` whose change of the base can be found again there
_SUBCONFIGS = ("kasa_config", "monteclora_config", "use_bdlora")
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Variant:
    """What of an adapter's weights is not plain LoRA's yet.

    Attributes:
        parts: what was taken out of each weight, in PEFT's order: "pissa" or "olora", "kasa".
        blocks_A, blocks_B: BD-LoRA's: a linear with one of these in its full name has a block-diagonal A, or B.
        num_blocks: of each such matrix.
        may_pool: QALoRA's: A may be of means over groups of inputs.
        whole: full names of the linears that the file has whole (see `model.whole_linears`).
    """

    parts: tuple[str, ...] = ()
    blocks_A: tuple[str, ...] = ()
    blocks_B: tuple[str, ...] = ()
    num_blocks: int = 1
    may_pool: bool = False
    whole: tuple[str, ...] = ()

    @property
    def rank_factor(self) -> int:
        """Ranks as plain LoRA, over those in the file."""
        return 1 + len(self.parts)

    def has_blocks(self, name: str) -> tuple[bool, bool]:
        """Whether A and B of the linear of that full name are block-diagonal.

        Raises:
            ConfigError: both, which PEFT refuses.
        """
        found = any(own in name for own in self.blocks_A), any(own in name for own in self.blocks_B)
        if all(found):
            raise ConfigError(
                where=f"use_bdlora, {name}",
                found="a linear that both lists mean",
                expected="blocks of A or of B",
                fix="Point to another adapter folder.",
            )
        return found

    def shapes_in_file(
        self, name: str, shapes: tuple[tuple[int, int], tuple[int, int]], found_A: Tensor | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B in the file, for those of plain LoRA.

        Args:
            name: full name of the linear.
            shapes: [R, I] and [O, R].
            found_A: in the file, which tells whether A is of means.
        """
        (rank, num_inputs), (num_outputs, _) = shapes
        rank //= self.rank_factor
        in_A, in_B = self.has_blocks(name)
        width = num_inputs // self.num_blocks if in_A else num_inputs
        if self.may_pool and found_A is not None and found_A.ndim == 2 and found_A.numel():
            width = found_A.shape[1] if num_inputs % found_A.shape[1] == 0 else num_inputs
        return (rank, width), (num_outputs, rank // self.num_blocks if in_B else rank)

    def without_blocks(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of the linear of that full name, from those in the file.

        Raises:
            ConfigError: rows that are no equal blocks.
        """
        in_A, in_B = self.has_blocks(name)
        return (self._on_diagonal(a, name) if in_A else a), (self._on_diagonal(b, name) if in_B else b)

    def _on_diagonal(self, rows: Tensor, name: str) -> Tensor:
        """Blocks below each other, [N, M / num_blocks], on the diagonal of [N, M]."""
        if rows.shape[0] % self.num_blocks:
            raise ConfigError(
                where=name,
                found=f"{rows.shape[0]} rows",
                expected=f"{self.num_blocks} equal blocks (use_bdlora)",
                fix="Use the base that the adapter was trained on.",
            )
        whole: Tensor = torch.block_diag(*rows.chunk(self.num_blocks))
        return whole


def variant_of(fields: Mapping[str, Any]) -> Variant | None:
    """Of checked fields; None for weights that are plain LoRA's."""
    start = taken_start(fields)
    parts = (*(() if start is None else (start,)), *(("kasa",) if _is_on(fields, "kasa_config") else ()))
    blocks = fields["use_bdlora"] if _is_on(fields, "use_bdlora") else {}
    found = Variant(
        parts=parts,
        blocks_A=tuple(blocks.get("target_modules_bd_a") or ()),
        blocks_B=tuple(blocks.get("target_modules_bd_b") or ()),
        num_blocks=blocks.get("nblocks", 1),
        may_pool=bool(fields.get("use_qalora")),
        whole=fields.get(WHOLE_LINEARS, ()),
    )
    return None if found == Variant(num_blocks=found.num_blocks) else found


def variant_told(fields: Mapping[str, Any]) -> str | None:
    """In words, what an adapter was and is read as; None for plain LoRA."""
    variant = variant_of(fields) or Variant()
    names = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA"}
    times = {2: "twice", 3: "three times"}.get(variant.rank_factor)
    told = [f"{' and '.join(names[part] for part in variant.parts)}, of {times} the rank"] if variant.parts else []
    if variant.blocks_A or variant.blocks_B:
        told.append("BD-LoRA, whose zeros outside its blocks are trained, too")
    if variant.may_pool:
        told.append("QALoRA, with a column of A for each input")
    if _is_on(fields, "monteclora_config"):
        told.append("MonteCLoRA as it is evaluated, without its noise")
    if is_loftq_of_nf4(fields):
        told.append("LoftQ of one step, which has the base in NF4")
    if variant.whole:
        told.append(
            f"{len(variant.whole)} linears that were trained whole, of full rank, which dropout and decay reach, too"
        )
    if fields.get("target_parameters"):
        told.append("LoRA on weights (target_parameters), on the linears that have them")
    return f"read as plain LoRA: {'; '.join(told)}" if told else None


def taken_start(fields: Mapping[str, Any]) -> str | None:
    """The one of `STARTS` that an adapter had; None for any other."""
    start = folded(fields.get("init_lora_weights"))
    return start if isinstance(start, str) and start in STARTS else None


def is_loftq_of_nf4(fields: Mapping[str, Any]) -> bool:
    """Whether PEFT's LoftQ has left NF4 of each weight in its place: what adapters are computed beside here, anyway.

    It quantizes W to NF4 (blocks of 64, scales in fp32) and begins with the rest's largest parts; of more than one step
    (`loftq_iter`) it quantizes W less those, again and again, and of 8 bits it rounds to int8.
    """
    config = fields.get("loftq_config")
    steps = (config.get("loftq_bits", 4), config.get("loftq_iter", 1)) if isinstance(config, dict) and config else None
    return fields.get("init_lora_weights") == "loftq" and steps == (4, 1)


def folded(start: object) -> object:
    """PEFT takes the names of most starts in any case."""
    is_as_it_is = not isinstance(start, str) or start == "LORA" or start.lower().startswith("pissa")
    return start if is_as_it_is else str(start).lower()


def of_more_rank(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the plain LoRA that a `Variant` with parts is: more rank, and the same scale."""
    factor = (variant_of(fields) or Variant()).rank_factor
    if factor == 1:
        return {}
    of_alpha = math.sqrt(factor) if fields.get("use_rslora") else factor
    ranks, alphas = (fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    return {
        "r": factor * fields["r"],
        "lora_alpha": of_alpha * fields["lora_alpha"],
        "rank_pattern": {name: factor * rank for name, rank in ranks.items()},
        "alpha_pattern": {name: of_alpha * alpha for name, alpha in alphas.items()},
    }


def of_fewer_ranks(fields: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The patterns of an adapter whose start has fewer ranks than were asked for, at the scale of those.

    PiSSA and OLoRA take no more singular values, or columns of Q, than a weight has (PEFT 0.21).

    Args:
        fields: checked.
        ranks: full name -> ranks in the file, of the modules whose weight can have no more.
    """
    factor = (variant_of(fields) or Variant()).rank_factor
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for name, rank in ranks.items():
        asked, alpha = (
            _of_pattern(fields, *own, name) for own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if (share := factor * rank / asked) < 1.0:
            patterns["rank_pattern"][re.escape(name)] = factor * rank
            patterns["alpha_pattern"][re.escape(name)] = alpha * (
                math.sqrt(share) if fields.get("use_rslora") else share
            )
    return {field: before_others(own, fields.get(field)) for field, own in patterns.items() if own}


def _of_pattern(fields: Mapping[str, Any], field: str, otherwise: str, name: str) -> Any:
    found = ((pattern_fits(own, name), value) for own, value in (fields.get(field) or {}).items())
    return next((value for is_meant, value in found if is_meant), fields[otherwise])


def as_target_modules(fields: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The checked fields with `target_parameters` as `target_modules`: LoRA on a linear's weight is LoRA on the linear.

    Args:
        fields: whose patterns mean the full names of these weights.
        modules: full names of what has LoRA in the file.
    """
    wanted = fields.get("target_parameters")
    if not wanted:
        return dict(fields)
    keys = {name: name + _WEIGHT * any(means(own, name + _WEIGHT) for own in wanted) for name in modules}
    patterns = {
        field: {
            re.escape(name): value
            for name, key in keys.items()
            for value in [next((value for own, value in fields[field].items() if pattern_fits(own, key)), None)]
            if value is not None
        }
        for field in ("rank_pattern", "alpha_pattern")
        if fields.get(field)
    }
    elsewhere = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))  # of `target_modules` only
    return {**fields, **elsewhere, **patterns, "target_modules": list(modules)}


def require_named(path: Path, fields: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Refuse LoRA that `target_modules` and `target_parameters` do not name: PEFT passes over it.

    Args:
        path: of the config, for the error.
        fields: checked.
        modules: full names of what has LoRA in the file.

    Raises:
        ConfigError: names the first such module.
    """
    for name in modules:
        if not (_is_target(fields, name) or any(means(own, name + _WEIGHT) for own in fields["target_parameters"])):
            raise ConfigError(
                where=str(path),
                found=f"LoRA on {name} beside it",
                expected="LoRA on what target_modules and target_parameters name, which is all that PEFT loads",
                fix="Point to another adapter folder.",
            )


def _is_target(fields: Mapping[str, Any], name: str) -> bool:
    """Whether `target_modules` and what limits it mean a module, by PEFT's rules."""
    wanted, excluded, layers = (fields.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform"))
    is_meant = any(map(str.isdigit, name.split("."))) if wanted == ALL_LINEAR else _are_meant(wanted, name)
    if not is_meant or _are_meant(excluded, name):
        return False
    pattern = fields.get("layers_pattern") or ()
    patterns = [pattern] if isinstance(pattern, str) else pattern
    return not layers or name in fields["target_modules"] or bool(in_layers([name], layers, patterns))


def _are_meant(entries: str | Sequence[str] | None, name: str) -> bool:
    """Whether a regular expression is the whole name, or one of these names is its end."""
    if isinstance(entries, str):
        return bool(entries) and re.fullmatch(entries, name) is not None
    return any(means(entry, name) for entry in entries or ())


def require_variant(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse fields of a variant that PEFT would not take, or that mean what is not computed here.

    Raises:
        ConfigError: names the first such field.
    """
    for name in _SUBCONFIGS:
        if not (fields.get(name) in (None, False) or isinstance(fields[name], dict)):
            raise _wrong(path, name, fields, "an object, or null")
    if type(fields.get("use_qalora") or False) is not bool:
        raise _wrong(path, "use_qalora", fields, "true or false")
    blocks = fields["use_bdlora"] if _is_on(fields, "use_bdlora") else {}
    names = [blocks.get(f"target_modules_bd_{which}") or [] for which in "ab"]
    is_number = type(blocks.get("nblocks", 1)) is int and blocks.get("nblocks", 1) > 0
    if not (is_number and all(isinstance(own, list) and all(isinstance(one, str) for one in own) for own in names)):
        raise _wrong(path, "use_bdlora", fields, "nblocks, a positive whole number, and names")
    wanted = fields.get("target_parameters")
    if wanted and not (_are_names(wanted) and all(own.endswith(_WEIGHT) for own in wanted)):
        raise ConfigError(
            where=str(path),
            found=f"target_parameters = {wanted!r}"[:200],
            expected="weights of linears, as q_proj.weight: there are no experts in the bases that are trained here",
            fix="Use it with PEFT.",
        )


def require_activated(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse invocation tokens that are none, and Activated LoRA beside what is not computed token by token.

    Raises:
        ConfigError: says which.
    """
    tokens = fields.get("alora_invocation_tokens")
    are_tokens = isinstance(tokens, list) and all(type(own) is int and 0 <= own < MAX_TOKEN for own in tokens)
    if not (tokens is None or are_tokens):
        raise _wrong(path, "alora_invocation_tokens", fields, "numbers of tokens")
    variant = variant_of(fields)
    beside = [name for name in ("use_dora", "lora_bias", "target_parameters") if fields.get(name)]
    beside += ["velora_config"] if fields.get("velora_config") is not None else []
    if variant is not None:
        beside.append("linears that were trained whole" if variant.whole else "a variant of LoRA")
    if tokens and beside:
        raise ConfigError(
            where=str(path),
            found=f"alora_invocation_tokens and {' and '.join(beside)}",
            expected="Activated LoRA of plain LoRA: what else is added is added at every token",
            fix="Use it with PEFT.",
        )


def _is_on(fields: Mapping[str, Any], name: str) -> bool:
    """PEFT makes its object of an empty one, too."""
    return isinstance(fields.get(name), dict)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _wrong(path: Path, name: str, fields: Mapping[str, Any], expected: str) -> ConfigError:
    found = f"{name} = {fields[name]!r}"[:200]
    return ConfigError(where=str(path), found=found, expected=expected, fix="Point to another adapter folder.")
