from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.length_counts import LengthCounts
from qlora_trainer.data.tokenized import PERCENTILES, length_percentiles

PARTS = st.lists(st.lists(st.integers(1, 60), max_size=80), max_size=5)


@given(PARTS, st.integers(0, 70))
def test_counts_say_of_lengths_what_the_lengths_do(parts: list[list[int]], limit: int) -> None:
    lengths_N = np.array([length for part in parts for length in part], dtype=np.int64)
    found = LengthCounts.of(np.array(part, dtype=np.int32) for part in parts)
    assert (found.num_documents, found.num_tokens) == (lengths_N.size, lengths_N.sum())
    assert (found.longest, found.num_longer_than(limit)) == (lengths_N.max(initial=0), (lengths_N > limit).sum())
    assert found.lengths_L.tolist() == sorted(set(lengths_N.tolist()))
    wanted = np.percentile(lengths_N, PERCENTILES, method="inverted_cdf").tolist() if lengths_N.size else [0] * 4
    assert list(length_percentiles(found)) == wanted


def test_no_documents_have_no_longest_share() -> None:
    with pytest.raises(ValueError, match="no documents"):
        LengthCounts.of([]).of_share(99)
