"""Where files that can be made again are kept between runs."""

from __future__ import annotations

import os
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
