"""Tokenises the files that a config names, once: what is made is kept, and found again as long as nothing changed.

The folder's name is its key: a hash of the content and names of files and data sets, of the tokenizer and its template,
of the options that decide what is read and learned, and of this room's own code. Two processes may make the same
folder: the first that is done wins, and the other takes what it made. Folders that nobody has open go when new ones are
made, once all take more than `MOST_BYTES`: those first that were used longest ago.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_trainer.config.data_files import DataSource
from qlora_trainer.config.schema import DataSection
from qlora_trainer.config.strict_json import json_sha256
from qlora_trainer.data.chat import RowTokenizer
from qlora_trainer.data.document_store import TOKENS_FILE, DocumentStore, DocumentWriter
from qlora_trainer.data.named import iter_sources, sources_named
from qlora_trainer.data.rows import FileRead, Reading, in_batches
from qlora_trainer.data.sources import pinned, source_hash
from qlora_trainer.errors import DataError
from qlora_trainer.hardware.cache_folder import cache_folder, writing_told
from qlora_trainer.hardware.sealed_folder import defects, writing
from qlora_trainer.hardware.unused_folders import remove_unused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_BYTES = 20 * 2**30  # of all token folders: four billion tokens
ROOM = "5 bytes a token"


@dataclass(frozen=True, slots=True)
class KnownTokenizer:
    """A tokenizer, and what is known of it.

    Attributes:
        tokenizer: fast.
        content_hash: over all that decides what a text becomes, its template included.
        where: the file or base that the chat template is from, for errors.
    """

    tokenizer: PreTrainedTokenizerBase
    content_hash: str
    where: str


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
    hashes = _hashes(sources, key)
    folder = cache_folder() / "tokens" / _key(section, hashes, tokenizer)
    with writing_told(folder, room=ROOM):
        yield from _make_if_missing(folder, sources, section, key, tokenizer)
        try:
            store = DocumentStore(folder)
        except FileNotFoundError:  # another process has just removed it as unused, or somebody has emptied the cache
            yield from _make_if_missing(folder, sources, section, key, tokenizer)
            store = DocumentStore(folder)
        remove_unused(folder.parent, most_bytes=MOST_BYTES, lock_name=TOKENS_FILE)
        return TokenizedFiles(store, sources, _joined(list(hashes.values())))


def _make_if_missing(
    folder: Path,
    sources: Sequence[DataSource],
    section: DataSection,
    key: Literal["train", "eval"],
    tokenizer: KnownTokenizer,
) -> Generator[Reading]:
    if folder.is_dir() and defects(folder):
        _set_aside(folder)
    if folder.is_dir():
        return
    hashes = _hashes(sources, key)
    with writing(folder) as temporary:
        yield from _write(temporary, sources, section, tokenizer)
        if changed := [name for name, found in _hashes(sources, key).items() if found != hashes[name]]:
            raise DataError(
                where=f"data.{key} {changed[0]}",
                found="content that changed while it was read",
                expected="data that stays as it is until it is tokenised",
                fix="Start again when whatever writes it is done.",
            )


def _hashes(sources: Sequence[DataSource], key: Literal["train", "eval"]) -> dict[str, str]:
    try:
        return {str(source): source_hash(source) for source in sources}
    except OSError as error:  # a file that went away, or is nobody's to read
        raise DataError(
            where=f"data.{key} {error.filename}",
            found=f"a file that cannot be read ({error.strerror or error})",
            expected="files that stay where they are until they are tokenised",
            fix="Check its path and permissions.",
        ) from error


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


def _write(
    folder: Path, sources: Sequence[DataSource], section: DataSection, tokenizer: KnownTokenizer
) -> Generator[Reading]:
    tokenize = RowTokenizer(tokenizer.tokenizer, train_on=section.train_on, where=tokenizer.where)
    files: list[FileRead] = []
    with DocumentWriter(folder) as writer:
        for item in in_batches(iter_sources(sources, section)):
            if isinstance(item, list):
                for row in tokenize(item):
                    writer.append(row, file=len(files))
            elif isinstance(item, FileRead):
                files.append(item)
            elif isinstance(item, Reading):
                yield item
        writer.write_files(tuple(files))


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
