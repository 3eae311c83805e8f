from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.split import hold_out


@given(
    num_rows=st.integers(2, 300),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 2**70),
)
def test_both_sides_have_rows_and_every_row_has_one_side(num_rows: int, fraction: float, seed: int) -> None:
    train, held_out = (rows.tolist() for rows in hold_out(num_rows, fraction, seed))
    assert train
    assert sorted(train + held_out) == list(range(num_rows))
    assert len(held_out) == min(max(round(fraction * num_rows), 1), num_rows - 1)
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert [rows.tolist() for rows in hold_out(num_rows, fraction, seed)] == [train, held_out]


def test_the_split_is_the_same_for_ever_and_differs_by_seed() -> None:
    assert hold_out(20, 0.2, 0)[1].tolist() == [9, 11, 15, 19]
    assert hold_out(20, 0.2, 1)[1].tolist() == [7, 8, 12, 14]


def test_nothing_is_held_out_of_one_row_or_by_fraction_zero() -> None:
    for num_rows, fraction in ((3, 0), (1, 0.5)):
        train, held_out = hold_out(num_rows, fraction, 0)
        assert (train.tolist(), held_out.tolist()) == (list(range(num_rows)), [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= fraction < 1"):
        hold_out(0, fraction, 0)
