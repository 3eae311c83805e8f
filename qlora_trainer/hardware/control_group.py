"""The memory limit that a container or a service manager has put on this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 2**60  # what version 1 shows for "no limit" depends on the page size, but is above this


@dataclass(frozen=True, slots=True)
class _LimitedGroup:
    """A control group that has a memory limit.

    Attributes:
        limit_bytes: of all its processes.
        held_bytes: that they have now and the kernel cannot drop: anonymous memory, and shared memory with tmpfs. File
            pages can be dropped; the kernel's own memory, of which little cannot be, is not counted.
    """

    limit_bytes: int
    held_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.held_bytes)


def memory_limit_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """The lowest memory limit of this process's control group and those around it; None where there is none.

    Args:
        proc: where `cgroup` and `mountinfo` of the process are.
    """
    return min((group.limit_bytes for group in _limited_groups(proc)), default=None)


def memory_free_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """What the limits of this process's control group and of those around it still leave; None where there is none.

    Args:
        proc: as of `memory_limit_bytes`.
    """
    return min((group.free_bytes for group in _limited_groups(proc)), default=None)


def _limited_groups(proc: Path) -> list[_LimitedGroup]:
    try:
        memberships, mounts = (proc / "cgroup").read_text(), (proc / "mountinfo").read_text()
    except OSError:  # no Linux, or a /proc that hides them
        return []
    own: dict[str, str] = {}
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    groups: list[_LimitedGroup] = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")  # proc(5): fields of fixed number, optional ones, " - ", type
        mount, (kind, _source, options) = Path(before.split()[4]), after.split(maxsplit=2)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            groups += _limits(mount, own["memory"], "memory.limit_in_bytes", ("total_rss", "total_shmem"))
        elif kind == "cgroup2" and "" in own:
            groups += _limits(mount, own[""], "memory.max", ("anon", "shmem"))
    return groups


def _limits(mount: Path, own: str, file_name: str, counters: Collection[str]) -> Iterator[_LimitedGroup]:
    # In a container the path may be the host's, of which only the end is mounted: then the mount itself is the group.
    folder = mount / own.lstrip("/")
    folder = folder if folder.is_dir() else mount
    for group in (folder, *folder.parents):
        if not group.is_relative_to(mount):
            break
        try:
            text = (group / file_name).read_text().strip()
        except OSError:  # the topmost group has no such file
            continue
        if text.isdecimal() and int(text) < _UNLIMITED_BYTES:
            yield _LimitedGroup(int(text), _counted(group / "memory.stat", counters))


def _counted(path: Path, names: Collection[str]) -> int:
    """The sum of those counters: no two of the kernel's (Documentation/admin-guide/cgroup-v*) count the same page."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(number) for name, number in map(str.split, lines) if name in names)
