"""The memory limit of this process's control group, as both versions of control groups show it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_trainer.hardware.control_group import memory_free_bytes, memory_limit_bytes
from tests.hardware.memory_group import can_limit_memory, memory_group

REPOSITORY = Path(__file__).parents[2]
PRINT_LIMIT = """
import sys
sys.stdin.readline()
from qlora_trainer.hardware.control_group import memory_limit_bytes
print(memory_limit_bytes())
"""


def write_proc(folder: Path, *, cgroup: str, mounts: list[str]) -> Path:
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    mountinfo = [f"{30 + index} 1 0:5 / {mount}\n" for index, mount in enumerate(mounts)]
    (proc / "mountinfo").write_text("".join(mountinfo))
    return proc


def write_limits(mount: Path, file_name: str, limits: dict[str, str]) -> None:
    for group, limit in limits.items():
        (mount / group).mkdir(parents=True, exist_ok=True)
        (mount / group / file_name).write_text(f"{limit}\n")


def test_version_2_takes_the_lowest_limit_of_the_groups_around(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    write_limits(mount, "memory.max", {"a": "4096", "a/b": "1024", "a/b/c": "max", "other": "1"})
    proc = write_proc(tmp_path, cgroup="0::/a/b/c\n", mounts=[f"{mount} rw shared:4 - cgroup2 cgroup2 rw"])

    assert memory_limit_bytes(proc) == 1024


def test_version_1_is_read_from_the_memory_controller(tmp_path: Path) -> None:
    memory, cpu = tmp_path / "memory", tmp_path / "cpu"
    write_limits(memory, "memory.limit_in_bytes", {".": str(2**63 - 4096), "jobs/mine": "8192"})
    write_limits(cpu, "memory.limit_in_bytes", {"jobs/mine": "1"})
    proc = write_proc(
        tmp_path,
        cgroup="5:cpu,cpuacct:/jobs/mine\n4:memory:/jobs/mine\n0::/\n",
        mounts=[f"{cpu} rw - cgroup cgroup rw,cpu,cpuacct", f"{memory} rw - cgroup cgroup rw,memory"],
    )

    assert memory_limit_bytes(proc) == 8192


def test_in_a_container_the_mount_itself_is_the_group(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    write_limits(mount, "memory.max", {".": "2048"})
    proc = write_proc(tmp_path, cgroup="0::/host/docker/1234\n", mounts=[f"{mount} rw - cgroup2 cgroup2 rw"])

    assert memory_limit_bytes(proc) == 2048


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_free_is_that_of_the_tightest_group(tmp_path: Path, version: int) -> None:
    """File pages do not count, which the kernel can drop; those of tmpfs do, which it cannot.

    Mutations tried: `memory.current`, which has all of them; anonymous memory alone.
    """
    mount = tmp_path / "cgroup"
    file_name, anonymous, shared = (
        ("memory.limit_in_bytes", "total_rss", "total_shmem") if version == 1 else ("memory.max", "anon", "shmem")
    )
    write_limits(mount, file_name, {"a": "4096", "a/b": "2048"})
    for group, num_bytes in (("a", 3000), ("a/b", 500)):
        stat = f"file 9999\n{anonymous} {num_bytes}\n{shared} 96\nrss_huge 7\n"
        (mount / group / "memory.stat").write_text(stat)
    kind = "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup2 rw"
    proc = write_proc(tmp_path, cgroup="4:memory:/a/b\n0::/a/b\n", mounts=[f"{mount} rw - {kind}"])

    assert memory_limit_bytes(proc) == 2048
    assert memory_free_bytes(proc) == 4096 - 3000 - 96


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    mount = tmp_path / "cgroup"
    write_limits(mount, "memory.max", {"a": limit})
    proc = write_proc(tmp_path, cgroup="0::/a\n", mounts=[f"{mount} rw - cgroup2 cgroup2 rw"])

    assert memory_limit_bytes(proc) is None
    assert memory_free_bytes(proc) is None


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit_bytes(write_proc(tmp_path, cgroup="", mounts=["/ rw - ext4 /dev/sda rw"])) is None


@pytest.mark.skipif(not can_limit_memory(), reason="this machine lets this user make no memory-limited control group")
def test_a_process_in_a_real_group_finds_its_limit() -> None:
    with memory_group(300 * 2**20) as group:
        child = subprocess.Popen(
            [sys.executable, "-c", PRINT_LIMIT],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        group.add(child.pid)
        printed, _ = child.communicate("go\n", timeout=60)

    assert printed.strip() == str(300 * 2**20)


@pytest.mark.skipif(not can_limit_memory(), reason="this user can make no memory-limited control group")
@pytest.mark.parametrize("num_bytes, num_kills", [(2**20, 0), (2**28, 1)])
def test_the_kernel_counts_what_it_ends(num_bytes: int, num_kills: int) -> None:
    """Also of a grandchild, whose end the parent need not notice."""
    take = f"bytearray(b'1') * {num_bytes}"
    child = f"import subprocess, sys; sys.stdin.readline(); subprocess.run([sys.executable, '-S', '-c', {take!r}])"
    with memory_group(2**26) as group:
        with subprocess.Popen([sys.executable, "-S", "-c", child], stdin=subprocess.PIPE) as process:
            group.add(process.pid)
            process.communicate(b"go\n")
        assert process.returncode == 0
        assert group.num_kills() == num_kills
