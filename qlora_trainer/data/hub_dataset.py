"""Data sets of the hub, one commit of one split: downloaded by `datasets` into its own Arrow cache, or streamed.

What is loaded is pinned to a commit first. Left to itself the library takes what its cache holds, of whatever revision,
where the hub cannot be reached or anything else goes wrong; so what came is compared with what was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_trainer.config.data_files import HubDataset
from qlora_trainer.data.records import ARROW_BATCH_ROWS
from qlora_trainer.errors import DataError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REASON_CHARS = 300


def hub_commit(source: HubDataset) -> str:
    """The commit that the hub, or without a network the cache, has for the source.

    Raises:
        DataError: neither has it.
    """
    return _asked_commit(source) or load_hub_dataset(source)[1]


def streamed(source: HubDataset) -> HubDataset:
    """The same data set at the commit that it is at now, to be streamed.

    Raises:
        DataError: the hub does not have it or cannot be reached: a cache is of no use to a stream.
    """
    commit = _asked_commit(source)
    if commit is None:
        raise DataError(
            where=str(source),
            found="no hub that could be reached",
            expected="a network while the data is streamed",
            fix="Check it, or train without data.streaming from what the cache of `datasets` has.",
        )
    return replace(source, revision=commit, is_streamed=True)


def load_hub_dataset(source: HubDataset) -> tuple[Dataset, str]:
    """Downloads a data set, unless the cache has it, and maps the split that is asked for.

    Returns:
        The split, and the commit that it is from.

    Raises:
        DataError: nothing of that name, revision, subset or split; a data set that needs a script; or several splits
            none of which is named.
    """
    from datasets import Dataset

    commit = _asked_commit(source)
    # In mapped memory, whatever the environment says.
    loaded = _load(source, revision=commit or source.revision, keep_in_memory=False)
    if not isinstance(loaded, Dataset):  # all splits by name
        loaded = _only_split(source, loaded)
    return loaded, _require_commit(source, loaded, commit)


def iter_hub_stream(source: HubDataset, *, after: int) -> Iterator[pa.Table]:
    """Reads a data set from the network as it comes, after so many rows, which are read again too; keeps nothing.

    Yields:
        Tables of some hundred rows.

    Raises:
        DataError: see `load_hub_dataset`; or the network was lost, and stayed so while the library tried again.
    """
    from datasets import IterableDataset
    from pyarrow import ArrowException

    if source.split is not None and "[" in source.split:
        raise DataError(
            where=str(source),
            found="a part of a split",
            expected="a whole split: the library streams no others",
            fix=f"Write {source.name.partition('[')[0]}, or train without data.streaming.",
        )
    loaded = _load(source, revision=source.revision, streaming=True)
    if not isinstance(loaded, IterableDataset):
        loaded = _only_split(source, loaded)
    tables = loaded.with_format("arrow").skip(after).iter(batch_size=ARROW_BATCH_ROWS)
    while True:
        try:
            table = next(tables, None)
        except (*_load_errors(), ArrowException) as error:
            raise DataError(
                where=str(source),
                found=f"a stream that broke off ({_reason(error)})",
                expected="a network while the data is streamed, and rows that `datasets` can read",
                fix="Go on when it is back: --resume auto; or train without data.streaming, from a download.",
            ) from error
        if table is None:
            return
        yield table


def _load(source: HubDataset, **how: Any) -> Any:
    """What `datasets.load_dataset` returns; neither token nor code is given: it takes the user's token, and runs none.

    Raises:
        DataError, StorageError: what it raises, told.
    """
    from datasets import load_dataset

    try:
        return load_dataset(source.repository, source.subset, split=source.split, **how)
    except _load_errors() as error:
        _refuse(source, error)


def _load_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return DatasetsError, _http_error(), RuntimeError, OSError, ValueError, LookupError, TypeError


def _only_split(source: HubDataset, by_name: Any) -> Any:
    splits = list(by_name)
    if len(splits) != 1:
        raise DataError(
            where=str(source),
            found="a data set of several splits, none of which is named",
            expected=f"one of {', '.join(splits)}",
            fix=f"Write {source}:{splits[0]}, say.",
        )
    return by_name[splits[0]]


def _asked_commit(source: HubDataset) -> str | None:
    """The commit of the asked revision; None if the default branch is asked for and the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    try:
        return HfApi().dataset_info(source.repository, revision=source.revision).sha
    except HfHubHTTPError as error:  # the hub's answer, and also an HTTPError
        _refuse(source, error)
    except (OfflineModeIsEnabled, _http_error(), OSError) as error:
        if source.revision is None:
            return None
        raise DataError(
            where=str(source),
            found=f"no hub that could tell the commit of data.revision {source.revision} ({_reason(error)})",
            expected="a network, or a commit's full hash",
            fix="Give the full hash, which the cache is then searched for.",
        ) from error
    except ValueError as error:
        _refuse(source, error)


def _require_commit(source: HubDataset, dataset: Dataset, commit: str | None) -> str:
    """The commit that the Arrow files were made from: their folder in the library's cache is named by it."""
    files = dataset.cache_files
    found = Path(files[0]["filename"]).parent.name if files else ""
    if found != (commit or found) or not _COMMIT.fullmatch(found):
        raise DataError(
            where=str(source),
            found=f"{found or 'no file'} in the cache of `datasets`",
            expected=f"the commit {commit}" if commit else "a folder named by a commit",
            fix="Check the network, or give the commit that is there as data.revision.",
        )
    return found


def _refuse(source: HubDataset, error: Exception) -> NoReturn:
    from datasets.exceptions import DatasetGenerationError

    text = _reason(error)
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        raise StorageError(
            where=str(source),
            found=f"a data set that cannot be kept ({_reason(cause)})",
            expected="room in the cache of `datasets`",
            fix="Make room, or set HF_HOME to a folder on another disk.",
        ) from error
    if cause is not None and isinstance(error, DatasetGenerationError):
        raise DataError(
            where=str(source),
            found=f"rows that `datasets` cannot read ({_reason(cause)})",
            expected="files whose rows all have one form",
            fix="Download the files and name them in data.train: then each bad row is told, or passed over.",
        ) from error
    if isinstance(error, RuntimeError) and "script" in text:
        raise DataError(
            where=str(source),
            found=f"a data set that only its own code can read ({text})",
            expected="data files: code of a data set is never run",
            fix="Convert it to Parquet where you trust it, or take data.revision: refs/convert/parquet if it has that.",
        ) from error
    raise DataError(
        where=str(source),
        found=f"no such file or folder, and nothing that could be fetched from the hub ({text})",
        expected="a path, or a data set of the hub that you may read: owner/name or owner/name/subset, and :split",
        fix="Check the name, subset, split and data.revision, the network and your hub token.",
    ) from error


def _http_error() -> type[Exception]:
    """The base class of what the hub's client raises; which package it is from depends on the client's version."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # made when asked for

    error: type[Exception] = httpx.HTTPError
    return error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[: _MAX_REASON_CHARS - 1]}…"
