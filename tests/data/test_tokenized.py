from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.chat import TokenizedRow
from qlora_trainer.data.length_counts import LengthCounts
from qlora_trainer.data.rows import Row
from qlora_trainer.data.split import all_rows
from qlora_trainer.data.tokenized import (
    Overlong,
    TokenizedData,
    changes_told,
    choose_seq_len,
    fit_documents,
    require_most_rows,
    select,
)
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX, Document
from tests.data.stored import store_of, stored

BOS = 7


def document(index: int, learned: Sequence[bool], *, bos: bool = False) -> Document:
    ids = np.arange(100, 100 + len(learned), dtype=np.int32)
    if bos:
        ids[0] = BOS
    return Document(index=index, input_ids_T=ids, labels_T=np.where(learned, ids, IGNORE_INDEX).astype(np.int32))


def fit(data: TokenizedData, seq_len: int, overlong: Overlong = "drop", *, share: float = 0.05) -> TokenizedData:
    return fit_documents(data, seq_len, overlong=overlong, max_dropped_share=share)


def texts(data: TokenizedData) -> list[tuple[int, list[int], list[int]]]:
    return [(document.index, document.input_ids_T.tolist(), document.labels_T.tolist()) for document in data.documents]


LEARNED = [[False] * 4 + [True] * (30 if index == 3 else 4) for index in range(40)]
MANY = stored(document(index, learned) for index, learned in enumerate(LEARNED))


def test_overlong_rows_are_dropped_whole_and_counted() -> None:
    data = fit(MANY, 33)
    assert (data.num_rows, data.num_dropped_overlong, data.num_dropped_untrainable) == (40, 1, 0)
    assert [document.index for document in data.documents] == [index for index in range(40) if index != 3]
    assert texts(fit(MANY, 34)) == texts(MANY)
    assert data.num_tokens == sum(document.num_tokens for document in data.documents) == MANY.num_tokens - 34
    assert data.num_supervised_tokens == MANY.num_supervised_tokens - 30
    assert changes_told(data) == []


def test_an_overlong_row_is_cut_to_its_first_tokens() -> None:
    data = fit(MANY, 10, "truncate")
    assert data.documents[3].input_ids_T.tolist() == list(range(100, 110))
    assert data.documents[3].labels_T.tolist() == [IGNORE_INDEX] * 4 + list(range(104, 110))
    assert (data.num_truncated, data.num_dropped, len(data.documents)) == (1, 0, 40)
    assert changes_told(data) == ["1 rows were cut to data.seq_len"]


def test_a_row_without_a_token_to_learn_after_the_cut_is_dropped_and_counted() -> None:
    """Mutation tried: such rows kept; a batch of them divides by 0 supervised tokens."""
    late = document(3, [False] * 20 + [True] * 5)
    data = stored([*MANY.documents[:3], late, *MANY.documents[4:]])
    cut = fit(data, 12, "truncate")
    assert (cut.num_dropped_untrainable, cut.num_truncated, len(cut.documents)) == (1, 0, 39)
    assert all(document.num_supervised_tokens for document in cut.documents)
    with pytest.raises(DataError, match=r"found 1 of 40 rows .*\(1 without a token to learn\); expected at most 2 %"):
        fit(data, 12, "truncate", share=0.02)


@given(
    learned=st.lists(st.booleans(), min_size=2, max_size=60),
    seq_len=st.integers(8, 20),
    has_bos=st.booleans(),
)
def test_the_pieces_of_a_row_learn_each_token_once_from_what_came_before(
    learned: list[bool], seq_len: int, has_bos: bool
) -> None:
    """Mutation tried: pieces without overlap; the first token of each would never be learned."""
    whole = document(5, learned, bos=has_bos)
    if not whole.num_supervised_tokens:
        return
    pieces = fit(stored([whole], bos_token_id=BOS), seq_len, "split").documents
    assert all(piece.num_tokens <= seq_len and piece.index == 0 for piece in pieces)
    assert all(piece.num_supervised_tokens for piece in pieces)
    taught = [label for piece in pieces for label in piece.labels_T[1:].tolist() if label != IGNORE_INDEX]
    assert taught == [label for label in whole.labels_T[1:].tolist() if label != IGNORE_INDEX]
    for piece in pieces:
        before = piece.input_ids_T[0]
        assert before == BOS if has_bos else before == piece.input_ids_T[1] - 1
        assert np.array_equal(np.diff(piece.input_ids_T[1:]), np.ones(piece.num_tokens - 2))


def test_split_rows_are_counted() -> None:
    data = fit(MANY, 12, "split")
    assert (data.num_split, data.num_dropped, data.num_rows) == (1, 0, 40)
    assert [document.index for document in data.documents].count(3) == 3
    assert changes_told(data) == ["1 rows were split into documents of at most data.seq_len"]


def test_the_first_overlong_row_is_an_error_where_that_is_asked() -> None:
    with pytest.raises(
        DataError, match=r"^train\.jsonl:4: found a row of 34 tokens; expected at most data\.seq_len = 33"
    ):
        fit(MANY, 33, "error")
    assert texts(fit(MANY, 34, "error")) == texts(MANY)


def test_too_many_dropped_rows_are_refused_with_counts_unless_allowed() -> None:
    data = stored(document(index, [False, *[True] * (40 if index < 3 else 4)]) for index in range(40))
    with pytest.raises(
        DataError, match=r"train\.jsonl: found 3 of 40 rows .*3 longer than 40 tokens.*max_dropped_share"
    ):
        fit(data, 40)
    assert fit(data, 40, share=0.075).num_dropped == 3
    with pytest.raises(DataError, match="3 of 40"):
        fit(data, 40, share=0.07)
    with pytest.raises(DataError, match=r"40 of 40 rows.*expected at most 100 %"):
        fit(data, 2, share=1.0)
    require_most_rows(select(data.documents.store, all_rows(0), bos_token_id=None), 0.05)  # nothing held out


def test_bad_rows_count_to_the_share_of_dropped_ones() -> None:
    """Mutations tried: bad rows not added to what is dropped, or not to the rows there were."""
    data = select(MANY.documents.store, all_rows(40), bos_token_id=None, num_bad=2)
    require_most_rows(data, 2 / 42)
    with pytest.raises(
        DataError, match=r"train\.jsonl: found 2 of 42 rows .*\(2 bad ones, which .*Correct the bad rows"
    ):
        require_most_rows(data, 0.047)
    assert fit(data, 33, share=3 / 42).num_dropped == 1, "bad rows are no dropped documents"
    with pytest.raises(DataError, match=r"3 of 42 rows .*\(2 bad ones, which .*, 1 longer than 33 tokens\)"):
        fit(data, 33, share=0.07)


@given(st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total - 1), st.just(total))))
def test_a_share_of_exactly_what_is_dropped_is_enough(counts: tuple[int, int]) -> None:
    """0.29 x 100 is 28.999999999999996."""
    num_dropped, total = counts
    data = replace(MANY, num_rows=total, num_dropped_overlong=num_dropped)
    require_most_rows(data, num_dropped / total)
    if num_dropped:
        with pytest.raises(DataError):
            require_most_rows(data, (num_dropped - 0.5) / total)


@given(st.lists(st.integers(1, 5000), min_size=1), st.integers(1, 4096))
def test_the_chosen_seq_len_is_the_smallest_that_holds_99_percent(lengths: list[int], max_positions: int) -> None:
    def holds(seq_len: int, percent: int) -> bool:
        return 100 * sum(length <= seq_len for length in lengths) >= percent * len(lengths)

    counted = LengthCounts.of([np.array(lengths)])
    wanted: list[tuple[Overlong, float, int]] = [("drop", 0.05, 99), ("error", 0.05, 100), ("drop", 0.0, 100)]
    for overlong, share, percent in wanted:
        seq_len = choose_seq_len(counted, max_positions, overlong=overlong, max_dropped_share=share)
        if seq_len < max_positions:
            assert seq_len % 64 == 0
            assert holds(seq_len, percent)
            assert not holds(seq_len - 64, percent)
        else:
            assert seq_len == max_positions
            assert not holds((max_positions - 1) // 64 * 64, percent)


def test_one_long_document_in_a_hundred_counts_where_none_may_be_dropped() -> None:
    lengths = LengthCounts.of([np.array([10] * 99 + [200])])
    assert choose_seq_len(lengths, 4096, overlong="drop", max_dropped_share=0.01) == 64
    assert choose_seq_len(lengths, 4096, overlong="drop", max_dropped_share=0.009) == 256
    assert choose_seq_len(lengths, 4096, overlong="error", max_dropped_share=1.0) == 256


def test_seq_len_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no documents"):
        choose_seq_len(LengthCounts.of([]), 2048, overlong="drop", max_dropped_share=0.05)


# Where the first stop token is that is learned, in rows of ten tokens of which all are: two rows have none.
STOPS = (9, 4, -1, 8, -1)


@pytest.mark.parametrize(
    "overlong, seq_len, kept, stopping",
    [("drop", 10, 5, 3), ("truncate", 9, 5, 2), ("truncate", 4, 5, 0), ("split", 4, 5, 3), ("drop", 9, 0, 0)],
)
def test_rows_are_counted_of_which_a_stop_token_is_learned(
    overlong: Overlong, seq_len: int, kept: int, stopping: int
) -> None:
    """A row that is cut may lose it, a row that is split does not."""
    rows = [
        TokenizedRow(Row("a.jsonl", number, number + 1, ()), "", document(number, [True] * 10), 0, first_stop)
        for number, first_stop in enumerate(STOPS)
    ]
    store = store_of(rows)
    whole = select(store, all_rows(len(rows)), bos_token_id=None)
    data = fit_documents(whole, seq_len, overlong=overlong, max_dropped_share=None)
    assert (data.num_kept_rows, data.num_stopping_rows) == (kept, stopping)
