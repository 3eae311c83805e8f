"""What a run reads before any weight: the base's config and tokenizer, and the data, tokenised and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.paths import read_chat_template
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.chat import tokenize
from qlora_trainer.data.named import forms_told, iter_named
from qlora_trainer.data.rows import FileRead, Row, collect
from qlora_trainer.data.split import hold_out
from qlora_trainer.data.template import require_chat_template, require_fast
from qlora_trainer.data.tokenized import TokenizedData, changes_told, choose_seq_len, fit_documents, require_most_rows
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.model.base import Base, read_tokenizer, require_tokenizer_fits, resolve_base
from qlora_trainer.model.sealed_folder import sha256_of
from qlora_trainer.run.records import Preparing, RowsSkipped
from qlora_trainer.run.session import Question


@dataclass(frozen=True, slots=True)
class Data:
    """Documents to train on and to evaluate on.

    Attributes:
        train, evaluation: tokenised, those that are too long left out.
        questions: held-out ones to answer before and after.
        seq_len: tokens of the longest document that is kept.
        hashes: SHA-256 of the files, by what they are.
        files: what was found in each file.
    """

    train: TokenizedData
    evaluation: TokenizedData
    questions: tuple[Question, ...]
    seq_len: int
    hashes: Mapping[str, str]
    files: tuple[FileRead, ...]

    @property
    def told(self) -> Iterator[Preparing | RowsSkipped]:
        """What the user should know of the data before the first step."""
        yield from (Preparing(what=line) for line in forms_told(self.files))
        for file in self.files:
            if file.num_bad:
                yield RowsSkipped(path=file.path, num_rows=file.num_bad, reasons=file.reasons)
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
    """Read and tokenise the data for a base; the tokenizer gets the config's chat template, if it has one.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    tokenizer_hash = _tokenizer_hash(base.folder)
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.data.chat_template)
        tokenizer_hash = hashlib.sha256(f"{tokenizer_hash}\n{tokenizer.chat_template}".encode()).hexdigest()
    require_fast(tokenizer, str(base.folder))
    require_tokenizer_fits(tokenizer, base)
    data = _read_data(config, base, tokenizer)
    _require_a_batch(data, config.training.global_batch_size)
    return Inputs(base, tokenizer, tokenizer_hash, data)


def _read_data(config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase) -> Data:
    read = collect(iter_named(config.data, "train"))
    files, hashes = read.files, {"training data": _files_hash(read.files)}
    if config.data.eval is not None:
        rows, eval_read = read.rows, collect(iter_named(config.data, "eval"))
        eval_rows, files = eval_read.rows, (*files, *eval_read.files)
        hashes["evaluation data"] = _files_hash(eval_read.files)
    else:
        rows, eval_rows = hold_out(read.rows, config.data.eval_fraction, config.training.seed)
    if any(row.messages for row in (*rows, *eval_rows)):  # a plain text needs no template
        require_chat_template(tokenizer, config.data.chat_template or str(base.folder))
    train_data = tokenize(rows, tokenizer, train_on=config.data.train_on)
    eval_data = tokenize(eval_rows, tokenizer, train_on=config.data.train_on)
    require_most_rows(train_data, config.data.max_dropped_share)
    max_positions = getattr(base.config, "max_position_embeddings", None) or max(train_data.lengths)
    seq_len = config.data.seq_len
    if seq_len == "auto":
        seq_len = choose_seq_len(
            train_data.lengths,
            max_positions,
            overlong=config.data.overlong,
            max_dropped_share=config.data.max_dropped_share,
        )
    elif seq_len > max_positions:
        raise ConfigError(
            where="data.seq_len",
            found=f"{seq_len} tokens",
            expected=f"at most {max_positions}, the positions of {base.name}",
            fix="Lower data.seq_len, or choose a base with a longer context.",
        )
    askable = [row for row in eval_rows if _is_askable(row)]
    num_questions = min(config.output.sample_questions, len(askable))
    return Data(
        train=_fitted(train_data, seq_len, rows, config, tokenizer),
        evaluation=_fitted(eval_data, seq_len, eval_rows, config, tokenizer),
        # Spread over the held-out rows: neighbours in a file are often about the same thing.
        questions=tuple(_question(askable[i * len(askable) // num_questions]) for i in range(num_questions)),
        seq_len=seq_len,
        hashes=hashes,
        files=files,
    )


def _fitted(
    data: TokenizedData, seq_len: int, rows: Sequence[Row], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenizedData:
    return fit_documents(
        data,
        seq_len,
        overlong=config.data.overlong,
        max_dropped_share=config.data.max_dropped_share,
        bos_token_id=tokenizer.bos_token_id,
        rows=rows,
    )


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


def _is_askable(row: Row) -> bool:
    """Whether the last answer can be compared with a text: there are messages, and no tools to call."""
    return bool(row.messages) and not row.tools and not any(message.tool_calls for message in row.messages)


def _question(row: Row) -> Question:
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    return Question(messages=row.messages[:last], reference=row.messages[last].content)


def _files_hash(files: Sequence[FileRead]) -> str:
    """The hash of the only file, or one over the hashes of all in order; their names do not count."""
    hashes = [sha256_of(Path(file.path)) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _tokenizer_hash(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        digest.update(f"{name}:{sha256_of(path) if path.is_file() else None}\n".encode())
    return digest.hexdigest()
