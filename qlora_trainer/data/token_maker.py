"""Makes the tokens of some sources: every row is checked, then the accepted ones are tokenised.

The accepted rows go through `datasets`, memory-mapped (see `accepted_rows`). Imports no torch: a run does this in a
process of its own (see `token_process`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Literal

from qlora_trainer.config.data_files import DataSource
from qlora_trainer.data.accepted_rows import iter_accepted, write_accepted
from qlora_trainer.data.array_file import nameless_file
from qlora_trainer.data.chat import RowTokenizer
from qlora_trainer.data.document_store import DocumentWriter
from qlora_trainer.data.named import iter_sources
from qlora_trainer.data.rows import BATCH_ROWS, FileRead, Reading, Row, in_batches
from qlora_trainer.data.sources import source_hash
from qlora_trainer.data.token_job import TokenJob
from qlora_trainer.errors import DataError
from qlora_trainer.hardware.cache_folder import writing_told
from qlora_trainer.hardware.sealed_folder import writing

ROOM = "5 bytes a token"


def make_tokens(job: TokenJob) -> Generator[Reading]:
    """Makes the folder, unless another process is done first, while it yields how far it is.

    Raises:
        DataError: a source or a row cannot be read or tokenised.
        ConfigError: there are conversations, and no chat template that works.
        StorageError: the cache cannot be written.
    """
    with writing_told(job.folder, room=_room(job.sources)), nameless_file() as accepted:
        _try_first_rows(job)
        files = yield from write_accepted(iter_sources(job.sources, job.section), accepted)
        _require_unchanged(job)
        with writing(job.folder) as temporary:
            yield from _tokenize(iter_accepted(accepted, files), temporary, job)


def hashes_of(sources: Sequence[DataSource], key: Literal["train", "eval"]) -> dict[str, str]:
    """`source_hash` of each source, by name.

    Raises:
        DataError: a source cannot be read.
    """
    try:
        return {str(source): source_hash(source) for source in sources}
    except OSError as error:  # a file that went away, or is nobody's to read
        raise DataError(
            where=f"data.{key} {error.filename}",
            found=f"a file that cannot be read ({error.strerror or error})",
            expected="files that stay where they are until they are tokenised",
            fix="Check its path and permissions.",
        ) from error


def _try_first_rows(job: TokenJob) -> None:
    """Tells a chat template that fails with the first rows before all others are checked for minutes."""
    first = iter_sources(job.sources, job.section, most_rows=BATCH_ROWS)
    rows = next((item for item in in_batches(first) if isinstance(item, list)), [])
    _row_tokenizer(job)(rows)


def _row_tokenizer(job: TokenJob) -> RowTokenizer:
    return RowTokenizer(job.tokenizer.tokenizer, train_on=job.section.train_on, where=job.tokenizer.where)


def _require_unchanged(job: TokenJob) -> None:
    for name, found in hashes_of(job.sources, job.key).items():
        if found != job.hashes[name]:
            raise DataError(
                where=f"data.{job.key} {name}",
                found="content that changed while it was read",
                expected="data that stays as it is until all rows are checked",
                fix="Start again when whatever writes it is done.",
            )


def _tokenize(rows: Iterable[Row | Reading | FileRead], folder: Path, job: TokenJob) -> Generator[Reading]:
    tokenize = _row_tokenizer(job)
    files: list[FileRead] = []
    with DocumentWriter(folder) as writer:
        for item in in_batches(rows):
            if isinstance(item, list):
                for row in tokenize(item):
                    writer.append(row, file=len(files))
            elif isinstance(item, FileRead):
                files.append(item)
            elif isinstance(item, Reading):
                yield item
        writer.write_files(tuple(files))


def _room(sources: Sequence[DataSource]) -> str:
    num_bytes = sum(source.stat().st_size for source in sources if isinstance(source, Path) and source.exists())
    files = f" (the files have {num_bytes:,} bytes)" if num_bytes else ""
    return f"{ROOM}, and until they are made the text of all rows{files}"
