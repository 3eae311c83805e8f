"""What a finished run was made of, as its checkpoints say."""

from __future__ import annotations

from qlora_trainer.errors import StorageError
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
