"""The memory limit that a container or a service manager has put on this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 2**60  # what version 1 shows for "no limit" depends on the page size, but is above this


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """A control group that has a memory limit.

    Attributes:
        limit_bytes: of all its processes.
        anonymous_bytes: that they have now, without the file pages that the kernel can drop.
    """

    limit_bytes: int
    anonymous_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.anonymous_bytes)


def memory_limit_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """The lowest memory limit of this process's control group and those around it; None where there is none.

    Args:
        proc: where `cgroup` and `mountinfo` of the process are.
    """
    return min((group.limit_bytes for group in _limited_groups(proc)), default=None)


def memory_free_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """What those limits still leave; None where there is none."""
    return min((group.free_bytes for group in _limited_groups(proc)), default=None)


def _limited_groups(proc: Path) -> list[GroupMemory]:
    try:
        memberships, mounts = (proc / "cgroup").read_text(), (proc / "mountinfo").read_text()
    except OSError:  # no Linux, or a /proc that hides them
        return []
    own: dict[str, str] = {}
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    groups: list[GroupMemory] = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")  # proc(5): fields of fixed number, optional ones, " - ", type
        mount, (kind, _source, options) = Path(before.split()[4]), after.split(maxsplit=2)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            groups += _limits(mount, own["memory"], "memory.limit_in_bytes", "total_rss")
        elif kind == "cgroup2" and "" in own:
            groups += _limits(mount, own[""], "memory.max", "anon")
    return groups


def _limits(mount: Path, own: str, file_name: str, counter: str) -> Iterator[GroupMemory]:
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
            yield GroupMemory(int(text), _count(group / "memory.stat", counter))


def _count(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
