"""The few file operations that a checkpoint is made of, as a seam: tests crash, fill up or power off below it.

Production uses `LOCAL`. There are no fault hooks anywhere else: what can go wrong, goes wrong in one of these calls.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from qlora_trainer.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"  # whatever begins so is unfinished business of a run that is gone; `sweep` removes it


class Storage(Protocol):
    """What `save`, `rotate` and `load` may do to a file system. Every operation may raise `OSError`."""

    def make_dir(self, path: Path) -> None:
        """Create one directory that does not exist yet."""

    def open(self, path: Path) -> FileIO:
        """Create a file that does not exist yet, for unbuffered writing."""

    def write(self, file: FileIO, data: memoryview) -> None:
        """Write all of `data` at the end of `file`."""

    def fsync(self, file: FileIO) -> None:
        """Return when the file's bytes are on the disk."""

    def fsync_dir(self, path: Path) -> None:
        """Return when the directory's entries (not the files' bytes) are on the disk."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically; an existing file or link at `target` is replaced."""

    def symlink(self, target_name: str, path: Path) -> None:
        """Create a relative symbolic link at `path`."""

    def list_dir(self, path: Path) -> list[str]:
        """Names in a directory, sorted."""

    def remove(self, path: Path) -> None:
        """Remove one file, link or empty directory."""

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write to the file system of `path`."""


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """`Storage` over the operating system."""

    def make_dir(self, path: Path) -> None:
        path.mkdir()

    def open(self, path: Path) -> FileIO:
        return FileIO(path, "xb")

    def write(self, file: FileIO, data: memoryview) -> None:
        remaining = data
        while remaining:  # write(2) may take less than it was given, 2 GiB at most
            remaining = remaining[os.write(file.fileno(), remaining) :]

    def fsync(self, file: FileIO) -> None:
        os.fsync(file.fileno())

    def fsync_dir(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def symlink(self, target_name: str, path: Path) -> None:
        path.symlink_to(target_name)

    def list_dir(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def remove(self, path: Path) -> None:
        if _is_real_directory(path):
            path.rmdir()
        else:
            path.unlink()

    def free_bytes(self, path: Path) -> int:
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize


LOCAL = LocalStorage()


def remove_tree(path: Path, storage: Storage) -> None:
    """Remove a directory and all in it, one operation after the other; links are removed, never followed."""
    if _is_real_directory(path):
        for name in storage.list_dir(path):
            remove_tree(path / name, storage)
    storage.remove(path)


def sweep(folder: Path, storage: Storage) -> None:
    """Remove what a run that died left unfinished in `folder`; the caller holds the run folder's lock."""
    for name in storage.list_dir(folder):
        if name.startswith(TEMPORARY_PREFIX):
            remove_tree(folder / name, storage)


def write_new(path: Path, pieces: Iterable[memoryview], storage: Storage) -> None:
    """Write a file that does not exist yet, and return when its bytes are on the disk."""
    with storage.open(path) as file:
        for piece in pieces:
            storage.write(file, piece)
        storage.fsync(file)


def write_atomically(path: Path, data: bytes, storage: Storage = LOCAL) -> None:
    """Replace a file so that a crash or a power loss leaves either the old or the new one, whole.

    Args:
        path: the file; its directory exists.
        data: the new contents.
        storage: where to write.

    Raises:
        StorageError: the disk refused; the old file is untouched and nothing is left over.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        if temporary.exists():  # left by a crash; `open` insists on a new file
            storage.remove(temporary)
        write_new(temporary, [memoryview(data)], storage)
        storage.rename(temporary, path)
        storage.fsync_dir(path.parent)
    except OSError as error:
        with suppress(OSError):  # the first refusal is the one to tell
            temporary.unlink()
        raise refusal(error, where=path, doing="writing it") from error


def check_free_space(
    folder: Path,
    num_bytes: int,
    storage: Storage = LOCAL,
    *,
    what: str = "a checkpoint",
    fix: str = "Free some space or choose another output.dir; then resume.",
) -> None:
    """Refuse a write that the disk cannot hold, before it starts.

    Args:
        folder: an existing directory on the file system to be written to.
        num_bytes: bytes about to be written; a tenth more is asked for (file system overhead, and other writers).
        storage: where to look.
        what: is about to be written.
        fix: what the user can do.

    Raises:
        StorageError: too little is free; names the bytes needed and free.
    """
    needed_bytes = num_bytes * 11 // 10
    free_bytes = storage.free_bytes(folder)
    if free_bytes < needed_bytes:
        raise StorageError(
            where=str(folder),
            found=f"{free_bytes:,} bytes free on its disk",
            expected=f"at least {needed_bytes:,} bytes ({what} of {num_bytes:,} and a tenth more)",
            fix=fix,
        )


def refusal(error: OSError, *, where: Path, doing: str, place: str = "output.dir") -> StorageError:
    """Tell a user what the operating system refused.

    Args:
        error: what it raised.
        where: the file or folder that was being worked on.
        doing: the work, as in "writing the checkpoint".
        place: what the user chooses another of.
    """
    fixes = {
        errno.ENOSPC: f"Free some space or choose another {place}.",
        errno.EDQUOT: f"Free some of your quota or choose another {place}.",
        errno.EFBIG: "Raise the limit on file sizes (ulimit -f).",
        errno.EROFS: f"Choose another {place}, on a file system that can be written to.",
        errno.EACCES: f"Choose another {place}, that you may write to.",
        errno.EPERM: f"Choose another {place}, that you may write to.",
        errno.EIO: "The disk reports a fault: copy the run folder elsewhere and look at the kernel's log.",
    }
    return StorageError(
        where=str(where),
        found=f"{(error.strerror or str(error)).lower()} while {doing}",
        expected="a folder that takes it",
        fix=fixes.get(error.errno or 0, "Look at the folder and its disk, then start again."),
    )


def _is_real_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)
