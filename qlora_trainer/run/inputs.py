"""What a run reads before any weight: the base's config and tokenizer, and the data, tokenised and counted."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.paths import read_chat_template
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.array_file import ArrayFile
from qlora_trainer.data.document_store import DocumentStore
from qlora_trainer.data.known_tokenizer import KnownTokenizer, tokenizer_hash
from qlora_trainer.data.named import forms_told, num_bad_rows, rows_of
from qlora_trainer.data.rows import FileRead, Reading, Row
from qlora_trainer.data.split import all_rows, hold_out
from qlora_trainer.data.stream import (
    BegunStream,
    BlockStart,
    fit_block,
    open_rows,
    open_stream,
    read_block,
    select_block,
    stream_hash,
)
from qlora_trainer.data.template import require_fast
from qlora_trainer.data.token_cache import TokenizedFiles, tokenize_named
from qlora_trainer.data.tokenized import (
    TokenizedData,
    changes_told,
    choose_seq_len,
    fit_documents,
    require_most_rows,
    select,
)
from qlora_trainer.errors import DataError
from qlora_trainer.model.base import Base, read_tokenizer, require_tokenizer_fits, resolve_base
from qlora_trainer.model.positions import max_positions, require_positions
from qlora_trainer.run.records import Preparing, RowsSkipped
from qlora_trainer.run.session import Question

# Questions are found again in the text of the files; of a huge one only the start is read for them.
MAX_ROWS_READ_FOR_QUESTIONS = 100_000


@dataclass(frozen=True, slots=True)
class Data:
    """Documents to train on and to evaluate on.

    Attributes:
        train, evaluation: tokenised, those that are too long left out. Of a stream the first block is trained on first.
        questions: held-out ones to answer before and after.
        seq_len: tokens of the longest document that is kept.
        hashes: SHA-256 of the files, by what they are.
        files: what was found in each file.
        stream: where the data that is trained on goes on, if it is read meanwhile.
    """

    train: TokenizedData
    evaluation: TokenizedData
    questions: tuple[Question, ...]
    seq_len: int
    hashes: Mapping[str, str]
    files: tuple[FileRead, ...]
    stream: BegunStream | None = None

    @property
    def told(self) -> Iterator[Preparing | RowsSkipped]:
        """What the user should know of the data before the first step."""
        yield from (Preparing(what=line) for line in forms_told(self.files))
        if self.stream is not None:
            yield Preparing(what=f"the training data is streamed: read are its first {self.train.num_rows:,} rows")
        yield from skipped_told(self.files)
        yield from (Preparing(what=line) for line in changes_told(self.train))


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that is known before weights are loaded.

    Attributes:
        base: its weights may still be on the hub.
        tokenizer: of the base, with the template of the config where that has one.
        tokenizer_hash: over its files, and that template.
        data: what is learned.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    data: Data


def skipped_told(files: Iterable[FileRead]) -> Iterator[RowsSkipped]:
    """The bad rows of files that have some."""
    for file in files:
        if file.num_bad:
            yield RowsSkipped(path=file.path, num_rows=file.num_bad, reasons=file.reasons)


def read_inputs(config: RunConfig) -> Generator[Reading, None, Inputs]:
    """Find the base, and read and tokenise the data, while yielding how far it is.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    return (yield from read_documents(config, *find_base(config)))


def find_base(config: RunConfig) -> tuple[Base, PreTrainedTokenizerBase]:
    """The base without its weights, and its tokenizer.

    Raises:
        ConfigError: no such base, one that cannot be trained, or no tokenizer beside it.
    """
    layers = config.lora.layer_replication
    base = resolve_base(config.model.base, config.model.revision, with_weights=False, layer_replication=layers)
    return base, read_tokenizer(base.folder)


def read_documents(
    config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase
) -> Generator[Reading, None, Inputs]:
    """Read and tokenise the data for a base; the tokenizer gets the config's chat template, if it has one.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    known = known_tokenizer(config, base, tokenizer)
    data = yield from _read_data(config, base, known)
    _require_a_batch(data, config.training.global_batch_size)
    return Inputs(base, tokenizer, known.content_hash, data)


def known_tokenizer(config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase) -> KnownTokenizer:
    """The base's tokenizer; it gets the config's chat template, if it has one.

    Raises:
        ConfigError: it is a slow one, or knows tokens that the base has no room for.
    """
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.data.chat_template)
    require_fast(tokenizer, str(base.folder))
    require_tokenizer_fits(tokenizer, base)
    return KnownTokenizer(tokenizer, tokenizer_hash(tokenizer), where=config.data.chat_template or str(base.folder))


def _read_data(config: RunConfig, base: Base, tokenizer: KnownTokenizer) -> Generator[Reading, None, Data]:
    if config.data.streaming:
        return (yield from _begin_stream(config, base, tokenizer))
    section = config.data
    bos_token_id = tokenizer.tokenizer.bos_token_id
    train = yield from tokenize_named(section, "train", tokenizer)
    held_out = None if section.eval is None else (yield from tokenize_named(section, "eval", tokenizer))
    rows, eval_rows = train_and_held_out(config, train.store, held_out.store if held_out else None)
    # Bad rows are drawn for neither part of one set of files: they count to what is trained on.
    train_data = select(train.store, rows, bos_token_id=bos_token_id, num_bad=num_bad_rows(train.store.files))
    require_most_rows(train_data, section.max_dropped_share)
    seq_len = decide_seq_len(config, base, train_data)
    fitted = fit_documents(train_data, seq_len, overlong=section.overlong, max_dropped_share=section.max_dropped_share)
    evaluation, questions = _held_out(config, held_out or train, eval_rows, tokenizer, seq_len)
    return Data(
        train=fitted,
        evaluation=evaluation,
        questions=questions,
        seq_len=seq_len,
        hashes=_hashes(train.content_hash, held_out),
        files=(*train.store.files, *(held_out.store.files if held_out else ())),
    )


def _begin_stream(config: RunConfig, base: Base, tokenizer: KnownTokenizer) -> Generator[Reading, None, Data]:
    section = config.data
    stream = open_stream(section, tokenizer)
    rows = open_rows(stream)
    first = yield from read_block(stream, BlockStart(), rows)
    whole = select_block(first, stream)
    require_most_rows(whole, section.max_dropped_share)
    seq_len = decide_seq_len(config, base, whole)
    held_out = None if section.eval is None else (yield from tokenize_named(section, "eval", tokenizer))
    if held_out is not None:
        eval_rows = all_rows(held_out.store.num_rows)
        evaluation, questions = _held_out(config, held_out, eval_rows, tokenizer, seq_len)
    else:
        evaluation, questions = select(first.store, all_rows(0), bos_token_id=None), ()
    return Data(
        train=fit_block(first, stream, seq_len),
        evaluation=evaluation,
        questions=questions,
        seq_len=seq_len,
        hashes=_hashes(stream_hash(stream, first), held_out),
        files=(*first.store.files, *(held_out.store.files if held_out else ())),
        stream=BegunStream(stream, first, rows),
    )


def _hashes(train_hash: str, held_out: TokenizedFiles | None) -> dict[str, str]:
    return {"training data": train_hash} | ({"evaluation data": held_out.content_hash} if held_out else {})


def _held_out(
    config: RunConfig, files: TokenizedFiles, rows: ArrayFile, tokenizer: KnownTokenizer, seq_len: int
) -> tuple[TokenizedData, tuple[Question, ...]]:
    """The documents to evaluate on, rows of their own files or of those that are trained on; and questions of them."""
    section, store = config.data, files.store
    has_files = section.eval is not None
    num_bad = num_bad_rows(store.files) if has_files else 0
    data = select(store, rows, bos_token_id=tokenizer.tokenizer.bos_token_id, num_bad=num_bad)
    # A part that is held out may be a dozen rows, of which one is more than the share: there it is counted only.
    share = section.max_dropped_share if has_files else 1.0
    asked = spread(_askable(store, rows), config.output.sample_questions)
    questions = tuple(_question(row) for row in rows_of(files.sources, section, asked))
    return fit_documents(data, seq_len, overlong=section.overlong, max_dropped_share=share), questions


def _askable(store: DocumentStore, rows: ArrayFile) -> list[int]:
    """Those of the rows, among the first of their files, that a sample answer can be compared with."""
    found: list[int] = []
    for chunk_N in rows.chunks():
        rows_N = chunk_N[chunk_N < MAX_ROWS_READ_FOR_QUESTIONS]
        found += rows_N[store.records(rows_N)["is_askable"]].tolist()
        if rows_N.size < chunk_N.size:
            break
    return found


def train_and_held_out(
    config: RunConfig, train: DocumentStore, held_out: DocumentStore | None
) -> tuple[ArrayFile, ArrayFile]:
    """The rows of `train` to train on, and those held out: all of `held_out`, or where it is None others of `train`."""
    if held_out is None:
        return hold_out(train.num_rows, config.data.eval_fraction, config.training.seed)
    return all_rows(train.num_rows), all_rows(held_out.num_rows)


def decide_seq_len(config: RunConfig, base: Base, data: TokenizedData) -> int:
    """Tokens of the longest document that is kept: what was asked for, or what the documents need.

    Raises:
        ConfigError: more is asked for than the base has positions.
    """
    seq_len = config.data.seq_len
    if seq_len == "auto":
        return choose_seq_len(
            data.documents.lengths,
            max_positions(base.config) or data.documents.lengths.longest,
            overlong=config.data.overlong,
            max_dropped_share=config.data.max_dropped_share,
        )
    require_positions(seq_len, base.config, base.name)
    return seq_len


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """That many of the numbers, from all over: neighbours in a file are often about the same thing."""
    count = min(count, len(numbers))
    return [numbers[number * len(numbers) // count] for number in range(count)]


def _require_a_batch(data: Data, global_batch_size: int) -> None:
    """Refuse data of which one step would see a document twice.

    Raises:
        DataError: there are fewer documents than a global batch has.
    """
    num_documents = len(data.train.documents)
    if num_documents < global_batch_size:
        raise DataError(
            where=data.train.path,
            found=f"{num_documents} documents to train on "
            f"({data.train.num_dropped} dropped, {data.evaluation.num_rows} held out)",
            expected=f"at least training.global_batch_size = {global_batch_size}",
            fix="Lower training.global_batch_size, or add rows.",
        )


def _question(row: Row) -> Question:
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    return Question(messages=row.messages[:last], reference=row.messages[last].content)
