"""One base with the adapters that somebody names: what `generate`, `chat` and `eval` work on.

What can be wrong is looked at in the order of its cost: names and configs, then the base's config and tokenizer, and
its weights last.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.adapter_names import BASE
from qlora_trainer.config.bases import CHAT_TEMPLATE_FILE
from qlora_trainer.config.paths import read_chat_template
from qlora_trainer.config.values import LayerRanges
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.device import DTYPES, ComputeDtype, choose_compute_dtype, choose_device
from qlora_trainer.model.adapter_folder import read_adapter_fields, read_adapter_folder
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.base import Base, fetch_weights, read_tokenizer, require_tokenizer_fits, resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.plain_lora import as_plain_lora
from qlora_trainer.model.repeated_layers import ranges_of
from qlora_trainer.model.trained_tables import base_tables_of, with_updated_tables
from qlora_trainer.run.fingerprints import require_same_base
from qlora_trainer.run.folder import RunFolder, find_adapter

_BaseName = tuple[str, str | None, LayerRanges]  # with a revision, and the layers that are repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedAdapters:
    """Adapters and the base that all of them are for; no weight is read yet.

    Attributes:
        base: its weights may still be on the hub.
        is_base_named: it was named in place of the one that the adapters name.
        double_quant: whether its scales are quantized, too.
        nf4_head: whether its head is in NF4, too.
        folders: the adapter folder of each name.
        tokenizers: of the base under `BASE`, and of each adapter by its name; those differ in the chat template.
    """

    base: Base
    is_base_named: bool
    double_quant: bool
    nf4_head: bool
    folders: Mapping[str, Path]
    tokenizers: Mapping[str, PreTrainedTokenizerBase]


def find_adapters(targets: Mapping[str, Path], *, base: str | None) -> NamedAdapters:
    """Find the base that these adapters share.

    Args:
        targets: a run folder or a PEFT adapter folder of each name.
        base: base to use in place of the one that they name; with no targets it must be given.

    Raises:
        ConfigError: no adapter in a target, adapters of different bases, or no such base.
    """
    folders = {name: find_adapter(target) for name, target in targets.items()}
    named = {name: _base_named(folder) for name, folder in folders.items()}
    resolved = _shared_base(named, folders) if base is None else _named_base(base, named, folders)
    tokenizer = read_tokenizer(resolved.folder)
    require_tokenizer_fits(tokenizer, resolved)
    own = {name: _own_template(folder) for name, folder in folders.items()}
    if tokenizer.chat_template is None:  # a base that was never taught to chat is asked as its adapters are
        tokenizer.chat_template = next((template for template in own.values() if template is not None), None)
    double_quant, nf4_head = _quantization(folders)
    return NamedAdapters(
        base=resolved,
        is_base_named=base is not None,
        double_quant=double_quant,
        nf4_head=nf4_head,
        folders=folders,
        tokenizers={BASE: tokenizer} | {name: with_template(tokenizer, template) for name, template in own.items()},
    )


def load_adapters(named: NamedAdapters, *, compute_dtype: ComputeDtype | None = None) -> AdapterSet:
    """The base with all of these adapters, none of them active, in eval mode.

    Args:
        named: as `find_adapters` found them.
        compute_dtype: of activations and products; None takes the one that is fastest here.

    Raises:
        ConfigError: weights that cannot be read, or that do not fit the base (names the adapter); or a base whose
            content has changed since an adapter's run, unless the base was named.
    """
    device = choose_device()
    base = fetch_weights(named.base)
    cache = prepare_nf4_cache(base, double_quant=named.double_quant, nf4_head=named.nf4_head)
    for folder in () if named.is_base_named else named.folders.values():
        run = RunFolder(folder.parent)
        if folder == run.adapter_path:
            require_same_base(run, cache.key, base_name=base.name)
    model = load_quantized(
        base,
        cache,
        compute_dtype=DTYPES[compute_dtype or choose_compute_dtype(device)],
        device=device,
    )
    model.module.eval()
    adapters, tables = AdapterSet(model), base_tables_of(model)
    for name, folder in named.folders.items():
        adapter = read_adapter_folder(folder, linear_names=list(model.linears), tables=tables, may_change_base=True)
        settings = adapter.settings
        if named.nf4_head and tables.head in (*settings.modules_to_save, settings.tied_head):
            raise ConfigError(
                where=f"adapter {name}",
                found="a head of its own, beside a run whose head is in NF4",
                expected="adapters of one base",
                fix="Take them one at a time.",
            )
        adapter = as_plain_lora(adapter, base.folder)
        adapters.add(name, with_updated_tables(model, adapter, where=f"adapter {name}"))
    return adapters


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """The same tokenizer with another chat template, sharing all else; itself where the template is None."""
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def _base_named(folder: Path) -> _BaseName:
    fields = read_adapter_fields(folder)
    return fields.get("base_model_name_or_path") or "", fields.get("revision"), ranges_of(fields)


def _named_base(base: str, named: Mapping[str, _BaseName], folders: Mapping[str, Path]) -> Base:
    layers = {own[2]: folders[name] for name, own in named.items()}
    if len(layers) > 1:
        first, second = list(layers.values())[:2]
        raise ConfigError(
            where="adapters",
            found=f"{first} and {second}, which repeat other layers of the base (layer_replication)",
            expected="adapters of one base",
            fix="Take them one at a time.",
        )
    return resolve_base(base, with_weights=False, layer_replication=next(iter(layers), ()))


def _shared_base(named: Mapping[str, _BaseName], folders: Mapping[str, Path]) -> Base:
    first = next(iter(named))
    base_name, revision, layers = named[first]
    if not base_name:
        raise ConfigError(
            where=str(folders[first]),
            found="an adapter that names no base",
            expected="the base that it was trained on",
            fix="Name it with --model.",
        )
    for name, other in named.items():
        if other != named[first]:
            texts = [_shown(own) for own in (named[first], other)]
            way = ", or name the base that both were trained on with --model" * (other[2] == layers)
            raise ConfigError(
                where="adapters",
                found=f"{folders[first]} for the base {texts[0]} and {folders[name]} for {texts[1]}",
                expected="adapters of one base",
                fix=f"Take them one at a time{way}.",
            )
    return resolve_base(base_name, revision, with_weights=False, layer_replication=layers)


def _shown(name: _BaseName) -> str:
    base, revision, layers = name
    return f"{base}{f' at {revision}' * bool(revision)}{f' with layers {layers}' * bool(layers)}"


def _own_template(folder: Path) -> str | None:
    """The run's `data.chat_template`, where it had one."""
    path = folder / CHAT_TEMPLATE_FILE
    return read_chat_template(str(path)) if path.is_file() else None


def _quantization(folders: Mapping[str, Path]) -> tuple[bool, bool]:
    """Whether the runs quantized their scales, and their head; an adapter that lies in no run does not tell: the
    defaults are taken.

    Raises:
        ConfigError: one run did and another did not: their bases are not the same.
    """
    told = {folder: choices for folder in folders.values() if (choices := _told_quantization(folder.parent))}
    for number, what in enumerate(("scales", "head")):
        chosen = {choices[number] for choices in told.values()}
        if len(chosen) > 1:
            with_it, without = (next(name for name in told if told[name][number] is one) for one in (True, False))
            raise ConfigError(
                where="adapters",
                found=f"{with_it}, whose run quantized the {what} of its base, and {without}, whose run did not",
                expected="adapters of one base",
                fix="Take them one at a time.",
            )
    return next(iter(told.values()), (True, False))


def _told_quantization(run: Path) -> tuple[bool, bool] | None:
    """The same of one run, whose version may not have known of heads; None where there is none."""
    try:
        plan = json.loads(RunFolder(run).plan_path.read_text())
        double_quant, head = plan.get("double_quant"), plan.get("head")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return (double_quant, head == "nf4") if isinstance(double_quant, bool) else None
