"""What a LoRA adapter is, apart from its weights: which linears carry one, of what rank, and how it is scaled."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_trainer.config.schema import LoraSection
from qlora_trainer.config.values import LayerRanges
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_biases import asked_biases
from qlora_trainer.model.expressions import MOST_BITS, bits_of_ways
from qlora_trainer.model.table_names import BaseTables, asked_norms, asked_tables, means

ALL_LINEAR = "all-linear"
# The number of a layer in a name, as PEFT 0.21 finds it (`check_target_module_exists`).
_LAYER_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What a LoRA adapter is, apart from its weights.

    Attributes:
        rank: inner dimension R of every adapter that `rank_pattern` does not name.
        alpha: the update is scaled by alpha / R (Hu et al., 2021), where `alpha_pattern` does not say otherwise.
        dropout: probability on the input of the low-rank path, in training.
        targets: full names of the linears that carry an adapter, in model order.
        use_rslora: scale by alpha / sqrt(R) instead (Kalajdzievski, 2023).
        use_dora: a trained magnitude for each output row as well (Liu et al., 2024).
        rank_pattern, alpha_pattern: (regular expression, value); the first that fits the end of a name decides.
        modules_to_save: full names of the tables that are trained whole (embedding, head), in model order.
        tied_head: full name of the head that uses the trained table of the embedding, of a base that ties both.
        norms: full names of the norms that are trained whole, in model order: for PEFT, more of `modules_to_save`.
        biases: full names of the modules whose own bias is trained, in the order of `adapter_biases.in_order`; not of
            those that are trained whole.
        lora_bias: a trained bias of each B, scaled as B is, whether the linear has one of its own or not.
        layer_replication: the base's layers that the model consists of (see `model.repeated_layers`).
        invocation_tokens: of Activated LoRA, from which on it works (see `model.activated`); empty for LoRA.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    tied_head: str | None = None
    norms: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    lora_bias: bool = False
    layer_replication: LayerRanges = ()
    invocation_tokens: tuple[int, ...] = ()

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Full names of tables and norms: what `modules_to_save` is in PEFT's config."""
        return (*self.modules_to_save, *self.norms)

    def rank_of(self, name: str) -> int:
        """R of the adapter on the linear of that full name."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Its alpha."""
        return _first_match(self.alpha_pattern, name, self.alpha)

    def scale_of(self, name: str) -> float:
        """The factor on its update."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


def asked_settings(
    section: LoraSection, rank: int, linear_names: Sequence[str], tables: BaseTables, *, biased: Sequence[str]
) -> LoraSettings:
    """What the config asks for, on a base with these linears and tables.

    Args:
        section: of the config.
        rank: that was decided.
        linear_names: full names of every linear but the head.
        tables: embeddings, head and norms.
        biased: full names of the modules that have a bias.

    Raises:
        ConfigError: a target, a layer, a pattern, a table or a bias means nothing there.
    """
    targets = select_targets(linear_names, section.target_modules)
    if section.layers_to_transform is not None:
        targets = _in_asked_layers(targets, section.layers_to_transform)
    for key in ("rank_pattern", "alpha_pattern"):
        require_patterns([pattern for pattern, _ in getattr(section, key)], targets, where=f"lora.{key}")
    modules_to_save, tied_head = asked_tables(section.modules_to_save, tables, unties=section.untie_tables)
    norms = asked_norms(section.modules_to_save, tables)
    whole = {*modules_to_save, *norms}
    return LoraSettings(
        rank=rank,
        alpha=section.alpha_for(rank),
        dropout=section.dropout,
        targets=targets,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
        modules_to_save=modules_to_save,
        tied_head=tied_head,
        norms=norms,
        biases=asked_biases(section.bias, targets=targets, biased=[own for own in biased if own not in whole]),
        lora_bias=section.lora_bias,
        layer_replication=section.layer_replication,
        invocation_tokens=section.alora_invocation_tokens,
    )


def pattern_fits(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means a linear: PEFT's `get_pattern_key`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def require_expressions(patterns: Iterable[str], *, where: str) -> None:
    """Refuse patterns that are no regular expressions, or that may take longer to match than anyone waits.

    Raises:
        ConfigError: names the first such pattern.
    """
    for pattern in patterns:
        try:
            bits = bits_of_ways(pattern)
            pattern_fits(pattern, "")
        except (re.error, RecursionError, OverflowError) as error:
            raise _wrong_pattern(where, f"{pattern!r}, a broken regular expression ({error})", "q_proj") from error
        if bits > MOST_BITS:
            found = f"{pattern!r}"[:200] + ", which can be matched in more ways than can be tried"
            raise _wrong_pattern(where, found, r".*\.(q|k)_proj, with few .* and none inside a repeated group")


def require_patterns(patterns: Sequence[str], targets: Sequence[str], *, where: str) -> None:
    """Refuse patterns that mean no linear with an adapter: they would change nothing.

    Raises:
        ConfigError: names the first such pattern, or a broken regular expression.
    """
    require_expressions(patterns, where=where)
    for pattern in patterns:
        if not any(pattern_fits(pattern, name) for name in targets):
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
            raise _wrong_pattern(where, f"{pattern!r}, which means no linear with an adapter", leaves)


def select_targets(
    linear_names: Sequence[str],
    target_modules: str | Sequence[str],
    *,
    where: str = "lora.target_modules",
    kind: str = "linear",
) -> tuple[str, ...]:
    """The linears that `target_modules` means, by PEFT's rules.

    Args:
        linear_names: full names of every linear but the head.
        target_modules: `all-linear`; a regular expression that a full name must match as a whole; or a list of names,
            each a full name or the end of one after a dot.
        where: what to call them in an error.
        kind: what to call one of `linear_names` there.

    Raises:
        ConfigError: no linear is meant, an entry of the list means none, or the expression is broken.
    """
    if target_modules == ALL_LINEAR:
        return tuple(linear_names)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear_names}))
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise _wrong_targets(where, f"{target_modules!r}, a broken regular expression ({error})", leaves) from error
        chosen = tuple(name for name in linear_names if pattern.fullmatch(name))
        if not chosen:
            raise _wrong_targets(where, f"{target_modules!r}, which matches no {kind}", leaves)
        return chosen
    for entry in target_modules:
        if not any(means(entry, name) for name in linear_names):
            raise _wrong_targets(where, f"{entry!r}, which names no {kind}", leaves)
    return tuple(name for name in linear_names if any(means(entry, name) for entry in target_modules))


def in_layers(names: Sequence[str], layers: Collection[int], pattern: Sequence[str] = ()) -> tuple[str, ...]:
    """Those of `names` that lie in one of these layers, by PEFT's rules for `layers_to_transform`.

    Args:
        names: full names.
        layers: numbers from 0.
        pattern: names of the lists that layers are counted in (`layers_pattern`); empty takes the first list.
    """
    expressions = [rf"(?:^|.*?\.){entry}\.(?P<index>\d+)\." for entry in pattern] or [_LAYER_INDEX]
    chosen = []
    for name in names:
        found = next((match for entry in expressions if (match := re.match(entry, name))), None)
        if found is not None and int(found["index"]) in layers:
            chosen.append(name)
    return tuple(chosen)


def _in_asked_layers(targets: Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
    for layer in layers:
        if not in_layers(targets, {layer}):
            raise ConfigError(
                where="lora.layers_to_transform",
                found=f"{layer}, a layer without a linear of lora.target_modules",
                expected="numbers of layers, from 0",
                fix="Correct lora.layers_to_transform.",
            )
    return in_layers(targets, set(layers))


def _first_match(patterns: Sequence[tuple[str, Number]], name: str, otherwise: Number) -> Number:
    return next((value for pattern, value in patterns if pattern_fits(pattern, name)), otherwise)


def _wrong_targets(where: str, found: str, leaves: str) -> ConfigError:
    return ConfigError(
        where=where,
        found=found,
        expected=f"{ALL_LINEAR!r}, a regular expression, or a list out of: {leaves}",
        fix=f"Correct {where}.",
    )


def _wrong_pattern(where: str, found: str, examples: str) -> ConfigError:
    return ConfigError(
        where=where,
        found=found,
        expected=f"regular expressions that fit the end of names with an adapter, such as: {examples}",
        fix=f"Correct {where}.",
    )
