"""Infinities and NaNs are found before they are saved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_trainer.step.state import first_non_finite
from tests.hardware.profiled_memory import allocated_by

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 7, 8, 19, 20])
def test_one_wrong_value_is_found_wherever_it_is(value: float, dtype: torch.dtype, place: int) -> None:
    tensors = {"good": torch.ones(3, 7, dtype=dtype), "bad": torch.ones(3, 7, dtype=dtype), "late": torch.ones(1)}
    assert first_non_finite(tensors) is None
    tensors["bad"].view(-1)[place] = value
    assert first_non_finite(tensors) == "bad"


@given(
    st.lists(st.sampled_from([0.0, 1.0, -3.0e38, *BAD]), max_size=4), st.lists(st.booleans(), min_size=4, max_size=4)
)
def test_the_first_of_several_is_named(values: list[float], is_integer: list[bool]) -> None:
    tensors = {
        str(index): torch.tensor([0.0, value]) if math.isfinite(value) or not is_integer[index] else torch.tensor([1])
        for index, value in enumerate(values)
    }
    wrong = [name for name, tensor in tensors.items() if not all(map(math.isfinite, tensor.tolist()))]
    assert first_non_finite(tensors) == (wrong[0] if wrong else None)


def test_integers_pass() -> None:
    tensors = {
        "step_count": torch.tensor(2**62),
        "state1": torch.full((300,), 255, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "empty": torch.empty(0),
        "scalar": torch.tensor(0.5),
    }
    assert first_non_finite(tensors) is None
    assert first_non_finite({}) is None


def test_views_and_parameters_are_looked_at_as_they_are() -> None:
    table = torch.ones(6, 6)
    table[0, 5] = math.nan
    assert first_non_finite({"column": table[:, 0], "turned": table.t()[:5]}) is None
    assert first_non_finite({"turned": table.t()}) == "turned"
    assert first_non_finite({"weight": torch.nn.Parameter(torch.tensor([math.inf]))}) == "weight"


def test_looking_takes_no_memory() -> None:
    """Mutation tried: `isfinite`, which takes a byte for each element; the plan would have to count it."""
    tensor = torch.ones(2**20)
    assert allocated_by(lambda: first_non_finite({"all": tensor})).peak_bytes < 2**12


def test_fake_tensors_have_no_values_to_look_at() -> None:
    with FakeTensorMode():
        assert first_non_finite({"a": torch.full((4,), math.nan), "b": torch.empty(3, dtype=torch.int64)}) is None
