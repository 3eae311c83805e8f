from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data import micro_batches
from qlora_trainer.data.micro_batches import cut, cut_documents, cut_padded
from qlora_trainer.errors import ConfigError
from qlora_trainer.step.document import Document

Cut = Callable[[Sequence[int], int], list[list[int]]]
LENGTHS = st.lists(st.integers(1, 64), max_size=80)


@pytest.mark.parametrize("cut_by", [cut, cut_padded])
@given(lengths=LENGTHS, extra_tokens=st.integers(0, 300))
def test_every_document_is_in_one_micro_batch_within_the_limit(
    cut_by: Cut, lengths: list[int], extra_tokens: int
) -> None:
    limit = max(lengths, default=8) + extra_tokens
    micro_batches = cut_by(lengths, limit)
    assert sorted(chain.from_iterable(micro_batches)) == list(range(len(lengths)))
    for micro_batch in micro_batches:
        chosen = [lengths[position] for position in micro_batch]
        assert (len(chosen) * max(chosen) if cut_by is cut_padded else sum(chosen)) <= limit
    assert cut_by(lengths, limit) == micro_batches
    if lengths:
        assert max(lengths) == max(lengths[position] for position in micro_batches[0])


@given(lengths=LENGTHS, extra_tokens=st.integers(0, 300))
def test_no_two_micro_batches_could_be_one(lengths: list[int], extra_tokens: int) -> None:
    limit = max(lengths, default=8) + extra_tokens
    sums = sorted(sum(lengths[position] for position in micro_batch) for micro_batch in cut(lengths, limit))
    assert all(first + second > limit for first, second in pairwise(sums))


def test_best_fit_fills_the_fullest() -> None:
    assert cut([5, 3, 7, 2, 6, 4, 1], 10) == [[1, 2], [4, 5], [0, 3, 6]]


def test_padding_counts() -> None:
    assert cut_padded([2, 9, 3, 8, 2, 2], 18) == [[1, 3], [2, 0, 4, 5]]
    assert cut_padded([2, 9, 3, 8, 2, 2], 17) == [[1], [3, 2], [0, 4, 5]]


def test_nothing_gives_nothing() -> None:
    assert cut([], 8) == cut_padded([], 8) == []


@pytest.mark.parametrize("cut_by", [cut, cut_padded])
def test_a_document_longer_than_a_micro_batch_is_refused(cut_by: Cut) -> None:
    with pytest.raises(ConfigError, match=r"memory\.micro_batch_tokens: found 16 tokens, and a document of 17"):
        cut_by([3, 17], 16)


@given(st.lists(st.integers(1, 20), max_size=30), st.booleans(), st.integers(1, 40))
def test_documents_are_cut_some_at_a_time(lengths: list[int], packing: bool, at_once: int) -> None:
    """Each once, as their lengths are cut, and no more of them than are known at once."""
    documents = stored_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batches, "_MOST_DOCUMENTS", at_once)
        found = list(cut_documents(documents, 24, packing=packing))
    windows = [lengths[first : first + at_once] for first in range(0, len(lengths), at_once)]
    cuts = [(cut if packing else cut_padded)(window, 24) for window in windows]
    wanted = [[at_once * number + index for index in part] for number, parts in enumerate(cuts) for part in parts]
    assert found == wanted
    assert sorted(position for part in found for position in part) == list(range(len(lengths)))


def stored_of(lengths: list[int]) -> list[Document]:
    return [
        Document(index=number, input_ids_T=np.zeros(length, np.int32), labels_T=np.zeros(length, np.int32))
        for number, length in enumerate(lengths)
    ]
