from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.chat import TokenizedRow
from qlora_trainer.data.document_store import DocumentStore, DocumentWriter
from qlora_trainer.data.documents import Documents
from qlora_trainer.data.rows import FileRead, Row
from qlora_trainer.step.document import IGNORE_INDEX, Document
from tests.data.stored import store_of, stored

FILES = (FileRead("a.jsonl", "messages", 2, 1, ("a.jsonl:2: found no row",)), FileRead("b.parquet", "text", 1, 0, ()))


def tokenized(row: Row, learned: list[bool], *, num_rewritten: int = 0) -> TokenizedRow:
    ids_T = np.arange(100, 100 + len(learned), dtype=np.int32)
    labels_T = np.where(learned, ids_T, np.int32(IGNORE_INDEX))
    return TokenizedRow(row, "", Document(index=row.index, input_ids_T=ids_T, labels_T=labels_T), num_rewritten)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=12))
def test_what_is_written_is_read_back(learned: list[list[bool]]) -> None:
    """Documents without a token to learn are not there, and rows keep their numbers."""
    rows = [tokenized(Row("train.jsonl", number, number + 1, ()), mask) for number, mask in enumerate(learned)]
    documents = stored(row.document for row in rows).documents
    expected = [row.document for row in rows if row.document.num_supervised_tokens]
    assert len(documents) == len(expected)
    for found, wanted in zip(documents, expected, strict=True):
        assert found.index == wanted.index
        assert found.input_ids_T.tolist() == wanted.input_ids_T.tolist()
        assert found.labels_T.tolist() == wanted.labels_T.tolist()
        assert found.input_ids_T.dtype == found.labels_T.dtype == np.int32
    assert documents.lengths_N.tolist() == [document.num_tokens for document in expected]
    assert documents.pieces_N["num_supervised"].tolist() == [document.num_supervised_tokens for document in expected]


def test_rows_are_known_by_where_they_are_from(tmp_path: Path, make_row: Callable[..., Row]) -> None:
    rows = [
        Row("a.jsonl", 0, 1, make_row(("user", "Hi"), ("assistant", "Hello")).messages),
        Row("a.jsonl", 1, 3, ()),
        Row("b.parquet", 2, 1, (), text="a plain text", is_line=False),
    ]
    with DocumentWriter(tmp_path) as writer:
        for number, row in enumerate(rows):
            writer.append(tokenized(row, [True] * 3, num_rewritten=number), file=int(row.path == "b.parquet"))
        writer.write_files(FILES)
    store = DocumentStore(tmp_path)
    assert store.files == FILES
    assert [store.where(number) for number in range(3)] == ["a.jsonl:1", "a.jsonl:3", "b.parquet:row 1"]
    assert store.paths(np.arange(3, dtype=np.int32)) == ["a.jsonl", "b.parquet"]
    assert store.paths(np.arange(2, dtype=np.int32)) == ["a.jsonl"]
    assert store.is_askable_N.tolist() == [True, False, False]
    assert store.num_rewritten_N.tolist() == [0, 1, 2]


def test_a_store_that_is_cut_short_while_it_is_read_is_told(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS instead."""
    with DocumentWriter(tmp_path) as writer:
        for number in range(3):
            writer.append(tokenized(Row("a.jsonl", number, number + 1, ()), [True] * 50), file=0)
        writer.write_files(FILES[:1])
    store = DocumentStore(tmp_path)
    documents = Documents.of_rows(store, np.arange(3, dtype=np.int32), bos_token_id=None)
    (tmp_path / "tokens.bin").write_bytes(b"\0" * 300)
    assert documents[0].num_tokens == 50
    with pytest.raises(EOFError, match="100 of 200 bytes at 200"):
        documents[1]


def test_documents_are_a_sequence() -> None:
    rows = [tokenized(Row("a.jsonl", number, number + 1, ()), [True] * (number + 1)) for number in range(1, 6)]
    documents = Documents.of_rows(store_of(rows), np.array([0, 2, 3], dtype=np.int32), bos_token_id=None)
    assert [document.index for document in documents] == [0, 2, 3]
    assert [document.index for document in documents[1:]] == [2, 3]
    assert documents[-1].num_tokens == documents.longest_tokens == 5
    with pytest.raises(IndexError):
        documents[3]
