"""Disks that fail on purpose, for everything that writes through `Storage`."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

from qlora_trainer.run.checkpoint.storage import LOCAL


class Crash(BaseException):
    """The process is gone; not an `Exception`, so that no handler of the program tidies up after its own death."""


class Recording:
    """The local file system, with every operation told to `before` first; the base of the faults below."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        self.operations.append(f"{operation} {path.name}")

    def make_dir(self, path: Path) -> None:
        self.before("make_dir", path)
        LOCAL.make_dir(path)

    def open(self, path: Path) -> FileIO:
        self.before("open", path)
        return LOCAL.open(path)

    def write(self, file: FileIO, data: memoryview) -> None:
        self.before("write", Path(os.fsdecode(file.name)))
        LOCAL.write(file, data)

    def fsync(self, file: FileIO) -> None:
        self.before("fsync", Path(os.fsdecode(file.name)))
        LOCAL.fsync(file)

    def fsync_dir(self, path: Path) -> None:
        self.before("fsync_dir", path)
        LOCAL.fsync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target)
        LOCAL.rename(source, target)

    def symlink(self, target_name: str, path: Path) -> None:
        self.before("symlink", path)
        LOCAL.symlink(target_name, path)

    def list_dir(self, path: Path) -> list[str]:
        self.before("list_dir", path)
        return LOCAL.list_dir(path)

    def remove(self, path: Path) -> None:
        self.before("remove", path)
        LOCAL.remove(path)

    def free_bytes(self, path: Path) -> int:
        self.before("free_bytes", path)
        return LOCAL.free_bytes(path)


class CrashAt(Recording):
    """Dies before operation `k` (0 is the first), and at all after it; a write dies half-way."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def before(self, operation: str, path: Path) -> None:
        super().before(operation, path)
        if len(self.operations) > self.k:
            raise Crash(self.operations[-1])

    def write(self, file: FileIO, data: memoryview) -> None:
        if len(self.operations) == self.k:
            LOCAL.write(file, data[: len(data) // 2])
        super().write(file, data)


class FailAt(Recording):
    """The operating system refuses operation `k` with an error number; all others work."""

    def __init__(self, k: int, error_number: int) -> None:
        super().__init__()
        self.k = k
        self.error_number = error_number

    def before(self, operation: str, path: Path) -> None:
        super().before(operation, path)
        if len(self.operations) - 1 == self.k:
            raise OSError(self.error_number, os.strerror(self.error_number), str(path))


class NoSpaceAfter(Recording):
    """The disk is full after so many bytes, though it said before that it is not."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.left_bytes = num_bytes

    def write(self, file: FileIO, data: memoryview) -> None:
        taken = data[: self.left_bytes]
        self.left_bytes -= taken.nbytes
        super().write(file, taken)
        if taken.nbytes < data.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))


class LoseUnsynced(CrashAt):
    """A power loss at operation `k`: renames are kept, bytes that were not fsynced come back as zeros.

    Files are followed by inode, since a directory is renamed after its files are written.
    """

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.unsynced_inodes: set[int] = set()

    def open(self, path: Path) -> FileIO:
        file = super().open(path)
        self.unsynced_inodes.add(os.fstat(file.fileno()).st_ino)
        return file

    def fsync(self, file: FileIO) -> None:
        super().fsync(file)
        self.unsynced_inodes.discard(os.fstat(file.fileno()).st_ino)

    def lose(self, folder: Path) -> None:
        """What the disk holds after the power is back."""
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_ino in self.unsynced_inodes:
                path.write_bytes(bytes(path.stat().st_size))
