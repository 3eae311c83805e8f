"""The learning rate is what transformers' schedulers give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from qlora_trainer.step.schedule import Schedule, learning_rate

PEAK = 2e-4


def transformers_rates(schedule: Schedule, num_steps: int, warmup_ratio: float) -> list[float]:
    """The rate that each of `num_steps` optimizer steps is taken with."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    num_warmup_steps = math.ceil(num_steps * warmup_ratio)  # transformers' TrainingArguments.get_warmup_steps
    if schedule == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup_steps)
    elif schedule == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps, num_steps)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(schedule: Schedule, num_steps: int, warmup_ratio: float) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, peak=PEAK, schedule=schedule, warmup_ratio=warmup_ratio)
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@given(num_steps=st.integers(1, 60), warmup_ratio=st.floats(0.0, 1.0))
def test_every_step_has_the_rate_of_transformers(schedule: Schedule, num_steps: int, warmup_ratio: float) -> None:
    expected = transformers_rates(schedule, num_steps, warmup_ratio)

    assert our_rates(schedule, num_steps, warmup_ratio) == pytest.approx(expected, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_long_run_agrees_to_the_last_step(schedule: Schedule) -> None:
    expected = transformers_rates(schedule, 1000, 0.03)

    assert our_rates(schedule, 1000, 0.03) == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_warm_up_rises_from_zero_to_the_peak() -> None:
    rates = our_rates("cosine", 100, 0.1)

    assert rates[0] == 0.0
    assert rates[10] == PEAK == max(rates)
    assert rates[:11] == sorted(rates[:11])
    assert 0.0 < rates[99] < 0.001 * PEAK


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert our_rates("linear", 4, 0.0) == pytest.approx([PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.25 * PEAK])
