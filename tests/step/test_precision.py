"""bf16 adapters learn like fp32 ones: 200 steps of AdamW at learning rate 1e-5, from identical recorded gradients."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.hardware.quant_library import bitsandbytes
from qlora_trainer.step.optimizer import AdapterOptimizer
from tests.step.recorded import differing, make_parameters, make_settings, recorded_gradients, run_steps

NUM_STEPS = 200
LEARNING_RATE = 1e-5
# Matrices that bitsandbytes stores in 8 bits when they come one by one: at least 4,096 elements, whole blocks.
WHOLE_BLOCKS = {"up.lora_A": (16, 512), "up.lora_B": (512, 16)}
BF16_HALF_STEP = 2.0**-9  # of a weight of size 1: smaller updates round away


def train_outside(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """200 steps of somebody else's optimizer on `parameters`, with gradients in the parameters' own dtype."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for step in range(NUM_STEPS):
        for name, gradient in recorded_gradients(step, shapes).items():
            parameters[name].grad = gradient.to(parameters[name].dtype)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def plain_parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.data.to(dtype)) for name, value in make_parameters(torch.bfloat16).items()}


@pytest.fixture(scope="module")
def fp32_weights() -> dict[str, Tensor]:
    """What bitsandbytes' AdamW makes of plain fp32 parameters."""
    parameters = plain_parameters(torch.float32)
    adamw = bitsandbytes.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE, weight_decay=0.0)
    return train_outside(adamw, parameters)


@pytest.fixture(scope="module")
def ours() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our bf16 weights, and our fp32 master of them."""
    parameters = make_parameters(torch.bfloat16)
    optimizer = AdapterOptimizer(parameters, make_settings())
    run_steps(optimizer, parameters, range(NUM_STEPS), LEARNING_RATE)
    master = {name: optimizer.state_dict()[f"{name}.master"] for name in parameters}
    return {name: parameter.detach() for name, parameter in parameters.items()}, master


def rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.bfloat16() for name, weight in weights.items()}


def test_bf16_weights_are_the_rounded_fp32_weights(
    ours: tuple[dict[str, Tensor], dict[str, Tensor]], fp32_weights: dict[str, Tensor]
) -> None:
    weights, master = ours

    assert differing(weights, rounded(fp32_weights)) == []
    assert differing(master, fp32_weights) == []


def test_single_updates_would_round_away_and_their_sum_does_not(fp32_weights: dict[str, Tensor]) -> None:
    for name, start in make_parameters(torch.bfloat16).items():
        large = start.abs() > 4 * LEARNING_RATE / BF16_HALF_STEP
        assert large.float().mean() > 0.5  # for most weights a step of 1e-5 is under a quarter of what bf16 can show
        assert (fp32_weights[name].bfloat16() != start)[large].float().mean() > 0.9


@pytest.mark.parametrize("library", ["bitsandbytes", "torch"])
def test_adamw_on_bf16_weights_alone_fails_the_same_check(library: str, fp32_weights: dict[str, Tensor]) -> None:
    parameters = plain_parameters(torch.bfloat16)
    adamw_class = bitsandbytes.optim.AdamW if library == "bitsandbytes" else torch.optim.AdamW
    adamw = adamw_class(list(parameters.values()), lr=LEARNING_RATE, weight_decay=0.0)

    naive = train_outside(adamw, parameters)

    assert differing(naive, rounded(fp32_weights)) == sorted(fp32_weights)
    for name, weight in naive.items():
        assert (weight != fp32_weights[name].bfloat16()).float().mean() > 0.5


def test_torch_adamw_agrees(ours: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    parameters = plain_parameters(torch.float32)
    adamw = torch.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE, weight_decay=0.0)

    expected = train_outside(adamw, parameters)

    for name, master in ours[1].items():
        # The two write the update in another order; each of 200 sums rounds by half a unit in the last place at most.
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(master, expected[name], rtol=0.0, atol=4 * 2**-23 * largest)


def test_8_bit_is_bitsandbytes_8_bit_adamw() -> None:
    parameters = make_parameters(torch.bfloat16, WHOLE_BLOCKS)
    optimizer = AdapterOptimizer(parameters, make_settings(bits=8, weight_decay=0.1))
    theirs = {name: nn.Parameter(parameter.data.float()) for name, parameter in parameters.items()}
    run_steps(optimizer, parameters, range(NUM_STEPS), LEARNING_RATE)

    adamw = bitsandbytes.optim.AdamW8bit(list(theirs.values()), lr=LEARNING_RATE, weight_decay=0.1)
    expected = train_outside(adamw, theirs)

    assert differing({name: parameter.detach() for name, parameter in parameters.items()}, rounded(expected)) == []
    state = optimizer.state_dict()
    for name, parameter in theirs.items():
        for key in ("state1", "state2", "absmax1", "absmax2"):
            assert torch.equal(state[f"{name}.{key}"], adamw.state[parameter][key].reshape(-1)), f"{name}.{key}"
