"""What is to be tokenised, as a value that goes from one process to another. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_trainer.config.data_files import DataSource, HubDataset
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.known_tokenizer import KnownTokenizer, tokenizer_content, tokenizer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenJob:
    """What is to be tokenised, and where to.

    Attributes:
        folder: of the cache, not there yet; it becomes a sealed one.
        sources: what is read; a hub id at a commit.
        hashes: of the sources, by what they are, in order.
        section: how they are read.
        key: under which of its keys they are named, for errors.
        tokenizer: makes the tokens.
    """

    folder: Path
    sources: tuple[DataSource, ...]
    hashes: Mapping[str, str]
    section: DataSection
    key: Literal["train", "eval"]
    tokenizer: KnownTokenizer


def job_as_json(job: TokenJob) -> dict[str, Any]:
    """For another process."""
    return {
        "folder": str(job.folder),
        "sources": [_source_as_json(source) for source in job.sources],
        "hashes": dict(job.hashes),
        "section": job.section.model_dump(mode="json"),
        "key": job.key,
        "tokenizer": tokenizer_content(job.tokenizer.tokenizer),
        "content_hash": job.tokenizer.content_hash,
        "where": job.tokenizer.where,
    }


def job_of(entry: dict[str, Any]) -> TokenJob:
    """The inverse of `job_as_json`, after a way through JSON.

    Raises:
        ConfigError: the tokenizer would be another one.
    """
    return TokenJob(
        folder=Path(entry["folder"]),
        sources=tuple(_source_of(source) for source in entry["sources"]),
        hashes=entry["hashes"],
        section=DataSection.model_validate(entry["section"]),
        key=entry["key"],
        tokenizer=KnownTokenizer(tokenizer_of(entry["tokenizer"]), entry["content_hash"], entry["where"]),
    )


def _source_as_json(source: DataSource) -> dict[str, Any]:
    if isinstance(source, Path):
        return {"file": str(source)}
    if isinstance(source, HubDataset):
        return {"hub": asdict(source)}
    files = [str(path) for path in source.arrow_files]
    return {"folder": {"name": source.name, "path": str(source.path), "arrow_files": files}}


def _source_of(entry: dict[str, Any]) -> DataSource:
    if "file" in entry:
        return Path(entry["file"])
    if "hub" in entry:
        return HubDataset(**entry["hub"])
    folder = entry["folder"]
    return DatasetFolder(folder["name"], Path(folder["path"]), tuple(map(Path, folder["arrow_files"])))
