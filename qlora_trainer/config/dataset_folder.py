"""Folders that `datasets` wrote with `save_to_disk`, looked at without that library, which takes seconds to import.

A `Dataset` is a folder with `state.json`, `dataset_info.json` and the Arrow files that the state names; a `DatasetDict`
is a folder of those with `dataset_dict.json`, which names its splits.
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.errors import DataError

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class DatasetFolder:
    """A `Dataset` on disk.

    Attributes:
        name: what the config calls it, with its split; errors begin with it.
        path: its folder, which for a split is inside that of the `DatasetDict`.
        arrow_files: its rows, in order.
    """

    name: str
    path: Path
    arrow_files: tuple[Path, ...]

    def __str__(self) -> str:
        return self.name


def find_dataset_folder(name: str, *, where: str) -> DatasetFolder | None:
    """What `FOLDER` or `FOLDER:SPLIT` names, if there is such a folder and `datasets` wrote it.

    The only split of a `DatasetDict` need not be named.

    Args:
        name: as the config has it.
        where: it with its key, for errors.

    Raises:
        DataError: a split that is not there or not named, or a folder that is not whole.
    """
    folder, split = _folder_and_split(name)
    if os.path.isfile(folder / _DICT):  # unlike Path.is_file, False for a name too long to be a path
        return _read_folder(f"{folder}:{split}" if split else name, folder / _chosen_split(folder, split, where), where)
    if not os.path.isfile(folder / _STATE):
        return None
    if split:
        raise _refusal(where, f"the split {split} of a data set that has none", str(folder), f"Leave :{split} out.")
    return _read_folder(name, folder, where)


def _folder_and_split(name: str) -> tuple[Path, str]:
    folder, colon, split = name.rpartition(":")
    if colon and not os.path.isdir(name) and os.path.isdir(folder):
        return Path(folder), split
    return Path(name), ""


def _chosen_split(folder: Path, split: str, where: str) -> str:
    splits = _read_json(folder / _DICT).get("splits")
    if not isinstance(splits, list) or not splits or not all(_is_plain(name) for name in splits):
        raise _refusal(str(folder / _DICT), f"splits = {splits!r}", "a list of names of folders")
    if split in splits:
        return split
    if not split and len(splits) == 1:
        return str(splits[0])
    raise _refusal(
        where,
        f"no split {split}" if split else "a data set of several splits, none of which is named",
        f"one of {', '.join(splits)}",
        f"Write {folder}:{splits[0]}, say.",
    )


def _read_folder(name: str, folder: Path, where: str) -> DatasetFolder:
    for file in (_STATE, _INFO):
        if not (folder / file).is_file():
            raise _refusal(where, f"no {folder / file}")
    state = _read_json(folder / _STATE)
    entries = state.get("_data_files")
    named = [entry.get("filename") if isinstance(entry, dict) else None for entry in _listed(entries)]
    files = [name for name in named if _is_plain(name)]
    # A state must not lead out of its folder; and every row must be in what is hashed.
    if not files or len(files) < len(named):
        raise _refusal(str(folder / _STATE), f"_data_files = {repr(entries)[:200]}", "names of files beside it")
    for file in files:
        if not (folder / file).is_file():
            raise _refusal(where, f"no {folder / file}")
    # Old versions kept the order of a shuffled or filtered set in files of their own, which later ones pass over.
    if stale := [key for key, value in state.items() if key.startswith("_indices") and value]:
        fix = "Load and save it again with the version of `datasets` that wrote it, after flatten_indices()."
        raise _refusal(where, f"{', '.join(stale)} in state.json, which `datasets` no longer reads", fix=fix)
    return DatasetFolder(name, folder, tuple(folder / file for file in files))


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _is_plain(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return decode(read_capped(path))
    except (OSError, ValueError) as error:
        raise _refusal(str(path), f"no JSON ({error})") from error


def _refusal(
    where: str,
    found: str,
    expected: str = "a folder as save_to_disk of `datasets` writes it, whole",
    fix: str = "Copy or write the data set again.",
) -> DataError:
    return DataError(where=where, found=found, expected=expected, fix=fix)
