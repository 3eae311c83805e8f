"""Data sets of the hub: downloaded by `datasets` into its own Arrow cache, one commit of one split.

What is loaded is pinned to a commit first. Left to itself the library takes what its cache holds, of whatever revision,
where the hub cannot be reached or anything else goes wrong; so what came is compared with what was asked for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qlora_trainer.config.data_files import HubDataset
from qlora_trainer.errors import DataError, StorageError

if TYPE_CHECKING:
    from datasets import Dataset

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REASON_CHARS = 300


def hub_commit(source: HubDataset) -> str:
    """The commit that the hub, or without a network the cache, has for the source.

    Raises:
        DataError: neither has it.
    """
    return _asked_commit(source) or load_hub_dataset(source)[1]


def load_hub_dataset(source: HubDataset) -> tuple[Dataset, str]:
    """Downloads a data set, unless the cache has it, and maps the split that is asked for.

    Returns:
        The split, and the commit that it is from.

    Raises:
        DataError: nothing of that name, revision, subset or split; a data set that needs a script; or several splits
            none of which is named.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    commit = _asked_commit(source)
    try:
        # Neither token nor code is given: the library takes the user's token, and runs no code of a data set.
        loaded = load_dataset(
            source.repository,
            source.subset,
            split=source.split,
            revision=commit or source.revision,
            keep_in_memory=False,  # whatever the environment says
        )
    except (DatasetsError, _http_error(), RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
        _refuse(source, error)
    if not isinstance(loaded, Dataset):  # all splits by name
        splits = list(loaded)
        if len(splits) != 1:
            raise DataError(
                where=str(source),
                found="a data set of several splits, none of which is named",
                expected=f"one of {', '.join(splits)}",
                fix=f"Write {source}:{splits[0]}, say.",
            )
        loaded = loaded[splits[0]]
    return loaded, _require_commit(source, loaded, commit)


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
