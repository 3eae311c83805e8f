"""What is exported or merged: an adapter, the base it belongs to, and the run that made it, where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from qlora_trainer.config.bases import CHAT_TEMPLATE_FILE
from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import read_chat_template
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_fit import base_tables, require_adapter_fits
from qlora_trainer.model.adapter_folder import AdapterFolder, read_adapter_fields, read_adapter_folder, require_whole
from qlora_trainer.model.adapter_variants import Variant
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.model.base_config import read_config
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.plain_lora import as_plain_lora
from qlora_trainer.model.repeated_layers import ranges_of
from qlora_trainer.model.skeleton import Parts, build_skeleton, find_parts
from qlora_trainer.model.table_names import BaseTables
from qlora_trainer.model.table_updates import TableUpdate
from qlora_trainer.run.folder import RunFolder, find_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An adapter that fits its base.

    Attributes:
        folder: the PEFT folder it was read from.
        run: the run it is the result of, or None.
        config: of that run, every `auto` resolved; None without a run.
        base: its weights may still be on the hub.
        base_name, revision: what the adapter calls its base.
        parts: of the base.
        skeleton: of the base, on meta.
        settings: what the adapter is.
        weights: by our names, see `model.adapter_folder.adapter_tensors`.
        chat_template: where it is not the base's own.
        updates: of tables whose weights are to be made (see `model.table_updates`).
        variant: see `AdapterFolder`; None once `with_plain_lora` has seen it.
    """

    folder: Path
    run: RunFolder | None
    config: RunConfig | None
    base: Base
    base_name: str
    revision: str | None
    parts: Parts
    skeleton: PreTrainedModel
    settings: LoraSettings
    weights: Mapping[str, Tensor]
    chat_template: str | None
    updates: Mapping[str, TableUpdate] = field(default_factory=dict)
    variant: Variant | None = None

    @property
    def tables(self) -> BaseTables:
        """What `modules_to_save` may name."""
        return base_tables(self.parts)


def read_source(target: Path, *, model: str | None, may_change_base: bool = False) -> Source:
    """Read an adapter and see that it fits its base; no weight of the base is read or fetched.

    Args:
        target: a run folder, or a PEFT adapter folder.
        model: base to use in place of the one that the adapter names.
        may_change_base: see `read_adapter_folder`.

    Raises:
        ConfigError: no adapter in `target`, only a pickled one, one of a kind that is not computed here, no such base,
            or one that the adapter does not fit.
    """
    folder = find_adapter(target)
    run = _run_of(folder)
    fields = read_adapter_fields(folder)
    base_name, revision = fields.get("base_model_name_or_path") or "", fields.get("revision")
    if model is None and not base_name:
        raise ConfigError(
            where=str(folder), found="an adapter that names no base", expected="its base", fix="Give it with --model."
        )
    base = resolve_base(
        model or base_name, None if model else revision, with_weights=False, layer_replication=ranges_of(fields)
    )
    skeleton = build_skeleton(base.config, with_buffers=False)
    parts = find_parts(skeleton)
    tables = base_tables(parts)
    adapter = read_adapter_folder(folder, linear_names=parts.linears, tables=tables, may_change_base=True)
    require_adapter_fits(skeleton, adapter, where=str(folder))  # first: what no base can hold is not to be merged
    if not may_change_base:
        require_whole(adapter, folder)
    template = folder / CHAT_TEMPLATE_FILE
    return Source(
        folder=folder,
        run=run,
        config=None if run is None else load_config(run.config_path),
        base=base,
        base_name=model or base_name,
        revision=None if model else revision,
        parts=parts,
        skeleton=skeleton,
        settings=adapter.settings,
        weights=adapter.weights,
        chat_template=read_chat_template(str(template)) if template.is_file() else None,
        updates=adapter.updates,
        variant=adapter.variant,
    )


def with_plain_lora(source: Source, base: Base) -> Source:
    """The same, of plain LoRA in any case.

    Args:
        source: as it was read.
        base: its base, the weights of which are on disk where `source.variant` is one.

    Raises:
        ConfigError: see `as_plain_lora`.
    """
    weights, settings = dict(source.weights), source.settings
    adapter = AdapterFolder(source.base_name, source.revision, settings, weights, source.updates, source.variant)
    plain = as_plain_lora(adapter, base.folder)
    return replace(source, weights=plain.weights, updates=plain.updates, variant=None)


def _run_of(folder: Path) -> RunFolder | None:
    """The run whose `adapter/` this is."""
    run = RunFolder(folder.parent)
    return run if folder.name == run.adapter_path.name and run.config_path.is_file() else None


def readers_told(base: Base, settings: LoraSettings) -> str | None:
    """What to tell of an adapter that others may not read as it is; None for any other."""
    if (trouble := peft_trouble(base)) is not None:
        return trouble
    if not settings.invocation_tokens:
        return None
    return (
        "PEFT 0.18 or later works from its invocation tokens on; a reader that does not know them works at every token"
    )


def peft_trouble(base: Base) -> str | None:
    """What to tell of an adapter with repeated layers that PEFT makes no running model of; None for any other.

    PEFT 0.21 leaves `layer_types` of the config as long as it was, and transformers asks it for each layer.
    """
    has_types = getattr(base.config, "layer_types", None) is not None
    if not has_types or base.config.num_hidden_layers <= read_config(base.folder).num_hidden_layers:
        return None
    return f"PEFT 0.21 cannot run repeated layers of {base.config.model_type}: use qlora-trainer, or merge it"
