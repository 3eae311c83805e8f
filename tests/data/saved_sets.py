"""Data sets that `datasets` itself writes: folders of `save_to_disk`, and what its cache holds of the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def chats(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Conversations that differ."""
    return [
        {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Hello {n}"}]}
        for n in range(start, start + count)
    ]


def save(folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """A `Dataset` folder; `options` are those of `save_to_disk`."""
    from datasets import Dataset

    Dataset.from_list(list(rows)).save_to_disk(folder, **options)
    return folder


def save_splits(folder: Path, **splits: Sequence[dict[str, Any]]) -> Path:
    """A `DatasetDict` folder."""
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_list(list(rows)) for name, rows in splits.items()}).save_to_disk(folder)
    return folder


def fill_cache(cache: Path, repository: str, commit: str, **splits: Sequence[dict[str, Any]]) -> None:
    """What `load_dataset` leaves of a repository of Parquet files: the same builder makes it, from local files."""
    from datasets import Dataset, load_dataset

    files = {}
    for split, rows in splits.items():
        files[split] = str(cache.parent / f"{commit}-{split}.parquet")
        Dataset.from_list(list(rows)).to_parquet(files[split])
    made = load_dataset("parquet", data_files=files, cache_dir=str(cache / "making"))
    folder = Path(next(iter(made.values())).cache_files[0]["filename"]).parent
    owner, _, name = repository.partition("/")
    target = cache / f"{owner}___{name}" / "default" / "0.0.0" / commit
    target.mkdir(parents=True)
    for path in folder.glob("parquet-*.arrow"):
        shutil.copy(path, target / path.name.replace("parquet-", f"{name}-", 1))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"dataset_name": name, "config_name": "default"}
    for split_info in info["splits"].values():
        split_info["dataset_name"] = name
    (target / "dataset_info.json").write_text(json.dumps(info))
    shutil.rmtree(cache / "making")


def cached(cache: Path, repository: str, commit: str, split: str) -> Dataset:
    """The split as the library maps it."""
    from datasets import Dataset

    owner, _, name = repository.partition("/")
    return Dataset.from_file(str(cache / f"{owner}___{name}" / "default" / "0.0.0" / commit / f"{name}-{split}.arrow"))
