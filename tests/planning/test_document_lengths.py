from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.planning.document_lengths import DocumentLengths


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 80))
def test_counted_lengths_say_what_the_lengths_do(lengths: list[int], size: int) -> None:
    lengths_N = np.array(lengths)
    lengths_L, counts_L = np.unique(lengths_N, return_counts=True)
    found = DocumentLengths.of(lengths_L, counts_L, seq_len=64, global_batch_size=size)
    assert found == DocumentLengths.of(lengths, seq_len=64, global_batch_size=size)
    assert (found.mean_tokens, found.shortest_tokens) == (lengths_N.mean(), lengths_N.min())
    assert found.std_tokens == pytest.approx(lengths_N.std(), abs=1e-12)
    num_missing = max(size - lengths_N.size, 0)
    assert found.largest_batch_tokens == sum(sorted(lengths)[-size:]) + num_missing * max(lengths)
