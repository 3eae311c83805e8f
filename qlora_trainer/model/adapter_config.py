"""`adapter_config.json` as PEFT writes it: LoRA, rsLoRA, DoRA, patterns; the rest is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE, is_revision
from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.config.values import MAX_TOKEN
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_fields import require_plain_lora
from qlora_trainer.model.adapter_variants import of_more_rank, require_variant, variant_of
from qlora_trainer.model.lora_settings import (
    ALL_LINEAR,
    LoraSettings,
    Number,
    in_layers,
    pattern_fits,
    require_expressions,
    select_targets,
)
from qlora_trainer.model.repeated_layers import ranges_of
from qlora_trainer.model.table_names import BaseTables, means
from qlora_trainer.model.table_updates import AskedUpdates
from qlora_trainer.model.whole_linears import WHOLE_LINEARS, is_saved

_LAYERS = "layers_to_transform"
_NO_TARGETS = "dummy-target-modules"  # what PEFT takes for none, beside `modules_to_save`
_MAX_RANK = 2**16  # beyond any layer's width: a rank that no adapter has
_MAX_ALPHA = 2.0**126  # the factor on an update is a number in fp32


def adapter_config(
    settings: LoraSettings, *, linear_names: Sequence[str], base_name: str, revision: str | None
) -> bytes:
    """The file `adapter_config.json`.

    Args:
        settings: what the adapter is.
        linear_names: every linear of the base, to write targets as short names where that means the same.
        base_name, revision: what to call the base.
    """
    # Only the classic fields: older PEFT versions fail on ones they do not know.
    fields = {
        "base_model_name_or_path": base_name,
        "bias": _bias_field(settings),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,  # targets are full names where not every layer is meant
        "lora_alpha": _whole_if_it_is(settings.alpha),
        "lora_dropout": settings.dropout,
        # Of norms full names: PEFT takes every module whose name ends like that, and "norm" is the end of many.
        "modules_to_save": [*short_target_modules(settings.modules_to_save, settings.modules_to_save), *settings.norms]
        or None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": _in_any_order(settings.rank_pattern, settings.targets),
        "alpha_pattern": {
            name: _whole_if_it_is(alpha)
            for name, alpha in _in_any_order(settings.alpha_pattern, settings.targets).items()
        },
        "revision": revision,
        "target_modules": short_target_modules(settings.targets, linear_names) or _NO_TARGETS,
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
    }
    if settings.lora_bias:
        fields["lora_bias"] = True  # since PEFT 0.14; without it, the biases of the file are passed over
    if settings.layer_replication:
        fields["layer_replication"] = settings.layer_replication  # since PEFT 0.10; without it, layers are missing
    if settings.invocation_tokens:
        fields["alora_invocation_tokens"] = settings.invocation_tokens  # since PEFT 0.18; without it, it always works
    if settings.tied_head is not None:
        fields["ensure_weight_tying"] = True  # since PEFT 0.18; without it, two tables would be trained on
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _bias_field(settings: LoraSettings) -> str:
    if not settings.biases:
        return "none"
    return "lora_only" if set(settings.biases) <= set(settings.targets) else "all"


def short_target_modules(targets: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """Last parts of the names (`q_proj`) where every linear so called is a target, else full names."""
    chosen = set(targets)
    short = set()
    for name in targets:
        leaf = name.rpartition(".")[2]
        namesakes = {other for other in linear_names if other == leaf or other.endswith("." + leaf)}
        short.add(leaf if namesakes <= chosen else name)
    return sorted(short)


def read_config_fields(path: Path) -> dict[str, Any]:
    """The checked fields of an `adapter_config.json`; ranks and alphas are those of plain LoRA (`of_more_rank`).

    Raises:
        ConfigError: no config of a LoRA adapter, or a variant that this version does not compute.
    """
    try:
        fields = decode(read_capped(path))
        rank, alpha, targets = fields["r"], fields["lora_alpha"], fields["target_modules"]
        dropout = fields.get("lora_dropout", 0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong_adapter(path, f"no adapter config ({type(error).__name__}: {error})", "PEFT's JSON") from error
    if not (_is_rank(rank) and _is_number(alpha) and _is_number(dropout) and 0 <= dropout < 1):
        found = f"r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}"
        raise wrong_adapter(path, found, "a positive whole number, a number, and a share below 1")
    if not (isinstance(targets, str) or _are_names(targets) or (targets is None and fields.get("target_parameters"))):
        raise wrong_adapter(path, f"target_modules = {targets!r}", "a list of names or a regular expression")
    require_plain_lora(path, fields)
    require_variant(path, fields)
    _check_variants(path, fields)
    _check_token_ids(path, fields.get("trainable_token_indices"))
    _check_excluded(path, fields.get("exclude_modules"))
    if isinstance(targets, str):
        require_expressions([targets], where=f"{path}, target_modules")
    layers = fields.get("layers_to_transform")
    one_form = {"revision": fields.get("revision") or None}  # PEFT has each of both in several
    one_form |= {"layers_to_transform": [layers]} if isinstance(layers, int) else {}
    return dict(fields) | one_form | of_more_rank(fields) | {WHOLE_LINEARS: ()}


def settings_of(
    fields: Mapping[str, Any],
    *,
    linear_names: Sequence[str],
    tables: BaseTables | None,
    where: Path = Path(ADAPTER_CONFIG_FILE),
) -> LoraSettings:
    """What the checked fields mean for a base; which biases are trained the weights tell.

    Args:
        fields: of `read_config_fields`.
        linear_names: the linears of the base.
        tables: its embeddings, head and norms, which `modules_to_save` may name; None where it may not.
        where: the file, for errors.

    Raises:
        ConfigError: the fields name something that the base does not have.
    """
    targets, on_tables = _targets(fields, linear_names, tables, where)
    _require_linears(fields, linear_names, where)
    saved = fields.get("modules_to_save") or []
    rows = fields.get("trainable_token_indices")
    has_biases = fields.get("bias", "none") != "none"
    if not (targets or on_tables or saved or rows or has_biases or fields.get(_LAYERS)):
        found = f"target_modules = {fields['target_modules']!r}, exclude_modules = {fields.get('exclude_modules')!r}"
        raise wrong_adapter(where, found, "LoRA on some linear, or a table or biases that were trained")
    if (saved or rows) and tables is None:
        raise ConfigError(
            where=str(where),
            found=f"modules_to_save = {saved!r}: modules that were trained whole"
            if saved
            else f"trainable_token_indices = {rows!r}",
            expected="null: adapters of linears are all that is put on a base here",
            fix="Merge the adapter into its base with qlora-trainer merge, or choose another one.",
        )
    modules_to_save, tied_head, norms = _saved_modules(fields, tables, where)
    return LoraSettings(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields.get("lora_dropout", 0.0),
        targets=targets,
        use_rslora=fields.get("use_rslora", False),
        use_dora=fields.get("use_dora", False),
        rank_pattern=tuple((fields.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((fields.get("alpha_pattern") or {}).items()),
        modules_to_save=modules_to_save,
        tied_head=tied_head,
        norms=norms,
        lora_bias=bool(fields.get("lora_bias")),
        layer_replication=ranges_of(fields),
        invocation_tokens=tuple(fields.get("alora_invocation_tokens") or ()),
    )


def asked_updates(fields: Mapping[str, Any], *, linear_names: Sequence[str], tables: BaseTables) -> AskedUpdates:
    """What the checked fields ask of embeddings and head, beside `modules_to_save`.

    Args:
        fields: of `read_config_fields`.
        linear_names, tables: of the base.

    Raises:
        ConfigError: the fields name something that the base does not have.
    """
    where = Path(ADAPTER_CONFIG_FILE)
    rows = fields.get("trainable_token_indices") or {}
    by_name = {tables.embeddings[0]: rows} if isinstance(rows, list) else rows
    token_ids = {}
    for entry, ids in by_name.items():
        for name in _meant(tables.names, [entry], where, "trainable_token_indices", "embeddings and head"):
            token_ids[name] = tuple(ids)
    _, targets = _targets(fields, linear_names, tables, where)
    return AskedUpdates(
        targets,
        token_ids,
        ties=bool(fields.get("ensure_weight_tying")),
        variant=variant_of(fields),
        has_parameters=bool(fields.get("target_parameters")),
    )


def _targets(
    fields: Mapping[str, Any], linear_names: Sequence[str], tables: BaseTables | None, where: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The linears and the tables that carry LoRA, by PEFT's rules; linears that are whole carry it here, too."""
    wanted, excluded, layers = fields["target_modules"], fields.get("exclude_modules") or [], fields.get(_LAYERS)
    whole, saved = fields.get(WHOLE_LINEARS, ()), fields.get("modules_to_save") or ()
    if wanted == _NO_TARGETS:
        return tuple(name for name in linear_names if name in whole), ()
    table_names = () if tables is None or wanted == ALL_LINEAR else tables.names
    names = (*linear_names, *table_names)
    targets = _meant(
        names, _of_this_base(wanted, names), where, "target_modules", "linears inside the layers", kind="linear"
    )
    targets = tuple(name for name in targets if not _is_excluded(name, excluded))
    if layers is not None and layers != []:
        pattern = fields.get("layers_pattern") or ()
        chosen = in_layers(targets, layers, [pattern] if isinstance(pattern, str) else pattern)
        targets = tuple(name for name in targets if name in chosen or name in wanted)  # as PEFT does
    return (
        tuple(name for name in linear_names if name in targets or name in whole),
        tuple(name for name in targets if name in table_names and not (saved and is_saved(saved, name))),
    )


def _require_linears(fields: Mapping[str, Any], linear_names: Sequence[str], where: Path) -> None:
    """Refuse a file that has not whole what the fields say, or whole what is no linear of the base."""
    whole, saved = fields.get(WHOLE_LINEARS, ()), fields.get("modules_to_save") or ()
    if missing := [name for name in linear_names if saved and is_saved(saved, name) and name not in whole]:
        found = f"modules_to_save = {list(saved)!r}, which means {missing[0]}, and no matrix {missing[0]}.weight"
        raise wrong_adapter(where, found, f"the weights of all {len(missing) + len(whole)} linears that it means")
    if others := [name for name in whole if name not in linear_names]:
        raise wrong_adapter(
            where, f"a matrix {others[0]}.weight, which is no linear of this base", "weights of this base"
        )


def _of_this_base(wanted: str | Sequence[str], names: Sequence[str]) -> str | Sequence[str]:
    """Without entries that mean nothing in this base, which PEFT passes over where another does."""
    if isinstance(wanted, str):
        return wanted
    return [entry for entry in wanted if any(means(entry, name) for name in names)] or wanted


def _saved_modules(
    fields: Mapping[str, Any], tables: BaseTables | None, where: Path
) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """`LoraSettings.modules_to_save`, `.tied_head` and `.norms`; PEFT unties what it trains of two tables, unless it
    is told not to.

    Entries that mean nothing here are passed over where another does; what they meant is in the file, if anything.
    """
    if tables is None or not fields.get("modules_to_save"):
        return (), None, ()
    names = (*tables.names, *tables.norms)
    meant = tuple(name for name in names if is_saved(fields["modules_to_save"], name))
    if not meant and not fields.get(WHOLE_LINEARS):
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        found = f"modules_to_save with {fields['modules_to_save'][0]!r}, which names no embedding, head or norm"
        raise wrong_adapter(where, found, f"some of these, which are all that may be trained whole here: {leaves}")
    norms = tuple(name for name in meant if name in tables.norms)
    chosen, both = tuple(name for name in meant if name in tables.names), (tables.embeddings[0], tables.head)
    if not (tables.is_tied and fields.get("ensure_weight_tying") and set(both) & set(chosen)):
        return chosen, None, norms
    return tuple(name for name in tables.embeddings if name in (both[0], *chosen)), tables.head, norms


def _meant(
    names: Sequence[str], wanted: str | Sequence[str], where: Path, field: str, what: str, *, kind: str = "table"
) -> tuple[str, ...]:
    """`select_targets` for a file that others wrote, of which nobody is told to correct it."""
    try:
        return select_targets(names, wanted, where=field, kind=kind)
    except ConfigError as error:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        expected = f"{what} of this base, which are all that adapters may have here: {leaves}"
        raise wrong_adapter(where, f"{field} with {error.found}", expected) from error


def wrong_adapter(where: Path, found: str, expected: str) -> ConfigError:
    """An adapter folder that cannot be used."""
    return ConfigError(where=str(where), found=found, expected=expected, fix="Point to another adapter folder.")


def _check_switches(path: Path, fields: Mapping[str, Any]) -> None:
    for name in ("use_dora", "use_rslora", "lora_bias"):
        if type(fields.get(name) or False) is not bool:
            raise wrong_adapter(path, f"{name} = {fields[name]!r}", "true or false")
    if fields.get("lora_bias") and fields.get("use_dora"):
        found = "lora_bias and use_dora, of which PEFT's LoraConfig refuses to be both, so that nothing defines the sum"
        raise wrong_adapter(path, found, "one of them")


def _check_variants(path: Path, fields: Mapping[str, Any]) -> None:
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision") or None
    if not (name is None or isinstance(name, str)):
        raise wrong_adapter(path, f"base_model_name_or_path = {name!r}", "the name of a base")
    if not (revision is None or (isinstance(revision, str) and is_revision(revision))):
        raise wrong_adapter(path, f"revision = {revision!r}", "a branch, a tag or a commit")
    _check_switches(path, fields)
    for name, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = fields.get(name)
        if pattern is None:
            continue
        if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
            raise wrong_adapter(path, f"{name} = {pattern!r}", "regular expressions, each with a positive number")
        require_expressions(pattern, where=f"{path}, {name}")
    layers, pattern = fields.get("layers_to_transform"), fields.get("layers_pattern")
    numbers = [layers] if isinstance(layers, int) else layers
    if numbers is not None and not (isinstance(numbers, list) and all(type(one) is int for one in numbers)):
        raise wrong_adapter(path, f"layers_to_transform = {layers!r}", "the numbers of layers")
    if numbers and isinstance(fields["target_modules"], str):  # which PEFT refuses, too
        raise wrong_adapter(path, f"layers_to_transform = {layers!r} with a regular expression", "a list of names")
    if not (pattern is None or isinstance(pattern, str) or _are_names(pattern)):
        raise wrong_adapter(path, f"layers_pattern = {pattern!r}", "the name of a list of layers")
    require_expressions([pattern] if isinstance(pattern, str) else pattern or (), where=f"{path}, layers_pattern")
    _check_ranges(path, fields.get("layer_replication") or [])
    saved = fields.get("modules_to_save")
    if saved is not None and not (_are_names(saved) and all(saved)):
        raise wrong_adapter(path, f"modules_to_save = {saved!r}", "a list of names")
    if type(fields.get("ensure_weight_tying", False)) is not bool:
        raise wrong_adapter(path, f"ensure_weight_tying = {fields['ensure_weight_tying']!r}", "true or false")


def _check_ranges(path: Path, ranges: object) -> None:
    are_pairs = isinstance(ranges, list) and all(isinstance(own, list) and len(own) == 2 for own in ranges)
    if not (isinstance(ranges, list) and are_pairs and all(type(one) is int for own in ranges for one in own)):
        raise wrong_adapter(path, f"layer_replication = {ranges!r}", "pairs of numbers of layers")


def _check_excluded(path: Path, excluded: object) -> None:
    if isinstance(excluded, str):
        require_expressions([excluded], where=f"{path}, exclude_modules")
    elif not (excluded is None or _are_names(excluded)):
        raise wrong_adapter(path, f"exclude_modules = {excluded!r}", "a list of names or a regular expression")


def _check_token_ids(path: Path, rows: object) -> None:
    by_name = rows if isinstance(rows, dict) else {} if rows is None else {"": rows}
    for ids in by_name.values():
        if (
            not (isinstance(ids, list) and ids)
            or not all(type(one) is int and 0 <= one < MAX_TOKEN for one in ids)
            or len(set(ids)) < len(ids)
        ):
            raise wrong_adapter(path, f"trainable_token_indices = {rows!r}", "numbers of tokens, each once")


def _is_excluded(name: str, excluded: str | Sequence[str]) -> bool:
    """By PEFT's rules: a regular expression for the whole name, or names and ends of names."""
    if isinstance(excluded, str):
        return bool(excluded) and re.fullmatch(excluded, name) is not None
    return any(means(entry, name) for entry in excluded)


def _whole_if_it_is(value: float) -> float:
    """16 for 16.0: some readers take whole numbers only, as PEFT's own config has them."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _in_any_order(pattern: Sequence[tuple[str, Number]], targets: Sequence[str]) -> dict[str, Number]:
    """A pattern that means the same with its keys sorted, as PEFT sorts them on saving: else every name by itself."""
    by_name = {name: value for name in targets for value in [_value_for(pattern, name)] if value is not None}
    if all(_value_for(sorted(pattern), name) == by_name.get(name) for name in targets):
        return dict(pattern)
    return {re.escape(name): value for name, value in by_name.items()}


def _value_for(pattern: Sequence[tuple[str, Number]], name: str) -> Number | None:
    return next((value for key, value in pattern if pattern_fits(key, name)), None)


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_RANK


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= _MAX_ALPHA


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
