from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.data_cost import BYTES_A_ROW, write_store
from qlora_trainer.data.array_file import ArrayFile
from qlora_trainer.data.document_store import DocumentStore
from qlora_trainer.data.order import Order
from qlora_trainer.data.split import all_rows, hold_out
from qlora_trainer.data.tokenized import Overlong, fit_documents, length_percentiles, select


def train(store: DocumentStore, rows: ArrayFile, *, seq_len: int, overlong: Overlong) -> None:
    """What a run does with its data, but for the model."""
    whole = select(store, rows, bos_token_id=None)
    data = fit_documents(whole, seq_len, overlong=overlong, max_dropped_share=None)
    length_percentiles(data.documents.lengths)
    assert store.num_repeated == 0
    assert len(store.content_hash) == 64
    assert data.num_stopping_rows == data.num_kept_rows
    if len(data.documents):
        order = Order(num_documents=len(data.documents), global_batch_size=16, seed=0, epochs=1.0)
        for step in (0, order.num_steps // 2, order.num_steps - 1):
            for position in order.batch(step):
                assert data.documents[position].num_tokens <= seq_len


def of_all_rows(store: DocumentStore) -> None:
    train(store, all_rows(store.num_rows), seq_len=2048, overlong="drop")


def of_none(store: DocumentStore) -> None:
    train(store, all_rows(store.num_rows), seq_len=100, overlong="drop")


def with_rows_held_out(store: DocumentStore) -> None:
    for rows in hold_out(store.num_rows, 0.3, 0):
        documents = select(store, rows, bos_token_id=None).documents
        assert documents.lengths.num_documents == documents.num_rows == len(rows)


def holding_rows_out(store: DocumentStore) -> None:
    for rows in hold_out(store.num_rows, 0.3, 0):
        assert len(rows)


def peak_bytes(work: Callable[[DocumentStore], None], folder: Path, num_rows: int) -> int:
    store_folder = folder / str(num_rows)
    if not store_folder.exists():
        write_store(store_folder, num_rows * BYTES_A_ROW)
    store = DocumentStore(store_folder)
    tracemalloc.start()  # NumPy's arrays are told to it
    try:
        work(store)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "work, num_rows",
    [(of_all_rows, 400_000), (of_none, 400_000), (with_rows_held_out, 160_000), (holding_rows_out, 160_000)],
)
def test_the_memory_of_data_does_not_depend_on_its_rows(
    work: Callable[[DocumentStore], None], num_rows: int, tmp_path: Path
) -> None:
    """Before, 62 bytes a row stayed while a run trained on them, and 78 at most.

    Mutations tried: pieces in memory, an order of all documents, draws of all rows sorted at once, their contents, too.
    """
    peak_bytes(work, tmp_path, 1000)  # what is made once
    small, large = (peak_bytes(work, tmp_path, rows) for rows in (num_rows // 2, num_rows))
    assert large < small + num_rows // 2 * 2
    assert large < 16 * 2**20
