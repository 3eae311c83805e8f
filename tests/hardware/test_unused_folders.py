"""What nobody has used for the longest time goes first, and nothing that anybody has open."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_trainer.hardware.sealed_folder import MANIFEST, writing
from qlora_trainer.hardware.unused_folders import mark_used, num_bytes_of, remove_unused

HOLD = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from qlora_trainer.hardware.unused_folders import mark_used\n"
    "folder = Path(sys.argv[1])\n"
    "mark_used(folder, os.open(folder / 'lock', os.O_RDONLY))\n"
    "os.utime(folder / 'manifest.json', (0, 0))\n"
    "print('held', flush=True)\n"
    "time.sleep(600)\n"
)


def sealed(folder: Path, *, used_hours_ago: float) -> Path:
    """A folder of about 1,000 bytes."""
    with writing(folder) as temporary:
        (temporary / "lock").write_bytes(b"1" * 900)
    when = time.time() - 3600 * used_hours_ago
    os.utime(folder / MANIFEST, (when, when))
    return folder


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def removed(parent: Path, most_bytes: int) -> list[str]:
    return [folder.name for folder in remove_unused(parent, most_bytes=most_bytes, lock_name="lock")]


def test_those_go_that_were_used_longest_ago(tmp_path: Path) -> None:
    for name, hours in (("b", 5.0), ("a", 9.0), ("d", 2.0), ("c", 7.0)):
        sealed(tmp_path / name, used_hours_ago=hours)
    assert removed(tmp_path, 10_000) == []
    assert removed(tmp_path, 2_500) == ["c", "a"]
    assert names(tmp_path) == {"b", "d"}
    descriptor = os.open(tmp_path / "b" / "lock", os.O_RDONLY)
    mark_used(tmp_path / "b", descriptor)
    os.close(descriptor)
    assert removed(tmp_path, 1_500) == ["d"]
    assert removed(tmp_path, 0) == [], "b was used just now: who did so may not have it open yet"


def test_what_another_process_has_open_stays_until_it_is_killed(tmp_path: Path) -> None:
    """Mutation tried: no lock is asked for."""
    folder = sealed(tmp_path / "held", used_hours_ago=99)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            assert removed(tmp_path, 0) == []
        finally:
            process.kill()
    assert removed(tmp_path, 0) == ["held"]


def test_what_killed_processes_left_goes_a_day_later(tmp_path: Path) -> None:
    """Mutation tried: the folder's own time alone, which stays that of its start while its files grow."""
    for name in (".unused-1", ".tmp-old-1", ".tmp-new-1", ".tmp-writing-1", ".damaged-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_bytes(b"1")
        if name != ".tmp-new-1":
            os.utime(tmp_path / name / "tokens.bin", None if "writing" in name else (0, 0))
            os.utime(tmp_path / name, (0, 0))
    assert removed(tmp_path, 10_000) == []
    assert names(tmp_path) == {".tmp-new-1", ".tmp-writing-1"}


def test_what_cannot_be_locked_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without locks."""
    folder = sealed(tmp_path / "a", used_hours_ago=99)

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert removed(tmp_path, 0) == []
    mark_used(folder, 0)
    assert (folder / MANIFEST).stat().st_mtime > time.time() - 60


def test_the_bytes_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"1" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"1" * 5)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "one")
    assert num_bytes_of(tmp_path) == 15
    assert num_bytes_of(tmp_path / "none") == 0
