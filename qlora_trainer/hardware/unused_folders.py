"""Keeps a folder of sealed folders (see `sealed_folder`) small: those go that were used longest ago.

What a process has open holds a shared lock on a file of its folder, which the kernel takes back however the process
ends. A folder goes only if nobody holds one; and it is renamed first, so that it is whole or not there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from qlora_trainer.hardware.sealed_folder import MANIFEST, remove_abandoned

_ASIDE = ".unused-"
_JUST_USED_SECONDS = 3600  # whoever has just made or found one may not have opened it yet


def mark_used(folder: Path, descriptor: int) -> None:
    """Notes that a sealed folder is used now, and as long as `descriptor`, an open file of it, stays open.

    A file system without locks is no error: folders on it can still be opened, and are then never found unlocked.
    """
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    with suppress(OSError):  # it was removed meanwhile; or is nobody's to change
        os.utime(folder / MANIFEST)


def num_bytes_of(folder: Path) -> int:
    """Bytes of the files in a folder and below; what goes away meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return total


def remove_unused(parent: Path, *, most_bytes: int, lock_name: str) -> list[Path]:
    """Removes sealed folders of `parent` beyond `most_bytes`, the one that was used longest ago first.

    What killed processes left there goes, too, a day after they wrote last.

    Args:
        parent: holds them.
        most_bytes: of all that stay; more stays where more is in use.
        lock_name: the file in each whose lock `mark_used` holds.

    Returns:
        What was removed.
    """
    for aside in parent.glob(f"{_ASIDE}*"):  # by one that was killed over it
        shutil.rmtree(aside, ignore_errors=True)
    for pattern in (".tmp-*", ".damaged-*"):
        remove_abandoned(parent, pattern)
    used: list[tuple[float, Path]] = []
    for manifest in parent.glob(f"*/{MANIFEST}"):
        if not manifest.parent.name.startswith("."):
            with suppress(OSError):
                used.append((manifest.stat().st_mtime, manifest.parent))
    removed, total = [], 0
    for last_used, folder in sorted(used, reverse=True):
        num_bytes = num_bytes_of(folder)
        is_idle = time.time() - last_used > _JUST_USED_SECONDS
        if total + num_bytes > most_bytes and is_idle and _remove(folder, lock_name):
            removed.append(folder)
        else:
            total += num_bytes
    return removed


def _remove(folder: Path, lock_name: str) -> bool:
    """Whether nobody used it, and it is gone."""
    try:
        descriptor = os.open(folder / lock_name, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = folder.with_name(f"{_ASIDE}{uuid.uuid4().hex}")
        folder.rename(aside)
    except OSError:  # BlockingIOError: it is in use
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(aside, ignore_errors=True)
    return True
