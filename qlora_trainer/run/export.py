"""The adapter that a run leaves behind, as a PEFT folder: whole or not at all, and fsynced through the storage seam.

It can be made again from the checkpoints, so a disk that refuses it costs nothing but another try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE, CHAT_TEMPLATE_FILE
from qlora_trainer.model.adapter_config import adapter_config
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, adapter_tensors
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.run.checkpoint.storage import LOCAL, TEMPORARY_PREFIX, Storage, refusal, remove_tree, write_new
from qlora_trainer.run.checkpoint.tensors import lay_out, render


def export_adapter(
    folder: Path,
    weights: Mapping[str, Tensor],
    settings: LoraSettings,
    *,
    linear_names: Sequence[str],
    base_name: str,
    revision: str | None,
    chat_template: str | None = None,
    storage: Storage = LOCAL,
) -> None:
    """Write a PEFT folder, in place of one that is there.

    Args:
        folder: where; the folder above exists, and its `.tmp-…` are swept at the next start.
        weights: `{target}.lora_A` [R, I] and `{target}.lora_B` [O, R].
        settings: rank, alpha, dropout, targets.
        linear_names: every linear of the base, to write targets as short names where that means the same.
        base_name, revision: what to call the base.
        chat_template: kept beside it where it is not the base's own: later questions are asked as those trained on.
        storage: where to write.

    Raises:
        StorageError: the disk is full, or refuses; nothing half-written is left.
    """
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    replaced = folder.with_name(f"{TEMPORARY_PREFIX}replaced-{folder.name}")
    tensors = adapter_tensors(weights, settings)
    config = adapter_config(settings, linear_names=linear_names, base_name=base_name, revision=revision)
    try:
        storage.make_dir(temporary)
        write_new(temporary / WEIGHTS_FILE, render(tensors, lay_out(tensors)), storage)
        write_new(temporary / ADAPTER_CONFIG_FILE, [memoryview(config)], storage)
        if chat_template is not None:
            write_new(temporary / CHAT_TEMPLATE_FILE, [memoryview(chat_template.encode())], storage)
        storage.fsync_dir(temporary)
        if folder.name in storage.list_dir(folder.parent):  # a folder cannot be renamed over another
            storage.rename(folder, replaced)
        storage.rename(temporary, folder)
        storage.fsync_dir(folder.parent)
        if replaced.exists():
            remove_tree(replaced, storage)
    except OSError as error:
        for left_over in (temporary, replaced):
            with suppress(OSError):  # the first refusal is the one to tell
                remove_tree(left_over, storage)
        doing = "exporting the adapter (the checkpoints are intact: --resume auto exports it)"
        raise refusal(error, where=folder, doing=doing) from error
