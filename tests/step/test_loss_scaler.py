"""The scale of the loss goes as `torch.amp.GradScaler`'s does, and gradients that fp16 alone would lose survive."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.step import loss_scaler
from qlora_trainer.step.loss import chunked_cross_entropy
from qlora_trainer.step.loss_scaler import GROWTH_INTERVAL, INITIAL_SCALE, LossScaler

CPU = torch.device("cpu")
SHORT_INTERVAL = 3
BAD_NUMBERS = {"infinity": math.inf, "-infinity": -math.inf, "nan": math.nan}


def found(number: float) -> Tensor:
    """Loss and gradient norm of a step."""
    return torch.tensor([1.5, number])


def grad_scaler_scales(steps: list[bool], **options: Any) -> list[float]:
    """What torch's own scaler makes of steps that are good or overflow: the scale after each."""
    scaler = torch.amp.GradScaler("cpu", **options)
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter])
    scales = []
    for is_good in steps:
        scaler.scale(torch.zeros(1))  # its state is made when it is first used
        parameter.grad = torch.full((3,), 1.0 if is_good else math.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@given(st.lists(st.booleans(), max_size=24))
@example([True] * SHORT_INTERVAL + [False] + [True] * SHORT_INTERVAL)
def test_the_scale_goes_as_that_of_grad_scaler(steps: list[bool]) -> None:
    """Mutation tried: good steps still counted after an overflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scaler, "GROWTH_INTERVAL", SHORT_INTERVAL)
        scaler, scales = LossScaler(CPU), []
        for is_good in steps:
            scaler.update(found(1.0 if is_good else math.inf))
            scales.append(float(scaler.scale))
    assert scales == grad_scaler_scales(steps, growth_interval=SHORT_INTERVAL)


def test_its_numbers_are_the_defaults_of_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (INITIAL_SCALE, GROWTH_INTERVAL)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2.0, 0.5)


def test_it_does_not_grow_beyond_what_fp32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaler, "GROWTH_INTERVAL", 1)
    scaler, largest = LossScaler(CPU), 2.0**127
    scaler.load_state_dict({"scale": largest, "num_good_steps": 0})
    scaler.update(found(1.0))
    assert float(scaler.scale) == largest == grad_scaler_scales([True], init_scale=largest, growth_interval=1)[0]


@pytest.mark.parametrize("number", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
@pytest.mark.parametrize("place", [0, 1])
def test_either_number_halves_it(number: float, place: int) -> None:
    scaler, numbers = LossScaler(CPU), torch.ones(2)
    numbers[place] = number
    scaler.update(numbers)
    assert scaler.state_dict() == {"scale": INITIAL_SCALE / 2, "num_good_steps": 0}


@given(st.lists(st.booleans(), max_size=8), st.lists(st.booleans(), max_size=8))
def test_what_is_saved_goes_on_the_same(before: list[bool], after: list[bool]) -> None:
    scaler = LossScaler(CPU)
    for is_good in before:
        scaler.update(found(1.0 if is_good else math.nan))
    resumed = LossScaler(CPU)
    resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    for is_good in after:
        for one in (scaler, resumed):
            one.update(found(1.0 if is_good else math.nan))
    assert resumed.state_dict() == scaler.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"scale": 0.0, "num_good_steps": 0},
        {"scale": math.nan, "num_good_steps": 0},
        {"scale": "65536", "num_good_steps": 0},
        {"scale": 2.0, "num_good_steps": -1},
        {"scale": 2.0, "num_good_steps": GROWTH_INTERVAL},
        {"scale": 2.0, "num_good_steps": True},
    ],
)
def test_what_is_no_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"scale|num_good_steps"):
        LossScaler(CPU).load_state_dict(state)


def test_gradients_that_fp16_alone_loses_survive() -> None:
    """Of a large vocabulary most gradients are below what fp16 holds. Mutation tried: the scale put on the result."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(4096, 16, generator=generator) / 64
    hidden_NH = torch.randn(8, 16, generator=generator)
    targets_N = torch.arange(8)

    def gradient(dtype: torch.dtype, scale: Tensor | None) -> Tensor:
        own_NH = hidden_NH.half().to(dtype).requires_grad_()
        head = FrozenHead(weight_VH.half().to(dtype), None)
        loss = chunked_cross_entropy(
            own_NH, targets_N, head, LogitShape(2e-4, 0.0), chunk_tokens=3, gradient_scale=scale
        )
        loss.backward()
        assert own_NH.grad is not None
        return own_NH.grad.double()

    exact = gradient(torch.float32, None)
    scaler = LossScaler(CPU)
    scaled = gradient(torch.float16, scaler.scale)
    scaler.unscale_(scaled)

    def error(grad_NH: Tensor) -> float:
        return float((grad_NH - exact).norm() / exact.norm())

    assert error(scaled) < 1e-3
    assert error(gradient(torch.float16, None)) > 5e-3


def test_a_scale_is_taken_out_exactly() -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scaled = gradient * INITIAL_SCALE
    LossScaler(CPU).unscale_(scaled)
    assert torch.equal(scaled, gradient)
