from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.array_file import ArrayFile
from qlora_trainer.data.chat import TokenizedRow
from qlora_trainer.data.document_store import DocumentStore, DocumentWriter
from qlora_trainer.data.documents import Documents
from qlora_trainer.data.rows import FileRead, Row
from qlora_trainer.data.split import all_rows
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
    lengths = [document.num_tokens for document in expected]
    assert [documents.num_tokens(position) for position in range(len(documents))] == lengths
    assert (documents.lengths.num_documents, documents.lengths.num_tokens) == (len(lengths), sum(lengths))
    assert documents.num_supervised_tokens == sum(document.num_supervised_tokens for document in expected)
    assert documents.num_rows == len(expected)


def test_rows_are_known_by_where_they_are_from(tmp_path: Path, make_row: Callable[..., Row]) -> None:
    rows = [
        Row("a.jsonl", 0, 1, make_row(("user", "Hi"), ("assistant", "Hello")).messages),
        Row("a.jsonl", 1, 3, ()),
        Row("b.parquet", 2, 1, (), text="a plain text", is_line=False),
    ]
    with DocumentWriter(tmp_path) as writer:
        for number, row in enumerate(rows):
            row_of_tokens = replace(tokenized(row, [True] * 3, num_rewritten=number), num_lost_names=2 * number)
            writer.append(row_of_tokens, file=int(row.path == "b.parquet"))
        writer.write_files(FILES)
    store = DocumentStore(tmp_path)
    assert store.files == FILES
    assert [store.where(number) for number in range(3)] == ["a.jsonl:1", "a.jsonl:3", "b.parquet:row 1"]
    assert store.paths(all_rows(3)) == ["a.jsonl", "b.parquet"]
    assert store.paths(all_rows(2)) == ["a.jsonl"]
    records_N = store.records(np.arange(3))
    assert records_N["is_askable"].tolist() == [True, False, False]
    assert records_N["num_rewritten"].tolist() == [0, 1, 2]
    assert records_N["num_lost_names"].tolist() == [0, 2, 4]


def test_a_store_that_is_cut_short_while_it_is_read_is_told(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS instead."""
    with DocumentWriter(tmp_path) as writer:
        for number in range(3):
            writer.append(tokenized(Row("a.jsonl", number, number + 1, ()), [True] * 50), file=0)
        writer.write_files(FILES[:1])
    store = DocumentStore(tmp_path)
    documents = Documents.of_rows(store, all_rows(3), bos_token_id=None)
    (tmp_path / "tokens.bin").write_bytes(b"\0" * 300)
    assert documents[0].num_tokens == 50
    with pytest.raises(EOFError, match="100 of 200 bytes at 200"):
        documents[1]


def test_documents_are_a_sequence() -> None:
    rows = [tokenized(Row("a.jsonl", number, number + 1, ()), [True] * (number + 1)) for number in range(1, 6)]
    documents = Documents.of_rows(store_of(rows), ArrayFile("<i4", [np.array([0, 2, 3])]), bos_token_id=None)
    assert [document.index for document in documents] == [0, 2, 3]
    assert [document.index for document in documents[1:]] == [2, 3]
    assert documents[-1].num_tokens == documents.lengths.longest == 5
    with pytest.raises(IndexError):
        documents[3]
