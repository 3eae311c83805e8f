"""Which checkpoints a folder holds, by name alone, and the links that point at two of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qlora_trainer.run.checkpoint.storage import TEMPORARY_PREFIX, Storage

_STEP_NAME = re.compile(r"step-([0-9]{8,})")


def step_name(step: int) -> str:
    """The directory name of a checkpoint; names sort as the numbers do up to step 99,999,999."""
    return f"step-{step:08d}"


def list_steps(folder: Path, storage: Storage) -> list[tuple[int, Path]]:
    """Checkpoints by step number, lowest first; modification times are never looked at. Nothing is verified here."""
    steps = []
    for name in storage.list_dir(folder):
        match = _STEP_NAME.fullmatch(name)
        if match and name == step_name(int(match[1])):
            steps.append((int(match[1]), folder / name))
    return sorted(steps)


def point(folder: Path, link_name: str, step: int, storage: Storage) -> None:
    """Let `folder/link_name` (best, last) point at a step, atomically."""
    temporary = folder / f"{TEMPORARY_PREFIX}{link_name}"
    storage.symlink(step_name(step), temporary)
    storage.rename(temporary, folder / link_name)
    storage.fsync_dir(folder)


def linked_step(folder: Path, link_name: str) -> str | None:
    """The directory name that a link points at, or None where there is no such link."""
    link = folder / link_name
    return os.readlink(link) if link.is_symlink() else None
