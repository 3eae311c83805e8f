"""The files that `data.train` and `data.eval` name: one path, several, or patterns such as data/*.jsonl. No torch."""

from __future__ import annotations

import glob
from pathlib import Path

from qlora_trainer.errors import DataError

EXPECTED = "a JSON Lines, JSON, CSV or Parquet file, or a pattern that matches some"


def data_files(names: str | tuple[str, ...], *, key: str) -> tuple[Path, ...]:
    """Spells out patterns and checks that every file can be read.

    Args:
        names: a path or pattern, or several; what is a file is no pattern, whatever its name.
        key: the config key, for errors.

    Returns:
        The files: in the order they are named, those of one pattern sorted by name.

    Raises:
        DataError: a file is missing, unreadable, empty, or named twice.
    """
    paths: list[Path] = []
    for name in (names,) if isinstance(names, str) else names:
        found = _matches(name) or [name]
        for path in map(Path, found):
            _check_data_file(path, where=f"{key} {path}")
            if path in paths:
                raise DataError(
                    where=f"{key} {path}",
                    found="a file that is named twice",
                    expected="each file once: its rows would count double",
                    fix=f"Remove it from {key}, or make the patterns narrower.",
                )
            paths.append(path)
    return tuple(paths)


def _matches(name: str) -> list[str]:
    if not glob.has_magic(name) or Path(name).exists():
        return []
    return sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())


def _check_data_file(path: Path, *, where: str) -> None:
    try:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(1):
                    return
            found = "an empty file"
        elif path.is_dir():
            found = "a folder"
        elif path.exists():
            found = "no regular file"
        else:
            found = "no file of this pattern" if glob.has_magic(str(path)) else "no such file"
    except OSError as error:
        found = (error.strerror or str(error)).lower()
    raise DataError(where=where, found=found, expected=EXPECTED, fix=f"Check {where.partition(' ')[0]}.")
