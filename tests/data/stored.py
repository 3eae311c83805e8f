"""Rows and documents as a run holds them: in a store, of which only the open files are left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qlora_trainer.data.chat import RowTokenizer, TokenizedRow
from qlora_trainer.data.document_store import DocumentStore, DocumentWriter
from qlora_trainer.data.rows import FileRead, Message, Row
from qlora_trainer.data.split import all_rows
from qlora_trainer.data.tokenized import TokenizedData, select
from qlora_trainer.data.turns import TrainOn
from qlora_trainer.step.document import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "assistant"
) -> TokenizedData:
    """All rows, of whatever length."""
    return _select(RowTokenizer(tokenizer, train_on=train_on)(rows), bos_token_id=tokenizer.bos_token_id)


def stored(documents: Iterable[Document], *, bos_token_id: int | None = None) -> TokenizedData:
    """Documents that were tokenised elsewhere."""
    messages = (Message("user", "Hi"), Message("assistant", "Hello"))
    rows = [
        TokenizedRow(Row("train.jsonl", number, number + 1, messages), "", document, 0)
        for number, document in enumerate(documents)
    ]
    return _select(rows, bos_token_id=bos_token_id)


def store_of(rows: Sequence[TokenizedRow]) -> DocumentStore:
    """Its folder is gone."""
    with TemporaryDirectory() as name:
        with DocumentWriter(Path(name)) as writer:
            for row in rows:
                writer.append(row, file=0)
            writer.write_files((FileRead("train.jsonl", "messages", len(rows), 0, ()),))
        return DocumentStore(Path(name))


def _select(rows: Sequence[TokenizedRow], *, bos_token_id: int | None) -> TokenizedData:
    return select(store_of(rows), all_rows(len(rows)), bos_token_id=bos_token_id)
