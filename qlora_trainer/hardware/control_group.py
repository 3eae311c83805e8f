"""The memory limit that a container or a service manager has put on this process."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED_BYTES = 2**60  # what version 1 shows for "no limit" depends on the page size, but is above this


def memory_limit_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """The lowest memory limit of this process's control group and those around it; None where there is none.

    Args:
        proc: where `cgroup` and `mountinfo` of the process are.
    """
    own: dict[str, str] = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    limits = []
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")  # proc(5): fields of fixed number, optional ones, " - ", type
        mount, (kind, _source, options) = Path(before.split()[4]), after.split(maxsplit=2)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            limits += _limits(mount, own["memory"], "memory.limit_in_bytes")
        elif kind == "cgroup2" and "" in own:
            limits += _limits(mount, own[""], "memory.max")
    return min(limits, default=None)


def _limits(mount: Path, own: str, file_name: str) -> list[int]:
    # In a container the path may be the host's, of which only the end is mounted: then the mount itself is the group.
    folder = mount / own.lstrip("/")
    folder = folder if folder.is_dir() else mount
    limits = []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(mount):
            break
        try:
            text = (group / file_name).read_text().strip()
        except OSError:  # the topmost group has no such file
            continue
        if text.isdecimal() and int(text) < _UNLIMITED_BYTES:
            limits.append(int(text))
    return limits
