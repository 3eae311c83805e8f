"""What `data.train` and `data.eval` name: files, patterns of them, folders of `datasets`, and hub ids. No torch.

Nothing is loaded or downloaded here. What is there is taken for what it is, whatever its name; a name that is not there
is a hub id if it could be one and could hardly be a path (see `_hub_dataset`).
"""

from __future__ import annotations

import glob
import os.path
import re
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.config.bases import is_hub_id
from qlora_trainer.config.dataset_folder import DatasetFolder, find_dataset_folder
from qlora_trainer.config.schema import DataSection
from qlora_trainer.errors import ConfigError, DataError

EXPECTED = (
    "a JSON Lines, JSON, CSV or Parquet file, a pattern that matches some, a folder that `datasets` wrote, "
    "or a hub id owner/name"
)
_LIKE_A_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|gz|zip)$", re.IGNORECASE)
_SUBSET = re.compile(r"[^/:\s]+")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A split of a data set on the hub: `owner/name`, `owner/name:split` or `owner/name/subset:split`.

    Attributes:
        name: what the config calls it; errors begin with it.
        repository: owner/name.
        subset: its configuration, as the hub's viewer names it; None takes the only or default one.
        split: as `datasets.load_dataset` reads it, such as train or train[:1000]; None takes the only one.
        revision: branch, tag or commit; None takes the default branch.
        is_streamed: read from the network as it comes, in place of being downloaded first.
    """

    name: str
    repository: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    is_streamed: bool = False

    def __str__(self) -> str:
        return self.name


DataSource = Path | DatasetFolder | HubDataset


def data_files(names: str | tuple[str, ...], *, key: str, revision: str | None = None) -> tuple[DataSource, ...]:
    """Spells out patterns and checks that everything on this machine can be read.

    Args:
        names: a path, pattern or hub id, or several; what is there is no pattern and no id.
        key: the config key, for errors.
        revision: of the hub ids.

    Returns:
        The sources: in the order they are named, the files of one pattern sorted by name.

    Raises:
        DataError: something is missing, unreadable, empty, or named twice.
    """
    sources: list[DataSource] = []
    for name in (names,) if isinstance(names, str) else names:
        for found in _matches(name) or [name]:
            where = f"{key} {found}"
            source = find_dataset_folder(found, where=where) or _hub_dataset(found, revision) or Path(found)
            if isinstance(source, Path):
                _check_data_file(source, where=where)
            if _place(source) in map(_place, sources):
                raise DataError(
                    where=where,
                    found="a file that is named twice"
                    if isinstance(source, Path)
                    else "a data set that is named twice",
                    expected="each once: its rows would count double",
                    fix=f"Remove it from {key}, or make the patterns narrower.",
                )
            sources.append(source)
    return tuple(sources)


def require_data(section: DataSection) -> None:
    """Refuse data that is not there, and a revision of nothing; what a hub has is not asked.

    Raises:
        DataError: see `data_files`.
        ConfigError: there is a revision, and no hub id among the sources.
    """
    sources = data_files(section.train, key="data.train")
    if section.eval is not None:
        sources += data_files(section.eval, key="data.eval")
    revision = section.revision
    if revision is not None and not any(isinstance(source, HubDataset) for source in sources):
        raise ConfigError(
            where="data.revision",
            found=f"{revision} without a hub id in data.train or data.eval",
            expected="null, only a hub id has revisions",
            fix="Delete data.revision.",
        )


def _hub_dataset(name: str, revision: str | None) -> HubDataset | None:
    """The hub id that `name` is.

    A path that is misspelt must be told at once, not looked for in a network: so no id is what is there, what begins
    like a path or ends like a file, and what is in a folder (or behind a file) that is there.
    """
    place, colon, split = name.partition(":")
    repository, subset = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    if (
        os.path.exists(name)
        or not is_hub_id(repository)
        or _LIKE_A_FILE.search(place)
        or os.path.exists(repository.split("/")[0])
        or (subset and not _SUBSET.fullmatch(subset))
        or place.endswith("/")
        or bool(colon) != bool(split.strip())
    ):
        return None
    return HubDataset(name, repository, subset or None, split or None, revision)


def _place(source: DataSource) -> object:
    if isinstance(source, HubDataset):
        return source.repository, source.subset, source.split
    return os.path.realpath(source.path if isinstance(source, DatasetFolder) else source)


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
