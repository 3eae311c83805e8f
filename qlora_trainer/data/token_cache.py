"""Tokenises the files that a config names, once: what is made is kept, and found again as long as nothing changed.

What is missing is made in a process of its own (see `token_maker` and `token_process`).

The folder's name is its key: a hash of the content and names of files and data sets, of the tokenizer and its template,
of the options that decide what is read and learned, and of this room's own code. Two processes may make the same
folder: the first that is done wins, and the other takes what it made. Folders that nobody has open go when new ones are
made, once all take more than `MOST_BYTES`: those first that were used longest ago.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from qlora_trainer.config.data_files import DataSource
from qlora_trainer.config.schema import DataSection
from qlora_trainer.config.strict_json import json_sha256
from qlora_trainer.data.document_store import TOKENS_FILE, DocumentStore
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.named import sources_named
from qlora_trainer.data.rows import Reading
from qlora_trainer.data.sources import pinned
from qlora_trainer.data.token_job import TokenJob
from qlora_trainer.data.token_maker import ROOM, hashes_of
from qlora_trainer.data.token_process import make_tokens_apart
from qlora_trainer.hardware.cache_folder import cache_folder, writing_told
from qlora_trainer.hardware.heap import release_free_memory
from qlora_trainer.hardware.sealed_folder import defects
from qlora_trainer.hardware.unused_folders import remove_unused

MOST_BYTES = 20 * 2**30  # of all token folders: four billion tokens


@dataclass(frozen=True, slots=True)
class TokenizedFiles:
    """All rows of some files, tokenised.

    Attributes:
        store: the tokens.
        sources: what was read; a hub id at the commit that it was at.
        content_hash: SHA-256 of the sources by what they are.
    """

    store: DocumentStore
    sources: tuple[DataSource, ...]
    content_hash: str


def tokenize_named(
    section: DataSection, key: Literal["train", "eval"], tokenizer: KnownTokenizer
) -> Generator[Reading, None, TokenizedFiles]:
    """Finds the files' tokens, or makes them while it yields how far it is.

    Args:
        section: names the files and says how they are read.
        key: which of the two.
        tokenizer: makes the tokens.

    Raises:
        DataError: a file or a row cannot be read or tokenised.
        ConfigError: there are conversations, and no chat template that works.
        StorageError: the cache cannot be written.
    """
    sources = tuple(pinned(source) for source in sources_named(section, key))
    hashes = hashes_of(sources, key)
    folder = cache_folder() / "tokens" / _key(section, hashes, tokenizer)
    job = TokenJob(folder=folder, sources=sources, hashes=hashes, section=section, key=key, tokenizer=tokenizer)
    with writing_told(folder, room=ROOM):
        yield from _make_if_missing(job)
        try:
            store = DocumentStore(folder)
        except FileNotFoundError:  # another process has just removed it as unused, or somebody has emptied the cache
            yield from _make_if_missing(job)
            store = DocumentStore(folder)
        remove_unused(folder.parent, most_bytes=MOST_BYTES, lock_name=TOKENS_FILE)
        return TokenizedFiles(store, sources, _joined(list(hashes.values())))


def _make_if_missing(job: TokenJob) -> Generator[Reading]:
    if job.folder.is_dir() and defects(job.folder):
        _set_aside(job.folder)
    if not job.folder.is_dir():
        release_free_memory()  # there are two processes for a while
        yield from make_tokens_apart(job)
        release_free_memory()  # the job was megabytes of JSON


def _set_aside(folder: Path) -> None:
    """Removes a damaged folder, unless another process did so, and made it anew, since it was looked at."""
    aside = folder.with_name(f".damaged-{uuid.uuid4().hex}")
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    if not defects(aside) and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _key(section: DataSection, hashes: dict[str, str], tokenizer: KnownTokenizer) -> str:
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    parts = [
        code.hexdigest(),
        version("transformers"),
        version("tokenizers"),
        version("jinja2"),
        tokenizer.content_hash,
        list(hashes.items()),
        section.model_dump(mode="json", include={"format", "columns", "train_on", "on_bad_row"}),
    ]
    return json_sha256(parts)[:32]


def _joined(hashes: list[str]) -> str:
    """The hash of the only file, or one over the hashes of all in order; their names do not count."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
