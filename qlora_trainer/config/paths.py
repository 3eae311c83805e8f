"""What can be said about a run's files before torch is imported: what it reads is there, where it writes it can."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from qlora_trainer.config.bases import check_base
from qlora_trainer.config.data_files import require_data
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, StorageError

_IN_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


def check_inputs(config: RunConfig, *, resume: bool = False) -> None:
    """Refuse a run that cannot start. Nothing is created, loaded or downloaded.

    Args:
        config: what was asked for.
        resume: the run goes on in a folder that is not empty.

    Raises:
        ConfigError: the chat template cannot be read, the base cannot be used, the run folder is not empty, or there is
            a `data.revision` without a hub id.
        DataError: a data file is missing, unreadable or empty, or a folder of `datasets` is not whole.
        StorageError: the run folder cannot be written, or `memory.paging_dir` is no folder on a disk.
    """
    require_data(config.data)
    if config.data.chat_template is not None:
        read_chat_template(config.data.chat_template)
    check_base(config.model)
    _check_run_folder(Path(config.output.dir), resume=resume)
    if config.memory.paging_dir is not None:
        _check_writable(Path(config.memory.paging_dir), key="memory.paging_dir")
        if config.training.optimizer.startswith("paged"):
            require_on_disk(Path(config.memory.paging_dir))


def read_chat_template(name: str) -> str:
    """The text of the template that `data.chat_template` names.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        found = _reason(error)
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 at offset {error.start}"
    else:
        if text.strip():
            return text
        found = "an empty file"
    raise ConfigError(
        where=f"data.chat_template {name}", found=found, expected="a Jinja template", fix="Check data.chat_template."
    )


def require_on_disk(folder: Path) -> None:
    """Refuse a folder whose files are memory: paging to it would free nothing.

    Raises:
        StorageError: the folder is on a tmpfs or ramfs, or is not there.
    """
    if not folder.is_dir():
        raise StorageError(
            where=str(folder),
            found="no such folder",
            expected="a folder on a disk for the paged optimizer",
            fix="Make it, set memory.paging_dir to another one, or use a resident optimizer (adamw_32bit).",
        )
    kind = file_system_kind(folder)
    if kind in _IN_MEMORY_FILE_SYSTEMS:
        raise StorageError(
            where=str(folder),
            found=f"a {kind}, whose files are kept in memory",
            expected="a folder on a disk for the paged optimizer",
            fix="Set memory.paging_dir to a folder on a disk, or use a resident optimizer (adamw_32bit).",
        )


def require_plot_path(path: Path) -> None:
    """Refuse what no plot can be written to, before a minute is spent on what it would show.

    Raises:
        ConfigError: no .png, or in a folder that is not there.
        StorageError: the folder cannot be written, or the path is one itself.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(
            where=str(path),
            found=f"a plot that ends in {path.suffix!r}" if path.suffix else "a plot without an ending",
            expected="one that ends in .png",
            fix="Name it frontier.png, for example.",
        )
    if not os.path.isdir(path.parent):  # unlike Path.is_dir, no OSError for a parent that may not be looked at
        raise ConfigError(
            where=str(path),
            found=f"no folder {path.parent}",
            expected="a folder that exists",
            fix="Create it or choose another place for the plot.",
        )
    if os.path.isdir(path):
        raise StorageError(where=str(path), found="a folder", expected="a file", fix="Choose another name.")
    _check_writable(path.parent, key="--plot")


def require_new_folder(folder: Path, *, key: str) -> Path:
    """Refuse what no new folder can be written as, before minutes are spent on what goes into it.

    Args:
        folder: not there yet, or empty; the folder above it exists.
        key: the option that names it.

    Returns:
        The same, links followed.

    Raises:
        ConfigError: something is there already, or nothing is above it.
        StorageError: it cannot be written.
    """
    target = _resolved(folder, key=key)
    if _exists_or_refused(target, key=key) and not (target.is_dir() and not any(target.iterdir())):
        found = "a folder that is not empty" if target.is_dir() else "a file"
        raise ConfigError(
            where=f"{key} {folder}", found=found, expected="a new or empty folder", fix="Choose another name."
        )
    _require_folder_above(target, key=key)
    return target


def require_new_file(path: Path, *, key: str, suffix: str | None = None) -> Path:
    """Refuse what no new file can be written as; nothing that is there is written over.

    Args:
        path: not there yet; its folder exists.
        key: the option that names it.
        suffix: what the name must end in, as ".gguf".

    Returns:
        The same, links followed.

    Raises:
        ConfigError: something is there already, its folder is not, or the name ends otherwise.
        StorageError: it cannot be written.
    """
    target = _resolved(path, key=key)
    if suffix is not None and target.suffix.lower() != suffix:
        raise ConfigError(
            where=f"{key} {path}",
            found=f"a name that ends in {target.suffix!r}" if target.suffix else "a name without an ending",
            expected=f"one that ends in {suffix}",
            fix=f"Name it adapter{suffix}, for example.",
        )
    if _exists_or_refused(target, key=key):
        raise ConfigError(
            where=f"{key} {path}", found="something that is there already", expected="a new file", fix="Choose another."
        )
    _require_folder_above(target, key=key)
    return target


def file_system_kind(folder: Path) -> str:
    """The type of the file system that `folder` is on, as in /proc/self/mountinfo ("ext4", "tmpfs", ...)."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")  # proc(5): fields of fixed number, optional ones, " - ", type
        if before.split()[2] == number:
            return after.split()[0]
    return "unknown"


def _check_run_folder(folder: Path, *, resume: bool) -> None:
    _check_writable(folder, key="output.dir")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            where=f"output.dir {folder}",
            found="a folder that is not empty",
            expected="a new or empty folder",
            fix="Use --resume auto to go on with that run, or give another folder.",
        )


def _check_writable(folder: Path, *, key: str) -> None:
    """Write a nameless file where the folder is or will be: permission bits do not tell of read-only file systems."""
    existing = folder
    try:
        while not _exists(existing):
            existing = existing.parent
        if existing.is_dir():
            with TemporaryFile(dir=existing):
                return
        found = f"a file at {existing}"
    except OSError as error:
        found = f"{_reason(error)} at {existing}"
    raise StorageError(
        where=f"{key} {folder}", found=found, expected="a folder that can be written", fix=f"Check {key}."
    )


def _resolved(path: Path, *, key: str) -> Path:
    """Absolute, links followed; a name with a control character is refused: it would go into other files."""
    text = str(path)
    if text in ("", ".", "..") or not text.isprintable():
        raise ConfigError(
            where=f"{key} {text!r}", found="no name", expected="a path without control characters", fix=f"Check {key}."
        )
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise StorageError(
            where=f"{key} {path}", found=str(error), expected="a path that can be followed", fix=f"Check {key}."
        ) from error


def _exists_or_refused(path: Path, *, key: str) -> bool:
    try:
        return _exists(path)
    except OSError as error:
        raise StorageError(
            where=f"{key} {path}", found=_reason(error), expected="a path that can be written", fix=f"Check {key}."
        ) from error


def _require_folder_above(target: Path, *, key: str) -> None:
    if not target.parent.is_dir():
        raise ConfigError(
            where=f"{key} {target}",
            found=f"no folder {target.parent}",
            expected="a folder that exists",
            fix="Create it or choose another place.",
        )
    _check_writable(target.parent, key=key)


def _exists(path: Path) -> bool:
    """`Path.exists` that does not take a name that is too long, or a link to nothing, for a free name."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise
        return False
    return True


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
