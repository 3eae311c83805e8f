"""What a finished run was made of, as its checkpoints say."""

from __future__ import annotations

from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.run.checkpoint.listing import linked_step
from qlora_trainer.run.checkpoint.manifest import read_manifest
from qlora_trainer.run.folder import RunFolder


def saved_fingerprints(run: RunFolder) -> dict[str, str]:
    """Hashes of base, tokenizer, data and config, from the best or the last checkpoint; empty where none is left."""
    for link in ("best", "last"):
        step = linked_step(run.checkpoints_path, link)
        if step is None or "/" in step:
            continue
        try:
            return dict(read_manifest(run.checkpoints_path / step).fingerprints)
        except (OSError, ValueError, StorageError):
            continue
    return {}


def require_same_base(run: RunFolder, base_hash: str, *, base_name: str) -> None:
    """Refuse a base whose content is not what the run was trained on, as far as it left a checkpoint that tells.

    Args:
        run: whose adapter is to be put onto the base.
        base_hash: key of the NF4 form of the base as it is now.
        base_name: what the base is called.

    Raises:
        ConfigError: names both hashes.
    """
    trained_on = saved_fingerprints(run).get("base", base_hash)
    if trained_on != base_hash:
        raise ConfigError(
            where=str(run.adapter_path),
            found=f"another base than the adapter was trained on (sha256: {trained_on[:12]} -> {base_hash[:12]})",
            expected=f"the content that {base_name} had then",
            fix="Restore the base, or name another one with --model if you mean it.",
        )
