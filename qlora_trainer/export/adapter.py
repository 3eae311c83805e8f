"""`export`: an adapter as a PEFT folder with a model card, as a GGUF file, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE, CHAT_TEMPLATE_FILE
from qlora_trainer.export.card import CARD_NAME, model_card
from qlora_trainer.export.gguf_adapter import gguf_architecture, write_gguf
from qlora_trainer.export.modelfile import MODELFILE_NAME, write_modelfile
from qlora_trainer.export.new_folder import differs, digest_of, new_folder, write_checked, write_tensors_checked
from qlora_trainer.export.portable import portable_adapter, require_portable
from qlora_trainer.export.source import Source, read_source, readers_told, with_plain_lora
from qlora_trainer.model.adapter_config import adapter_config
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, adapter_tensors, read_adapter_folder
from qlora_trainer.model.base import fetch_weights
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.run.checkpoint.storage import LOCAL, Storage


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        paths: folder and files, in the order they were written.
        num_bytes: of all of it.
        settings: of the adapter as it was written.
        trouble: that others have with it, see `readers_told`.
    """

    paths: tuple[Path, ...]
    num_bytes: int
    settings: LoraSettings
    trouble: str | None = None


def export(
    target: Path,
    *,
    to: Path | None,
    portable: bool,
    gguf: Path | None,
    ollama: bool,
    model: str | None,
    storage: Storage = LOCAL,
) -> Exported:
    """Write an adapter in other forms; what is written is read back and compared.

    Args:
        target: a run folder, or a PEFT adapter folder.
        to: where the PEFT folder goes, absolute, new or empty; None for none.
        portable: scales are folded into the weights, see `export.portable`.
        gguf: where the GGUF file goes, absolute, new; None for none. It is portable in any case.
        ollama: a Modelfile beside it.
        model: base to use in place of the one that the adapter names.
        storage: where to write.

    Raises:
        ConfigError: no adapter in `target`, one that does not fit its base, or one that has no such form.
        StorageError: the disk refused, or what is read back is not what was written; nothing of that form is left.
    """
    source = read_source(target, model=model)
    if source.variant is not None:
        source = with_plain_lora(source, fetch_weights(source.base))
    settings, weights = source.settings, source.weights
    plain = None
    if portable or gguf is not None:
        # llama.cpp knows invocation tokens, which other readers of a portable folder do not.
        of_file = source.settings if portable else replace(source.settings, invocation_tokens=())
        require_portable(of_file, source.folder)
        plain = portable_adapter(source.settings, source.weights)
    if gguf is not None:
        gguf_architecture(source.base.config)  # refused before anything is written
    if portable and plain is not None:
        settings, weights = plain
    paths: list[Path] = []
    if to is not None:
        write_peft_folder(to, source, settings, weights, portable=portable, storage=storage)
        paths.append(to)
    if gguf is not None and plain is not None:
        settings = plain[0] if to is None else settings
        write_gguf(gguf, *plain, config=source.base.config, base_name=source.base_name, storage=storage)
        paths.append(gguf)
        if ollama:
            write_modelfile(gguf, source, storage=storage)
            paths.append(gguf.with_name(MODELFILE_NAME))
    return Exported(tuple(paths), sum(map(_num_bytes, paths)), settings, readers_told(source.base, settings))


def write_peft_folder(
    folder: Path,
    source: Source,
    settings: LoraSettings,
    weights: Mapping[str, Tensor],
    *,
    portable: bool,
    storage: Storage,
) -> None:
    """An adapter with its model card.

    Args:
        folder: new or empty.
        source: its base and its run.
        settings, weights: what is written.
        portable: whether scales were folded into the weights, for the card.
        storage: where to write.

    Raises:
        StorageError: the disk refused, or what is read back is not what was written; nothing is left.
    """
    config = adapter_config(
        settings, linear_names=source.parts.linears, base_name=source.base_name, revision=source.revision
    )
    tensors = adapter_tensors(weights, settings)
    with new_folder(folder, storage, key="--to", doing="exporting the adapter") as temporary:
        write_tensors_checked(temporary / WEIGHTS_FILE, tensors, tensors, storage)
        write_checked(temporary / ADAPTER_CONFIG_FILE, config, storage)
        if source.chat_template is not None:
            write_checked(temporary / CHAT_TEMPLATE_FILE, source.chat_template.encode(), storage)
        write_checked(
            temporary / CARD_NAME, model_card(source, settings, title=folder.name, portable=portable), storage
        )
        _require_same(temporary, source, settings, weights)


def _require_same(folder: Path, source: Source, settings: LoraSettings, weights: Mapping[str, Tensor]) -> None:
    """Read the folder as any adapter is read."""
    found = read_adapter_folder(folder, linear_names=source.parts.linears, tables=source.tables)
    if (found.settings, found.base_name, found.revision) != (settings, source.base_name, source.revision):
        raise differs(folder / ADAPTER_CONFIG_FILE, "other settings than were written")
    expected = {name: digest_of(tensor) for name, tensor in weights.items()}
    if {name: digest_of(tensor) for name, tensor in found.weights.items()} != expected:
        raise differs(folder / WEIGHTS_FILE, "other weights than were written")


def _num_bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
