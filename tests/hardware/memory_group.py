"""A control group with a memory limit, for a child process; version 1 or 2, whichever this machine has."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """An existing control group."""

    folder: Path

    def add(self, pid: int) -> None:
        """From now on, what process `pid` newly takes counts against the limit; what it has does not."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def num_kills(self) -> int:
        """Processes of the group that the kernel has ended for want of memory."""
        version_1 = self.folder / "memory.oom_control"
        file = version_1 if version_1.is_file() else self.folder / "memory.events"
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts["oom_kill"])


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group for processes that end before the block does.

    Raises:
        OSError: this machine has no memory controller, or lets this user make no group.
    """
    parent, limit_file = _find_parent()
    folder = parent / f"test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / limit_file).write_text(str(limit_bytes))
        yield MemoryGroup(folder)
    finally:
        _remove(folder)


def can_limit_memory() -> bool:
    """Whether a group can be made here and a child put into it: tried, not guessed."""
    try:
        with memory_group(2**26) as group:
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            try:
                group.add(child.pid)
            finally:
                child.communicate()
    except OSError:
        return False
    return True


def _find_parent() -> tuple[Path, str]:
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")  # proc(5)
        mount, (kind, _source, options) = Path(before.split()[4]), after.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return _inside(mount, own["memory"]), "memory.limit_in_bytes"
        if kind == "cgroup2" and "memory" in (mount / "cgroup.controllers").read_text().split():
            return _inside(mount, own[""]), "memory.max"
    raise OSError("no memory controller is mounted")


def _inside(mount: Path, own: str) -> Path:
    # In a container the path may be the host's, with only its end mounted here.
    folder = mount / own.lstrip("/")
    return folder if folder.is_dir() else mount


def _remove(folder: Path) -> None:
    for _ in range(100):  # an ended process stays in its group for a moment
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    folder.rmdir()
