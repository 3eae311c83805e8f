"""Where files that can be made again are kept between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_trainer.errors import StorageError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/qlora_trainer` (by default `~/.cache/qlora_trainer`), made if missing, its owner's alone.

    Raises:
        StorageError: it cannot be made, or belongs to somebody else.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_trainer"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise StorageError(
            where=str(root),
            found=f"a cache folder that cannot be made ({error.strerror})",
            expected="a writable folder",
            fix="Set XDG_CACHE_HOME to a folder that you can write to.",
        ) from error
    if owner != os.getuid():
        raise StorageError(
            where=str(root),
            found=f"a cache folder of user {owner}",
            expected=f"one of user {os.getuid()}, who runs this",
            fix="Set XDG_CACHE_HOME to a folder of your own.",
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
            found=f"a folder that cannot be written ({error.strerror or error})",
            expected=f"room for the tokenised data: {room}",
            fix="Make room, or set XDG_CACHE_HOME to a folder on another disk.",
        ) from error
