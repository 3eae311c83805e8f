"""A look at data before anything is trained on it: every row is read and tokenised, and what is wrong is counted.

Unlike a run, which stops at the first bad row, this goes on to the last; of a stream, which may have no end, to the
last of its first `MAX_STREAMED_ROWS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.chat import RowTokenizer, TokenizedRow
from qlora_trainer.data.document_store import DocumentStore, DocumentWriter
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.named import iter_named, iter_sources
from qlora_trainer.data.rows import BadRow, FileRead, Reading, Row, in_batches
from qlora_trainer.data.stream import open_stream
from qlora_trainer.data.token_maker import ROOM
from qlora_trainer.errors import DataError
from qlora_trainer.hardware.cache_folder import cache_folder, writing_told
from qlora_trainer.hardware.sealed_folder import scratch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_EXAMPLES = 5
MAX_STREAMED_ROWS = 100_000  # a minute or two; more of them, where a block of the stream has more


@dataclass(frozen=True, slots=True)
class Problem:
    """Rows with which the same is wrong.

    Attributes:
        kind: in words, one row of them.
        num_rows: how many there are.
        examples: what the first `MAX_EXAMPLES` are, each beginning with the row's place.
    """

    kind: str
    num_rows: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was found in the files of one key.

    Attributes:
        store: all good rows, tokenised.
        bad: rows that are no conversation or text: they stop a run, or are passed over where the config says so.
        refused: rows that cannot be tokenised: they stop every run.
        warnings: what trains, but perhaps not what was meant.
        num_bad: rows that are bad or refused.
        stop_ids: the tokens that answers, or plain texts, end with.
        is_beginning: they are a stream, and there may be more rows than were read.
    """

    store: DocumentStore
    bad: tuple[Problem, ...]
    refused: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    num_bad: int
    stop_ids: frozenset[int]
    is_beginning: bool = False


def check_named(
    section: DataSection, key: Literal["train", "eval"], tokenizer: KnownTokenizer
) -> Generator[Reading, None, Checked]:
    """Reads and tokenises every row under `key`, or the first ones of a stream, while it yields how far it is.

    Raises:
        DataError: a file cannot be read, or holds no good row.
        ConfigError: there are conversations, and no chat template that works.
    """
    tokenize = RowTokenizer(tokenizer.tokenizer, train_on=section.train_on, where=tokenizer.where)
    bad, refused, warned = _Tally(), _Tally(), _Tally()
    files: list[FileRead] = []
    most_rows = max(MAX_STREAMED_ROWS, section.stream_rows) if key == "train" and section.streaming else None
    with writing_told(cache_folder(), room=ROOM), scratch(cache_folder() / "check") as folder:
        with DocumentWriter(folder) as writer:
            for item in in_batches(_rows(section, key, tokenizer, most_rows)):
                if isinstance(item, list):
                    tokenized, errors = _tokenized(item, tokenize)
                    for error in errors:
                        kind = "row that cannot be tokenised" if error.kind == "bad row" else error.kind
                        refused.add(kind, error.short)
                    for row in tokenized:
                        writer.append(row, file=len(files))
                    for asked in filter(_asks_nothing, item):
                        warned.add("question without text", asked.where)
                    for row in _not_the_text(tokenized, tokenizer.tokenizer):
                        warned.add("text that the tokenizer cannot give back", row.row.where)
                elif isinstance(item, BadRow):
                    bad.add(item.error.kind, item.error.short)
                elif isinstance(item, FileRead):
                    files.append(item)
                else:
                    yield item
            writer.write_files(tuple(files))
        store = DocumentStore(folder)  # its files stay open; the folder goes
    return Checked(
        store=store,
        bad=bad.problems,
        refused=refused.problems,
        warnings=warned.problems,
        num_bad=bad.num_rows + refused.num_rows,
        stop_ids=tokenize.stop_ids_seen,
        is_beginning=sum(file.num_rows + file.num_bad for file in files) == most_rows,
    )


def _rows(
    section: DataSection, key: Literal["train", "eval"], tokenizer: KnownTokenizer, most_rows: int | None
) -> Iterator[Row | BadRow | Reading | FileRead]:
    """Good and bad ones; those of a stream as the run reads them, a hub id without a download."""
    section = section.model_copy(update={"on_bad_row": "skip"})
    if most_rows is None:
        return iter_named(section, key)
    return iter_sources(open_stream(section, tokenizer).sources, section, most_rows=most_rows)


class _Tally:
    """Counts by kind, with the first examples."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= MAX_EXAMPLES:
            self._examples.setdefault(kind, []).append(example)

    @property
    def num_rows(self) -> int:
        return self._counts.total()

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(Problem(kind, count, tuple(self._examples[kind])) for kind, count in self._counts.most_common())


def _tokenized(batch: Sequence[Row], tokenize: RowTokenizer) -> tuple[list[TokenizedRow], list[DataError]]:
    """The rows of a batch that can be, and what is wrong with the others."""
    try:
        return tokenize(batch), []
    except DataError:
        pass
    tokenized: list[TokenizedRow] = []
    errors: list[DataError] = []
    for row in batch:
        try:
            tokenized += tokenize([row])
        except DataError as error:
            errors.append(error)
    return tokenized, errors


def _asks_nothing(row: Row) -> bool:
    """Whether a question is empty: that may be meant (a story out of nothing), or a column that was lost."""
    return any(message.role == "user" and not message.content.strip() for message in row.messages)


def _not_the_text(rows: Sequence[TokenizedRow], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedRow]:
    """Those whose tokens read otherwise than their text; a space at the start is the tokenizer's own affair."""
    ids = [row.document.input_ids_T.tolist() for row in rows]
    # Of transformers' own `batch_decode` this is what is left without clean-up; it looks at each token in Python first.
    texts = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return [row for row, text in zip(rows, texts, strict=True) if text.lstrip(" ") != row.text.lstrip(" ")]
