"""The rows of whatever the config names, and the hash by which they are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qlora_trainer.config.data_files import DataSource, HubDataset
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.data.datasets_rows import iter_dataset
from qlora_trainer.data.hub_dataset import hub_commit
from qlora_trainer.data.records import Record, iter_records
from qlora_trainer.hardware.sealed_folder import sha256_of


def iter_source(source: DataSource, *, after: int = 0) -> Iterator[Record]:
    """Reads the rows of a source in order, those after the row number (or line) `after`.

    Raises:
        DataError: it cannot be read, or not beyond some row.
    """
    return iter_records(source, after=after) if isinstance(source, Path) else iter_dataset(source, after=after)


def pinned(source: DataSource) -> DataSource:
    """The same source, a hub id at the commit that it is at now: a branch may move while it is read.

    Raises:
        DataError: the hub, or without a network the cache, does not have the data set.
    """
    return replace(source, revision=hub_commit(source)) if isinstance(source, HubDataset) else source


def source_hash(source: DataSource) -> str:
    """A SHA-256 that is another one wherever a row is.

    Of a file it is the file's own. Of a folder it is over the Arrow files, in the order of its state: they hold rows
    and types, and the JSON beside them changes neither (`datasets` refuses features that contradict the files). Of a
    hub id it is over the commit, which nobody can change, and which part of it is read; so it is the same on another
    machine, where another version of the library would lay the Arrow cache out otherwise.

    Raises:
        DataError: the hub, or without a network the cache, does not have the data set.
    """
    if isinstance(source, Path):
        return sha256_of(source)
    if isinstance(source, DatasetFolder):
        return _sha256_of("\n".join(sha256_of(path) for path in source.arrow_files))
    return _hub_hash(source)


def _hub_hash(source: HubDataset) -> str:
    return _sha256_of(json.dumps([source.repository, hub_commit(source), source.subset, source.split]))


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
