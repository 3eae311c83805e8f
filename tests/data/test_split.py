from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.rows import Row
from qlora_trainer.data.split import hold_out


@given(
    num_rows=st.integers(2, 300),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 2**70),
)
def test_both_sides_have_rows_and_every_row_has_one_side(
    make_row: Callable[..., Row], num_rows: int, fraction: float, seed: int
) -> None:
    rows = [make_row(("user", "Hi"), ("assistant", "Hello"), index=index) for index in range(num_rows)]
    train, held_out = hold_out(rows, fraction, seed)
    assert train
    assert held_out
    assert sorted(row.index for row in train + held_out) == list(range(num_rows))
    assert len(held_out) == min(max(round(fraction * num_rows), 1), num_rows - 1)
    for side in (train, held_out):
        assert [row.index for row in side] == sorted(row.index for row in side)
    assert hold_out(rows, fraction, seed) == (train, held_out)


def test_the_split_is_the_same_for_ever_and_differs_by_seed(make_row: Callable[..., Row]) -> None:
    rows = [make_row(index=index) for index in range(20)]
    assert [row.index for row in hold_out(rows, 0.2, 0)[1]] == [9, 11, 15, 19]
    assert [row.index for row in hold_out(rows, 0.2, 1)[1]] == [7, 8, 12, 14]


def test_nothing_is_held_out_of_one_row_or_by_fraction_zero(make_row: Callable[..., Row]) -> None:
    rows = [make_row(index=index) for index in range(3)]
    assert hold_out(rows, 0, 0) == (rows, [])
    assert hold_out(rows[:1], 0.5, 0) == (rows[:1], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= fraction < 1"):
        hold_out([], fraction, 0)
