"""What a run reads before any weight: the base's config and tokenizer, and the data, tokenised and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.chat import TokenizedData, choose_seq_len, drop_overlong, require_chat_template, tokenize
from qlora_trainer.data.rows import Row, RowsRead, read_rows_and_bad
from qlora_trainer.data.split import hold_out
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.model.base import Base, read_tokenizer, require_tokenizer_fits, resolve_base
from qlora_trainer.model.sealed_folder import sha256_of
from qlora_trainer.run.records import RowsSkipped
from qlora_trainer.run.session import Question


@dataclass(frozen=True, slots=True)
class Data:
    """Documents to train on and to evaluate on.

    Attributes:
        train, evaluation: tokenised, those that are too long left out.
        questions: held-out ones to answer before and after.
        seq_len: tokens of the longest document that is kept.
        hashes: SHA-256 of the files, by what they are.
        skipped: of each file that had bad rows, which were passed over.
    """

    train: TokenizedData
    evaluation: TokenizedData
    questions: tuple[Question, ...]
    seq_len: int
    hashes: Mapping[str, str]
    skipped: tuple[RowsSkipped, ...]


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that is known before weights are loaded.

    Attributes:
        base: its weights may still be on the hub.
        tokenizer: of the base.
        tokenizer_hash: over its files.
        data: what is learned.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    data: Data


def read_inputs(config: RunConfig) -> Inputs:
    """Find the base, and read and tokenise the data.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    return read_documents(config, *find_base(config))


def find_base(config: RunConfig) -> tuple[Base, PreTrainedTokenizerBase]:
    """The base without its weights, and its tokenizer.

    Raises:
        ConfigError: no such base, one that cannot be trained, or no tokenizer beside it.
    """
    base = resolve_base(config.model.base, config.model.revision, with_weights=False)
    return base, read_tokenizer(base.folder)


def read_documents(config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Read and tokenise the data for a base.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    require_chat_template(tokenizer, str(base.folder))
    require_tokenizer_fits(tokenizer, base)
    data = _read_data(config, base, tokenizer)
    _require_a_batch(data, config.training.global_batch_size)
    return Inputs(base, tokenizer, _tokenizer_hash(base.folder), data)


def _read_data(config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase) -> Data:
    train_path = Path(config.data.train)
    hashes = {"training data": sha256_of(train_path)}
    stop = config.data.on_bad_row == "stop"
    train_read = read_rows_and_bad(train_path, stop=stop)
    skipped = [_rows_skipped(train_read)]
    rows: Sequence[Row] = train_read.rows
    if config.data.eval is not None:
        eval_read = read_rows_and_bad(Path(config.data.eval), stop=stop)
        skipped.append(_rows_skipped(eval_read))
        eval_rows: Sequence[Row] = eval_read.rows
        hashes["evaluation data"] = sha256_of(Path(config.data.eval))
    else:
        rows, eval_rows = hold_out(rows, config.data.eval_fraction, config.training.seed)
    train_data = tokenize(rows, tokenizer, seq_len=None)
    eval_data = tokenize(eval_rows, tokenizer, seq_len=None)
    max_positions = getattr(base.config, "max_position_embeddings", None) or max(train_data.lengths)
    seq_len = config.data.seq_len
    if seq_len == "auto":
        seq_len = choose_seq_len(train_data.lengths, max_positions)
    elif seq_len > max_positions:
        raise ConfigError(
            where="data.seq_len",
            found=f"{seq_len} tokens",
            expected=f"at most {max_positions}, the positions of {base.name}",
            fix="Lower data.seq_len, or choose a base with a longer context.",
        )
    num_questions = min(config.output.sample_questions, len(eval_rows))
    return Data(
        train=drop_overlong(train_data, seq_len),
        evaluation=drop_overlong(eval_data, seq_len) if eval_rows else eval_data,
        # Spread over the held-out rows: neighbours in a file are often about the same thing.
        questions=tuple(_question(eval_rows[i * len(eval_rows) // num_questions]) for i in range(num_questions)),
        seq_len=seq_len,
        hashes=hashes,
        skipped=tuple(told for told in skipped if told.num_rows),
    )


def _rows_skipped(read: RowsRead) -> RowsSkipped:
    return RowsSkipped(path=read.path, num_rows=read.num_bad, reasons=read.reasons)


def _require_a_batch(data: Data, global_batch_size: int) -> None:
    """Refuse data of which one step would see a document twice.

    Raises:
        DataError: there are fewer documents than a global batch has.
    """
    num_documents = len(data.train.documents)
    if num_documents < global_batch_size:
        dropped = data.train.num_rows - num_documents
        raise DataError(
            where=data.train.path,
            found=f"{num_documents} documents to train on ({dropped} dropped, {data.evaluation.num_rows} held out)",
            expected=f"at least training.global_batch_size = {global_batch_size}",
            fix="Lower training.global_batch_size, or add rows.",
        )


def _question(row: Row) -> Question:
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    return Question(messages=row.messages[:last], reference=row.messages[last].content)


def _tokenizer_hash(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        digest.update(f"{name}:{sha256_of(path) if path.is_file() else None}\n".encode())
    return digest.hexdigest()
