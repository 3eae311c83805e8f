"""`lora.init_from`: a run that begins with the weights of an adapter, whoever trained it, in place of new ones.

What the adapter is (rank, alpha, targets, variant) is taken from its folder where the config does not say it; where it
does, both must mean the same. How it is trained (dropout, dtype, optimizer, which starts anew) is the config's.

Of the hub a commit is taken: `owner/name`, or `owner/name@revision` with a branch, tag or commit, becomes
`owner/name@commit` in the config of the run, which its resume has to name as well, or find again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pydantic import ValidationError

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE, is_hub_id, is_revision
from qlora_trainer.config.schema import LoraSection, RunConfig
from qlora_trainer.config.strict_json import json_sha256
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.sealed_folder import sha256_of
from qlora_trainer.model.adapter_config import short_target_modules
from qlora_trainer.model.adapter_fit import base_tables, modules_with_bias, require_adapter_fits
from qlora_trainer.model.adapter_folder import (
    WEIGHTS_FILE,
    AdapterFolder,
    has_only_lora_in_layers,
    lora_modules,
    read_adapter_fields,
    read_adapter_folder,
)
from qlora_trainer.model.adapter_variants import variant_told
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.model.lora_settings import LoraSettings, asked_settings, pattern_fits
from qlora_trainer.model.repeated_layers import ranges_of
from qlora_trainer.model.skeleton import build_skeleton, find_parts
from qlora_trainer.model.table_names import means
from qlora_trainer.model.whole_linears import WHOLE_LINEARS
from qlora_trainer.run.folder import find_adapter
from qlora_trainer.run.records import Preparing

_KEY = "lora.init_from"
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
# Keys of the section `lora` that say what an adapter is -> field of adapter_config.json, and what is meant without it.
_FIELDS: dict[str, tuple[str, Any]] = {
    "rank": ("r", None),
    "alpha": ("lora_alpha", None),
    "target_modules": ("target_modules", None),
    "layers_to_transform": ("layers_to_transform", None),
    "layer_replication": ("layer_replication", ()),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "modules_to_save": ("modules_to_save", ()),
    "untie_tables": ("untie_tables", False),  # which PEFT does where nothing else is said
    "bias": ("bias", "none"),
    "lora_bias": ("lora_bias", False),
    "alora_invocation_tokens": ("alora_invocation_tokens", ()),
}


def filled_in(config: RunConfig) -> RunConfig:
    """The config with what `lora.init_from` says of its adapter, wherever the config itself leaves it open.

    Args:
        config: as it was given; what it does not set, or sets to `auto`, is taken from the adapter.

    Raises:
        ConfigError: no such adapter, only a pickled one, one of a kind that is not computed here, or of another rank,
            alpha or variant than the config sets.
    """
    if config.lora.init_from is None:
        return config
    folder = initial_folder(config.lora.init_from)
    fields = read_adapter_fields(folder)
    fields["layer_replication"] = ranges_of(fields)
    if not has_only_lora_in_layers(folder):
        fields |= _beside_linears(config, folder, fields)
    else:
        fields["bias"] = "none"  # whatever it was to be, there is none
        fields |= _fitting_patterns(fields, lora_modules(folder))
        if fields.get("exclude_modules"):
            fields["target_modules"] = lora_modules(folder)
        elif isinstance(fields["target_modules"], list):  # PEFT passes over entries that name nothing
            fields["target_modules"] = _naming(fields["target_modules"], lora_modules(folder))
    values = {
        key: _as_config(otherwise if fields.get(field) in (None, "", [], {}, ()) else fields[field])
        for key, (field, otherwise) in _FIELDS.items()
    }
    values["target_modules"] = _as_config(fields["target_modules"]) or ()  # of none too, where tables alone are trained
    asked = {key: getattr(config.lora, key) for key in config.lora.model_fields_set & _FIELDS.keys()}
    for key in (
        "rank",
        "alpha",
        "use_rslora",
        "use_dora",
        "untie_tables",
        "bias",
        "lora_bias",
        "layer_replication",
        "alora_invocation_tokens",
    ):
        if asked.get(key, "auto") not in ("auto", values[key]):
            told = variant_told(fields) if key in ("rank", "alpha") else None  # which has more of both
            as_read = "" if told is None else f" ({told})"
            raise _mismatch(f"lora.{key}", _shown(asked[key]), f"{_shown(values[key])}, as {folder} has it{as_read}")
    given = {key: getattr(config.lora, key) for key in config.lora.model_fields_set}
    kept = {key: value for key, value in given.items() if value != "auto"}
    try:
        section = LoraSection.model_validate(values | kept | {"init_from": _pinned(config.lora.init_from, folder)})
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{_FIELDS[str(first['loc'][0])][0]} = {first['input']!r}"
        raise _mismatch(str(folder / ADAPTER_CONFIG_FILE), found, "what can be trained") from error
    return config.model_copy(update={"lora": section})


def _beside_linears(config: RunConfig, folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Targets, tables, norms and biases of an adapter that has more than LoRA inside the layers, as a config has them.

    Tables and norms that it has trained whole are named as anything else of it. Tables that it changes in another way
    become trained whole here, which takes memory that nobody has asked for: these the config must name.

    Raises:
        ConfigError: it does not; or only some of the biases were trained that are trained together here.
    """
    ranges = ranges_of(fields)
    base = resolve_base(config.model.base, config.model.revision, with_weights=False, layer_replication=ranges)
    parts = find_parts(build_skeleton(base.config, with_buffers=False))
    tables = base_tables(parts)
    adapter = read_adapter_folder(folder, linear_names=parts.linears, tables=tables, may_change_base=True)
    tied = () if adapter.settings.tied_head is None else (adapter.settings.tied_head,)
    whole = (*adapter.settings.modules_to_save, *tied)
    if adapter.updates:
        changed = (*adapter.updates, *tied)
        key, leaves = "lora.modules_to_save", [name.rpartition(".")[2] for name in whole]
        leaves += short_target_modules(adapter.settings.norms, tables.norms)
        if not all(any(means(entry, name) for entry in config.lora.modules_to_save) for name in changed):
            raise ConfigError(
                where=key,
                found=f"{list(config.lora.modules_to_save)!r}, and an adapter with LoRA or rows of its own on "
                f"{', '.join(adapter.updates)} ({folder})",
                expected="these tables trained whole, from what the adapter makes of them; the plan prices it",
                fix=f"Write {key}: [{', '.join(leaves)}], or choose another adapter.",
            )
    wanted = fields["target_modules"] if adapter.settings.targets else []
    if fields.get("exclude_modules") or fields[WHOLE_LINEARS]:  # which a config does not have
        wanted = list(adapter.settings.targets)
    elif wanted and not isinstance(wanted, str):  # an expression is looked for in names of linears only
        wanted = _naming(wanted, parts.linears)
    norms = adapter.settings.norms
    alone = [name for name in modules_with_bias(parts) if name not in (*whole, *norms)]
    bias = _as_bias((config.lora.bias, fields.get("bias")), adapter.settings, alone, folder)
    is_named = bool(adapter.settings.targets) and not fields[WHOLE_LINEARS]
    layers = fields.get("layers_to_transform") if is_named else None
    unties = tables.is_tied and not tied and bool({tables.embeddings[0], tables.head} & set(whole))
    named = [*whole, *short_target_modules(norms, tables.norms)]
    found = {"modules_to_save": named, "untie_tables": unties, "target_modules": wanted, "bias": bias}
    found |= {"layers_to_transform": layers}
    return found | _fitting_patterns(fields, adapter.settings.targets)


def _as_bias(words: Sequence[Any], settings: LoraSettings, biased: Sequence[str], folder: Path) -> str:
    """What `lora.bias` is called that means the adapter's biases: one of `words` if it does, the first of them."""
    if not settings.biases:
        return "none"
    known = ("lora_only", "all")  # which mean the same where all that has a bias has LoRA
    for wanted in (*(str(word) for word in words if word in known), *known):
        meant = tuple(name for name in biased if wanted == "all" or name in settings.targets)
        if meant == settings.biases:
            return wanted
    raise ConfigError(
        where=str(folder),
        found=f"biases of {len(settings.biases)} modules, such as {settings.biases[0]}",
        expected=f"those of all {len(biased)} that have one in this base, of all of them with LoRA, or none",
        fix="Merge it into its base (qlora-trainer merge), and train on that.",
    )


def _fitting_patterns(fields: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """Without keys that mean no linear with LoRA: a table, or nothing, which PEFT passes over."""
    return {
        name: {
            key: value
            for key, value in (fields.get(name) or {}).items()
            if any(pattern_fits(key, own) for own in targets)
        }
        for name in ("rank_pattern", "alpha_pattern")
    }


def _naming(entries: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Those entries that mean one of the modules; all where none does, which is told of later."""
    return [entry for entry in entries if any(means(entry, name) for name in modules)] or list(entries)


def initial_folder(name: str) -> Path:
    """The adapter folder that `lora.init_from` names: itself, that of a finished run, or one from the hub.

    Raises:
        ConfigError: nothing there, or nothing that can be fetched.
    """
    hub_id = _hub_id(name)
    if hub_id is None:
        return find_adapter(Path(name))
    try:  # of all that a hub repository may hold, only what is no code and no pickle
        fetched = snapshot_download(hub_id[0], revision=hub_id[1], allow_patterns=[ADAPTER_CONFIG_FILE, WEIGHTS_FILE])
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        found = f"{name!r}, no folder, and nothing that could be fetched from the hub ({str(error).splitlines()[0]})"
        raise _mismatch(_KEY, found, "a run, an adapter folder or a hub id that you may read") from error
    return find_adapter(Path(fetched))


def _hub_id(name: str) -> tuple[str, str | None] | None:
    """The repository and the revision, if one is named; None where a path is meant.

    Raises:
        ConfigError: what is behind the @ can be no branch, tag or commit.
    """
    repository, at, revision = name.partition("@")
    if os.path.exists(name) or name.startswith(("/", ".", "~")) or not is_hub_id(repository):
        return None
    if at and not is_revision(revision):
        raise ConfigError(
            where=_KEY,
            found=f"{name!r}",
            expected="owner/name@revision, with a branch, a tag or a commit",
            fix=f"Correct {_KEY}.",
        )
    return repository, revision or None


def _pinned(name: str, folder: Path) -> str:
    """A hub id with the commit that was fetched, by which the hub's cache names the folder; other names as they are."""
    hub_id = _hub_id(name)
    return name if hub_id is None or not _COMMIT.fullmatch(folder.name) else f"{hub_id[0]}@{folder.name}"


def read_initial(config: RunConfig, base: Base, rank: int) -> AdapterFolder | None:
    """The adapter of `lora.init_from`, which fits the base and is what the config asks for; None for a new one.

    Args:
        config: filled in.
        base: no weight of it is read.
        rank: that was decided.

    Raises:
        ConfigError: it does not fit (the first five differences are named), differs from what the config asks for, or
            holds a number that is not finite.
    """
    if config.lora.init_from is None:
        return None
    folder = initial_folder(config.lora.init_from)
    skeleton = build_skeleton(base.config, with_buffers=False)
    parts = find_parts(skeleton)
    tables = base_tables(parts)
    adapter = read_adapter_folder(folder, linear_names=parts.linears, tables=tables, may_change_base=True)
    require_adapter_fits(skeleton, adapter, where=f"{_KEY} {folder}")
    asked = asked_settings(config.lora, rank, parts.linears, tables, biased=modules_with_bias(parts))
    _require_equal(asked, adapter.settings, folder)
    return adapter


def initial_told(config: RunConfig, initial: AdapterFolder | None) -> Iterator[Preparing]:
    """What the user should know of the weights that the run begins with."""
    if initial is not None:
        base = initial.base_name or "a base that it does not name"
        settings = initial.settings
        biases = len(settings.biases) + len(settings.targets) * settings.lora_bias
        trained = ([f"{biases} biases"] if biases else []) + (
            [f"{len(settings.norms)} norms"] if settings.norms else []
        )
        more = f", and with the {' and '.join(trained)} that it has trained" if trained else ""
        yield Preparing(what=f"beginning with the adapter {config.lora.init_from}, trained on {base}{more}")
        if (told := variant_told(read_adapter_fields(initial_folder(str(config.lora.init_from))))) is not None:
            yield Preparing(what=told)


def initial_hash(config: RunConfig) -> dict[str, str]:
    """The fingerprint of the adapter that the run begins with, under its name; none where it begins with a new one."""
    if config.lora.init_from is None:
        return {}
    folder = initial_folder(config.lora.init_from)
    return {"initial adapter": json_sha256([sha256_of(folder / name) for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE)])}


def _require_equal(asked: LoraSettings, given: LoraSettings, folder: Path) -> None:
    if (asked.trained_whole, asked.tied_head) != (given.trained_whole, given.tied_head):
        raise _mismatch("lora.modules_to_save", _whole(asked), f"{_whole(given)}, as {folder} has it")
    if asked.targets != given.targets:
        only = sorted(set(asked.targets) ^ set(given.targets))
        found = f"{len(asked.targets)} linears, {len(only)} of them or of the adapter's not in both, such as {only[0]}"
        raise _mismatch("lora.target_modules", found, f"the {len(given.targets)} linears of {folder}")
    if asked.biases != given.biases:
        found = f"biases of {len(asked.biases)} modules"
        raise _mismatch("lora.bias", found, f"those of {len(given.biases)}, as {folder} has them")
    for name in given.targets:
        for key, ours, theirs in (
            ("rank", asked.rank_of(name), given.rank_of(name)),
            ("alpha", asked.alpha_of(name), given.alpha_of(name)),
        ):
            if ours != theirs:
                raise _mismatch(f"lora.{key}_pattern", f"{key} {ours} of {name}", f"{theirs}, as {folder} has it")


def _whole(settings: LoraSettings) -> str:
    num_norms = len(settings.norms)
    shown = f"{num_norms} norms such as {settings.norms[0]}" if num_norms > 2 else ", ".join(settings.norms)
    names = ", ".join(filter(None, (*settings.modules_to_save, shown))) or "nothing"
    return f"{names} trained whole{', as embedding and head in one' * (settings.tied_head is not None)}"


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _as_config(value: Any) -> Any:
    """A JSON value in the form that a config has."""
    if isinstance(value, dict):
        return tuple(value.items())
    if isinstance(value, list):
        return tuple(value) or None
    return value


def _mismatch(where: str, found: str, expected: str) -> ConfigError:
    fix = f"Leave the key out, so that it is taken from {_KEY}, or choose another adapter."
    return ConfigError(where=where, found=found, expected=expected, fix=fix)
