"""Sealed folders are whole or not there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qlora_trainer.hardware.sealed_folder import defects, scratch, sha256_of, writing

OpenFolder = Callable[[Path], AbstractContextManager[Path]]


def test_a_sealed_folder_has_no_defects(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "whole"
    with writing(folder) as temporary:
        (temporary / "weights").write_bytes(b"1234")
        assert not folder.exists()
    assert defects(folder) == []
    assert (folder / "weights").read_bytes() == b"1234"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("open_folder", [writing, scratch])
def test_an_error_leaves_nothing_behind(open_folder: OpenFolder, tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with open_folder(tmp_path / "whole") as temporary:
            (temporary / "weights").write_bytes(b"1234")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_goes_when_it_has_been_used(tmp_path: Path) -> None:
    with scratch(tmp_path / "used") as temporary:
        (temporary / "weights").write_bytes(b"1234")
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_to_finish_stays(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    with writing(folder) as slow:
        (slow / "weights").write_bytes(b"slow")
        with writing(folder) as quick:
            (quick / "weights").write_bytes(b"quick")
    assert (folder / "weights").read_bytes() == b"quick"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_in_the_way_and_not_whole_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "something").write_text("else")

    def write() -> None:
        with writing(folder) as temporary:
            (temporary / "weights").write_bytes(b"1234")

    with pytest.raises(OSError, match="not empty"):
        write()


@pytest.mark.parametrize("open_folder", [writing, scratch])
def test_what_a_killed_writer_left_is_removed_a_day_later(open_folder: OpenFolder, tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".tmp-whole-a", ".tmp-whole-b", ".tmp-another-c"))
    for left in (old, young, other):
        left.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    for left in (old, other):
        os.utime(left, (two_days_ago, two_days_ago))
    with open_folder(tmp_path / "whole") as temporary:
        (temporary / "weights").write_bytes(b"1234")
    assert not old.exists()
    assert young.exists()
    assert other.exists()


@pytest.mark.parametrize("open_folder", [writing, scratch])
def test_what_another_process_removes_meanwhile_is_passed_over(
    open_folder: OpenFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda folder, _: iter([folder / ".tmp-whole-gone"]))
    with open_folder(tmp_path / "whole") as temporary:
        assert temporary.is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"files": 3}', '{"files": {"weights": {}}}'])
def test_a_broken_manifest_is_a_defect(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    with writing(folder) as temporary:
        (temporary / "weights").write_bytes(b"1234")
    (folder / "manifest.json").write_text(content)
    assert len(defects(folder)) == 1


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
