from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data import distinct
from qlora_trainer.data.distinct import count_distinct

VALUES = st.integers(0, 20) | st.integers(0, 2**64 - 1)


@given(st.lists(st.lists(VALUES, max_size=40), max_size=6), st.integers(1, 40), st.integers(1, 8))
def test_equal_values_are_counted_once_whatever_file_they_are_in(
    parts: list[list[int]], values_a_file: int, most_files: int
) -> None:
    num_values = sum(map(len, parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "_VALUES_A_FILE", values_a_file)
        patch.setattr(distinct, "_MOST_FILES", most_files)
        found = count_distinct((np.array(part, dtype=np.uint64) for part in parts), num_values)
    assert found == len({value for part in parts for value in part})


def test_many_values_are_dealt_to_files_of_their_own() -> None:
    values_N = np.random.default_rng(0).integers(0, 2**64, 400_000, dtype=np.uint64)
    values_N[300_000:] = values_N[:100_000]
    assert count_distinct(np.array_split(values_N, 50), values_N.size) == np.unique(values_N).size == 300_000
