"""What a run reads before any weight: the base's config and tokenizer, and the data, tokenised and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.chat import TokenizedData, choose_seq_len, drop_overlong, require_chat_template, tokenize
from qlora_trainer.data.rows import Row, read_rows
from qlora_trainer.data.split import hold_out
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.base import Base, read_tokenizer, resolve_base
from qlora_trainer.model.sealed_folder import sha256_of
from qlora_trainer.run.session import Question


@dataclass(frozen=True, slots=True)
class Data:
    """Documents to train on and to evaluate on.

    Attributes:
        train, evaluation: tokenised, those that are too long left out.
        questions: held-out ones to answer before and after.
        seq_len: tokens of the longest document that is kept.
        hashes: SHA-256 of the files, by what they are.
    """

    train: TokenizedData
    evaluation: TokenizedData
    questions: tuple[Question, ...]
    seq_len: int
    hashes: Mapping[str, str]


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
    base = resolve_base(config.model.base, config.model.revision, with_weights=False)
    tokenizer = read_tokenizer(base.folder)
    require_chat_template(tokenizer, str(base.folder))
    return Inputs(base, tokenizer, _tokenizer_hash(base.folder), _read_data(config, base, tokenizer))


def _read_data(config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase) -> Data:
    train_path = Path(config.data.train)
    hashes = {"training data": sha256_of(train_path)}
    rows: Sequence[Row] = read_rows(train_path)
    if config.data.eval is not None:
        eval_rows: Sequence[Row] = read_rows(Path(config.data.eval))
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
