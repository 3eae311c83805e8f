"""Where files that can be made again are kept between runs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_trainer.errors import StorageError

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OWNERS_ALONE = stat.S_IRWXU


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/qlora_trainer` (by default `~/.cache/qlora_trainer`), made if missing, its owner's alone.

    What lies in it is trusted: compiled kernels are loaded as code, hashes of bases are believed. So a folder that
    somebody else may have put something into is refused, not closed; one that others can only read is closed, and with
    it every folder within, whatever its own rights.

    Raises:
        StorageError: it cannot be made, it or the link to it belongs to somebody else, or others may write to it.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_trainer"
    try:
        root.mkdir(mode=_OWNERS_ALONE, parents=True, exist_ok=True)
        found = root.stat()
        owners = {found.st_uid, root.lstat().st_uid}
        others_may_write = bool(found.st_mode & _OTHERS_MAY_WRITE)
        if owners == {os.getuid()} and not others_may_write and stat.S_IMODE(found.st_mode) != _OWNERS_ALONE:
            with suppress(PermissionError):  # a disk that keeps no modes gives everything within the same one
                root.chmod(_OWNERS_ALONE)
    except OSError as error:
        raise StorageError(
            where=str(root),
            found=f"a cache folder that cannot be made ({error.strerror})",
            expected="a writable folder",
            fix="Set XDG_CACHE_HOME to a folder that you can write to.",
        ) from error
    for owner in owners - {os.getuid()}:
        raise StorageError(
            where=str(root),
            found=f"a cache folder of user {owner}",
            expected=f"one of user {os.getuid()}, who runs this",
            fix="Set XDG_CACHE_HOME to a folder of your own.",
        )
    if others_may_write:
        raise StorageError(
            where=str(root),
            found=f"a cache folder that others may write to (mode {stat.S_IMODE(found.st_mode):o})",
            expected=f"mode {_OWNERS_ALONE:o}, since code is loaded from it",
            fix=(
                f"Remove it, all in it is made again: rm -r {root}; if nobody else has been there: chmod 700 {root}; "
                "on a disk that keeps no modes, set XDG_CACHE_HOME to another one."
            ),
        )
    return root


@contextmanager
def writing_told(folder: Path, *, room: str) -> Iterator[None]:
    """Tells a disk without room, or a folder that is not ours, in one line.

    Args:
        folder: of the cache.
        room: how much the tokenised data takes of it.

    Raises:
        StorageError: something within could not be written or opened.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            where=str(folder),
            found=f"a folder that cannot be written ({error.strerror or error}{_free_told(folder, error)})",
            expected=f"room for the tokenised data: {room}",
            fix="Make room, or set XDG_CACHE_HOME to a folder on another disk.",
        ) from error


def _free_told(folder: Path, error: OSError) -> str:
    """How much room there is where the folder is, or would be, if that is what is missing."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"; {shutil.disk_usage(there).free:,} bytes are free"
