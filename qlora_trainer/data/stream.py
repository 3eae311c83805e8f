"""Data that is read while it is trained on: a bounded number of rows is tokenised, shuffled and used up, then the next.

Such a block is a function of where it begins, so a run that is resumed reads its block again and no other. The sources
are read from their start again when they end; no block goes beyond an end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_trainer.config.data_files import DataSource, HubDataset
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.chat import RowTokenizer
from qlora_trainer.data.document_store import DocumentStore, DocumentWriter
from qlora_trainer.data.hub_dataset import streamed
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.named import iter_sources, num_bad_rows, sources_named
from qlora_trainer.data.rows import MAX_REASONS, START, BadRow, FileRead, Place, Reading, Row, in_batches
from qlora_trainer.data.split import all_rows
from qlora_trainer.data.token_maker import ROOM
from qlora_trainer.data.tokenized import TokenizedData, fit_documents, select
from qlora_trainer.errors import DataError
from qlora_trainer.hardware.cache_folder import cache_folder, writing_told
from qlora_trainer.hardware.sealed_folder import scratch

StreamedRows = Iterator[list[Row] | BadRow | Reading | FileRead]
_NOTHING = FileRead(path="", format_name="", num_rows=0, num_bad=0, reasons=())


@dataclass(frozen=True, slots=True)
class Stream:
    """What is read, and how.

    Attributes:
        sources: a hub id at the commit that it was at.
        section: how the rows are read; `stream_rows` is the size of a block.
        tokenizer: makes the tokens.
    """

    sources: tuple[DataSource, ...]
    section: DataSection
    tokenizer: KnownTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStart:
    """Where a block begins; a checkpoint holds it.

    Attributes:
        number: blocks before it.
        num_passes: times that the sources were read to their end before it.
        place: in the sources.
        num_samples: documents of all blocks before it.
        content_hash: `DocumentStore.content_hash` of the block, where it has been read; empty where it has not.
    """

    number: int = 0
    num_passes: int = 0
    place: Place = START
    num_samples: int = 0
    content_hash: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, entry: dict[str, Any]) -> BlockStart:
        """The inverse of `as_json`, after a way through JSON."""
        return cls(**{**entry, "place": Place(**entry["place"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some consecutive rows of a stream, tokenised, whatever their length.

    Attributes:
        start: where it begins; `start.place.row` is the number of its first row.
        store: its rows.
        end: the place after its last row.
        is_last: whether the sources end there.
    """

    start: BlockStart
    store: DocumentStore
    end: Place
    is_last: bool

    @property
    def next_start(self) -> BlockStart:
        """Where the next one begins, but for its `num_samples`."""
        number = self.start.number + 1
        if self.is_last:
            return BlockStart(number=number, num_passes=self.start.num_passes + 1)
        return BlockStart(number=number, num_passes=self.start.num_passes, place=self.end)


@dataclass(frozen=True, slots=True)
class BegunStream:
    """A stream of which the first block has been read.

    Attributes:
        stream: what is read.
        first: that block.
        rows: the rest of the rows.
    """

    stream: Stream
    first: Block
    rows: StreamedRows


def open_stream(section: DataSection, tokenizer: KnownTokenizer) -> Stream:
    """The stream of `data.train`; no row of it is read yet.

    Raises:
        DataError: a source is not there, or the hub does not have it or cannot be reached.
    """
    named = sources_named(section, "train")
    sources = tuple(streamed(source) if isinstance(source, HubDataset) else source for source in named)
    return Stream(sources, section, tokenizer)


def open_rows(stream: Stream, place: Place = START) -> StreamedRows:
    """The rows of a stream from a place on, to the end of the sources; `read_block` takes them block by block.

    Raises:
        DataError: while they are taken: a source or a row cannot be read.
    """
    return in_batches(iter_sources(stream.sources, stream.section, place))


def read_block(stream: Stream, start: BlockStart, rows: StreamedRows) -> Generator[Reading, None, Block]:
    """Reads and tokenises the rows of a block, while it yields how far it is.

    They lie in files that have no name any more once they are written, so that nothing of them is left behind, however
    the process ends; what is left by one that is killed meanwhile is removed by a later one.

    Args:
        stream: what is read.
        start: of the block.
        rows: `open_rows` at that place, or as the block before has left them.

    Raises:
        DataError: a source or a row cannot be read or tokenised.
        StorageError: the cache cannot be written.
    """
    folder = cache_folder() / "tokens" / "stream"
    with writing_told(folder, room=ROOM), scratch(folder) as temporary:
        with DocumentWriter(temporary) as writer:
            end, is_last = yield from _write_block(writer, stream, start.place, rows)
        return Block(start=start, store=DocumentStore(temporary), end=end, is_last=is_last)


def _write_block(
    writer: DocumentWriter, stream: Stream, start: Place, rows: StreamedRows
) -> Generator[Reading, None, tuple[Place, bool]]:
    """At least `stream_rows` rows, and at most a batch more, unless the sources end."""
    section, sources = stream.section, stream.sources
    tokenize = RowTokenizer(stream.tokenizer.tokenizer, train_on=section.train_on, where=stream.tokenizer.where)
    place, num_rows, is_last = start, 0, True
    found: dict[int, FileRead] = {}
    for item in rows:
        if isinstance(item, list):
            for row in tokenize(item):
                writer.append(row, file=place.source - start.source)
            num_rows += len(item)
            counted = found.get(place.source, _NOTHING)
            found[place.source] = replace(counted, format_name=item[-1].form, num_rows=counted.num_rows + len(item))
            place = Place(place.source, item[-1].line, item[-1].index + 1)
            if num_rows >= section.stream_rows:
                is_last = False
                break
        elif isinstance(item, BadRow):
            found[place.source] = _with_bad(found.get(place.source, _NOTHING), item.error)
        elif isinstance(item, FileRead):
            place = Place(place.source + 1, 0, place.row)
        else:
            yield item
    numbers = range(start.source, min(place.source + 1, len(sources)))
    writer.write_files(tuple(replace(found.get(n, _NOTHING), path=str(sources[n])) for n in numbers))
    return place, is_last


def _with_bad(counted: FileRead, error: DataError) -> FileRead:
    reasons = (*counted.reasons, error.short)[:MAX_REASONS]
    return replace(counted, num_bad=counted.num_bad + 1, reasons=reasons)


def fit_block(block: Block, stream: Stream, seq_len: int) -> TokenizedData:
    """The documents of a block, each at most `seq_len` long.

    Raises:
        DataError: too many of its rows are left out. (Of a short last block one row may be more than the share: there
            they are counted only.)
    """
    section = stream.section
    is_short = block.store.num_rows < section.stream_rows and block.start.number > 0
    share = None if is_short else section.max_dropped_share
    return fit_documents(select_block(block, stream), seq_len, overlong=section.overlong, max_dropped_share=share)


def select_block(block: Block, stream: Stream) -> TokenizedData:
    """The documents of a block, whatever their length."""
    bos_token_id = stream.tokenizer.tokenizer.bos_token_id
    rows = all_rows(block.store.num_rows)
    return select(block.store, rows, bos_token_id=bos_token_id, num_bad=num_bad_rows(block.store.files))


def stream_hash(stream: Stream, first: Block) -> str:
    """SHA-256 of what is known of a stream when it begins: the commits of hub ids, and the tokens of its first block.

    What comes after may grow, or be corrected, while the run goes on; the block that a resume goes on in has a hash of
    its own.
    """
    commits = [str(source.revision) for source in stream.sources if isinstance(source, HubDataset)]
    return hashlib.sha256("\n".join([*commits, first.store.content_hash]).encode()).hexdigest()
