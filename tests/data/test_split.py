from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data import array_file, split
from qlora_trainer.data.array_file import CHUNK
from qlora_trainer.data.split import hold_out


@given(
    num_rows=st.integers(2, 300),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 2**70),
)
def test_both_sides_have_rows_and_every_row_has_one_side(num_rows: int, fraction: float, seed: int) -> None:
    train, held_out = (list(rows) for rows in hold_out(num_rows, fraction, seed))
    assert train
    assert sorted(train + held_out) == list(range(num_rows))
    assert len(held_out) == min(max(round(fraction * num_rows), 1), num_rows - 1)
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert [list(rows) for rows in hold_out(num_rows, fraction, seed)] == [train, held_out]


def test_the_split_is_the_same_for_ever_and_differs_by_seed() -> None:
    assert list(hold_out(20, 0.2, 0)[1]) == [9, 11, 15, 19]
    assert list(hold_out(20, 0.2, 1)[1]) == [7, 8, 12, 14]


@given(num_rows=st.integers(2, 400), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99), words=st.integers(1, 40))
def test_the_rows_with_the_smallest_draws_are_held_out(num_rows: int, fraction: float, seed: int, words: int) -> None:
    """As sorting all draws does it, in small chunks too, and where many rows draw the same.

    Mutation tried: `draws_N <= last_draw` holds out all rows that drew the last one.
    """
    drawn = np.random.default_rng(seed).choice(np.arange(words, dtype=np.uint64) << np.uint64(45), num_rows)
    wanted = np.sort(np.argsort(drawn, kind="stable")[: min(max(round(fraction * num_rows), 1), num_rows - 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_drawn", lambda num_rows, seed: np.array_split(drawn, 3))
        patch.setattr(array_file, "CHUNK", 32)
        train, held_out = hold_out(num_rows, fraction, seed)
        assert list(held_out) == wanted.tolist()
        assert sorted([*train, *held_out]) == list(range(num_rows))


def test_rows_beyond_a_chunk_draw_what_they_always_drew() -> None:
    """As the first version held them out, which sorted all draws at once."""
    num_rows = CHUNK + 3000
    draws = [hashlib.blake2b(f"5:{row}".encode(), digest_size=16).digest()[:8] for row in range(num_rows)]
    wanted = sorted(sorted(range(num_rows), key=lambda row: draws[row])[: round(0.05 * num_rows)])
    assert list(hold_out(num_rows, 0.05, 5)[1]) == wanted


def test_nothing_is_held_out_of_one_row_or_by_fraction_zero() -> None:
    for num_rows, fraction in ((3, 0), (1, 0.5)):
        train, held_out = hold_out(num_rows, fraction, 0)
        assert (list(train), list(held_out)) == (list(range(num_rows)), [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= fraction < 1"):
        hold_out(0, fraction, 0)
