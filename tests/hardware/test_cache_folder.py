"""The cache folder: where it is, who can read it, and whose it must be."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.cache_folder import cache_folder


def test_it_is_made_below_xdg_cache_home_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep" / "cache"))

    folder = cache_folder()

    assert folder == tmp_path / "deep" / "cache" / "qlora_trainer"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


@pytest.mark.parametrize("value", [None, ""])
def test_without_xdg_cache_home_it_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)

    assert cache_folder() == tmp_path / ".cache" / "qlora_trainer"


def test_a_file_in_its_place_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qlora_trainer").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(StorageError, match=r"cannot be made \(File exists\).*XDG_CACHE_HOME"):
        cache_folder()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    owner = cache_folder().stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)

    with pytest.raises(StorageError, match=f"a cache folder of user {owner}; expected one of user {owner + 1}"):
        cache_folder()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Code may lie there already: to close it now would be too late."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    folder.chmod(mode)

    with pytest.raises(StorageError, match=f"others may write to .mode {mode:o}.*; expected mode 700.*rm -r {folder}"):
        cache_folder()

    assert folder.stat().st_mode & 0o777 == mode


def test_one_that_others_can_read_is_closed_and_so_is_all_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders within are made as the umask says, which may let others write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "qlora_trainer").mkdir()
    (tmp_path / "qlora_trainer").chmod(0o755)

    assert cache_folder().stat().st_mode & 0o777 == 0o700


def test_one_on_a_disk_that_keeps_no_modes_is_taken_where_others_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_folder: Path, _mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "qlora_trainer").mkdir()
    (tmp_path / "qlora_trainer").chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)

    assert cache_folder() == tmp_path / "qlora_trainer"


def test_a_link_of_ones_own_leads_to_another_disk_and_one_of_somebody_else_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "qlora_trainer").symlink_to(tmp_path / "disk")
    owner = cache_folder().stat().st_uid

    monkeypatch.setattr(Path, "lstat", lambda _: SimpleNamespace(st_uid=owner + 1))

    with pytest.raises(StorageError, match=f"a cache folder of user {owner + 1}"):
        cache_folder()
