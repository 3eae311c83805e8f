"""AdamW on the flat master: the same numbers in pieces, from a checkpoint and in either residency, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_trainer.hardware.memory import OutOfMemoryError, memory_errors_as_ours
from qlora_trainer.step import optimizer as optimizer_module
from qlora_trainer.step.optimizer import BLOCK_ELEMENTS, CPU_PIECE_ELEMENTS, AdapterOptimizer
from tests.out_of_memory_at import OutOfMemoryAt
from tests.step.peak_memory import peak_growth_bytes
from tests.step.recorded import (
    SHAPES,
    copied_state,
    differing,
    make_parameters,
    make_settings,
    recorded_gradients,
    run_steps,
    same_bits,
)

RATE = 1e-3
EVERY_OPTIMIZER = pytest.mark.parametrize(
    "bits, residency", [(32, "device"), (32, "paged"), (8, "device"), (8, "paged")]
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def make_optimizer(
    folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[AdapterOptimizer, dict[str, nn.Parameter]]:
    parameters = make_parameters(dtype)
    return AdapterOptimizer(parameters, make_settings(paging_folder=folder, **changes)), parameters


def weights_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def gradients_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def test_backward_accumulates_into_one_flat_buffer(tmp_path: Path) -> None:
    optimizer, parameters = make_optimizer(tmp_path)
    addresses = {
        name: parameter.grad.data_ptr() for name, parameter in parameters.items() if parameter.grad is not None
    }

    for _ in range(2):
        torch.stack([parameter.float().square().sum() for parameter in parameters.values()]).sum().backward()

    for name, gradient in gradients_of(parameters).items():
        assert gradient.dtype == torch.float32
        assert gradient.data_ptr() == addresses[name]
        torch.testing.assert_close(gradient, 4 * parameters[name].detach().float(), rtol=2**-8, atol=0.0)
    assert optimizer.gradient.any()

    optimizer.zero_gradients()
    assert not any(bool(gradient.any()) for gradient in gradients_of(parameters).values())


def test_making_it_changes_no_weight(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        _, parameters = make_optimizer(tmp_path, dtype)
        assert differing(weights_of(parameters), weights_of(make_parameters(dtype))) == []


def test_an_fp32_adapter_is_its_own_master(tmp_path: Path) -> None:
    optimizer, parameters = make_optimizer(tmp_path, torch.float32)
    run_steps(optimizer, parameters, range(2), RATE)

    for name, parameter in parameters.items():
        assert parameter.data_ptr() == optimizer.state_dict()[f"{name}.master"].data_ptr()


@pytest.mark.parametrize("max_grad_norm", [None, 1e9, 0.01])
def test_clipping_is_torch_clipping(tmp_path: Path, max_grad_norm: float | None) -> None:
    optimizer, parameters = make_optimizer(tmp_path)
    plain = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    for parameter, other, gradient in zip(parameters.values(), plain, recorded_gradients(0).values(), strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(gradient)
        other.grad = gradient.clone()

    norm = optimizer.clip_gradients(max_grad_norm)

    expected = torch.nn.utils.clip_grad_norm_(plain, torch.inf if max_grad_norm is None else max_grad_norm)
    torch.testing.assert_close(norm, expected)
    for parameter, other in zip(parameters.values(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_clipping_no_gradient_at_all_gives_zero_not_nan(tmp_path: Path) -> None:
    optimizer, _ = make_optimizer(tmp_path)

    assert optimizer.clip_gradients(1.0) == 0.0
    assert not optimizer.gradient.any()


@EVERY_DTYPE
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_is_resident_bit_for_bit(disk_folder: Path, bits: int, dtype: torch.dtype) -> None:
    resident, resident_parameters = make_optimizer(disk_folder, dtype, bits=bits, weight_decay=0.1)
    paged, paged_parameters = make_optimizer(disk_folder, dtype, bits=bits, weight_decay=0.1, residency="paged")
    for optimizer, parameters in ((resident, resident_parameters), (paged, paged_parameters)):
        run_steps(optimizer, parameters, range(20), RATE)

    assert differing(paged.state_dict(), resident.state_dict()) == []
    assert differing(weights_of(paged_parameters), weights_of(resident_parameters)) == []
    assert paged.num_bytes == resident.num_bytes


@EVERY_DTYPE
@pytest.mark.parametrize("bits", [32, 8])
def test_an_update_that_fails_at_any_operation_is_done_by_a_second_call(
    tmp_path: Path, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations tried: without the copies a moment decays twice; without the count a piece is updated twice; with a
    count of steps that a failed try raises, the bias correction is that of a later step.
    """
    monkeypatch.setattr(optimizer_module, "CPU_PIECE_ELEMENTS", 4 * BLOCK_ELEMENTS)

    def before_the_second_update() -> tuple[AdapterOptimizer, dict[str, nn.Parameter]]:
        optimizer, parameters = make_optimizer(tmp_path, dtype, bits=bits, weight_decay=0.1)
        run_steps(optimizer, parameters, range(1), RATE)
        for name, gradient in recorded_gradients(1).items():
            gradients_of(parameters)[name].copy_(gradient)
        return optimizer, parameters

    whole, whole_parameters = before_the_second_update()
    with OutOfMemoryAt(-1) as counting:
        whole.update(RATE)
    run_steps(whole, whole_parameters, range(2, 3), RATE)
    assert counting.num_operations > 20  # in 19 pieces
    for k in range(counting.num_operations):
        optimizer, parameters = before_the_second_update()
        with pytest.raises(OutOfMemoryError), memory_errors_as_ours(), OutOfMemoryAt(k):
            optimizer.update(RATE)
        optimizer.update(RATE)
        run_steps(optimizer, parameters, range(2, 3), RATE)
        assert differing(optimizer.state_dict(), whole.state_dict()) == [], k
        assert differing(weights_of(parameters), weights_of(whole_parameters)) == [], k


def test_a_piece_that_is_half_updated_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes' kernel leaves it when memory runs out in its middle. Mutation tried: without the copies."""
    whole, whole_parameters = make_optimizer(tmp_path)
    run_steps(whole, whole_parameters, range(2), RATE)
    optimizer, parameters = make_optimizer(tmp_path)
    run_steps(optimizer, parameters, range(1), RATE)

    def failing() -> None:
        optimizer.state_tensors()[1].mul_(0.5)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._adamw, "step", failing)
        with pytest.raises(MemoryError):
            run_steps(optimizer, parameters, range(1, 2), RATE)
    optimizer.update(RATE)
    assert differing(optimizer.state_dict(), whole.state_dict()) == []


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    blocks_in_a_piece=st.integers(1, 8),
    bits=st.sampled_from([8, 32]),
)
def test_pieces_give_what_one_piece_gives(sizes: list[int], blocks_in_a_piece: int, bits: int) -> None:
    shapes = {f"p{index}": (size,) for index, size in enumerate(sizes)}
    states = []
    for piece_elements in (blocks_in_a_piece * BLOCK_ELEMENTS, 2**30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer_module, "CPU_PIECE_ELEMENTS", piece_elements)
            parameters = make_parameters(torch.bfloat16, shapes)
            optimizer = AdapterOptimizer(parameters, make_settings(bits=bits))
        run_steps(optimizer, parameters, range(3), RATE)
        states.append(copied_state(optimizer) | weights_of(parameters))

    assert differing(*states) == []


def test_pieces_are_whole_blocks_of_at_most_a_million_elements() -> None:
    assert CPU_PIECE_ELEMENTS <= 2**20
    assert CPU_PIECE_ELEMENTS % BLOCK_ELEMENTS == 0


@pytest.mark.parametrize("bits", [32, 8])
def test_an_update_needs_little_memory(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    peaks = {}
    for piece_elements in (CPU_PIECE_ELEMENTS, 2**30):
        monkeypatch.setattr(optimizer_module, "CPU_PIECE_ELEMENTS", piece_elements)
        parameter = nn.Parameter(torch.zeros(20_000_000, dtype=torch.bfloat16))
        parameter.grad_dtype = torch.float32
        optimizer = AdapterOptimizer({"weight": parameter}, make_settings(bits=bits))
        optimizer.gradient.fill_(1e-3)
        optimizer.update(RATE)  # touches the state itself
        peaks[piece_elements] = peak_growth_bytes(lambda: optimizer.update(RATE))  # noqa: B023  # called at once

    assert peaks[CPU_PIECE_ELEMENTS] < 40 * 2**20
    assert peaks[2**30] > 200 * 2**20  # what the pieces are for, and that this measurement sees it


@EVERY_DTYPE
@EVERY_OPTIMIZER
def test_a_loaded_state_goes_on_bit_for_bit(disk_folder: Path, bits: int, residency: str, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"bits": bits, "residency": residency}
    straight, straight_parameters = make_optimizer(disk_folder, dtype, **settings)
    run_steps(straight, straight_parameters, range(10), RATE)
    saved = copied_state(straight)
    resumed, resumed_parameters = make_optimizer(disk_folder, dtype, **settings)
    addresses = {name: tensor.data_ptr() for name, tensor in resumed.state_dict().items() if name != "step_count"}

    resumed.load_state_dict(saved)

    assert resumed.step_count == 10
    assert differing(resumed.state_dict(), saved) == []
    assert differing(weights_of(resumed_parameters), weights_of(straight_parameters)) == []
    for optimizer, parameters in ((straight, straight_parameters), (resumed, resumed_parameters)):
        run_steps(optimizer, parameters, range(10, 20), RATE)
    assert differing(resumed.state_dict(), straight.state_dict()) == []
    assert differing(weights_of(resumed_parameters), weights_of(straight_parameters)) == []
    state = resumed.state_dict()
    assert {name: state[name].data_ptr() for name in addresses} == addresses  # the buffers are still its own
    fresh = make_optimizer(disk_folder, dtype, **settings)[0].state_dict()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in fresh.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in state.items()
    }


@pytest.mark.parametrize("residency", ["device", "paged"])
def test_8_bit_blocks_that_a_parameter_does_not_fill_survive_a_save(disk_folder: Path, residency: str) -> None:
    """In 8 bits the byte for zero is not 0: padding that came back as 0 bytes would count in its block's scale."""

    def noise(optimizer: AdapterOptimizer, steps: range) -> None:
        for step in steps:  # gradients without a lasting direction: moments shrink, and padding would stand out
            generator = torch.Generator().manual_seed(step)
            optimizer.gradient[:10].copy_(1e-3 * torch.randn(10, generator=generator))
            optimizer.update(RATE)

    optimizers = []
    for _ in range(2):
        parameter = nn.Parameter(torch.zeros(10))
        optimizers.append(
            AdapterOptimizer(
                {"weight": parameter}, make_settings(bits=8, residency=residency, paging_folder=disk_folder)
            )
        )
    straight, resumed = optimizers
    noise(straight, range(5))
    resumed.load_state_dict(copied_state(straight))
    for optimizer in (straight, resumed):
        noise(optimizer, range(5, 40))

    assert differing(resumed.state_dict(), straight.state_dict()) == []


def change_dtype(state: dict[str, Tensor]) -> None:
    state["q.lora_A.state1"] = state["q.lora_A.state1"].to(torch.float64)


def change_shape(state: dict[str, Tensor]) -> None:
    state["q.lora_A.master"] = state["q.lora_A.master"].flatten()


def leave_out(state: dict[str, Tensor]) -> None:
    del state["q.lora_A.absmax2"]


def add_one(state: dict[str, Tensor]) -> None:
    state["q.lora_A.extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change, named",
    [
        (change_dtype, "q.lora_A.state1"),
        (change_shape, "q.lora_A.master"),
        (leave_out, "q.lora_A.absmax2"),
        (add_one, "q.lora_A.extra"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(tmp_path: Path, change: Any, named: str) -> None:
    optimizer, parameters = make_optimizer(tmp_path, bits=8)
    run_steps(optimizer, parameters, range(2), RATE)
    state, weights = copied_state(optimizer), weights_of(parameters)
    other, other_parameters = make_optimizer(tmp_path, bits=8)
    run_steps(other, other_parameters, range(5), RATE)
    wrong = copied_state(other)
    change(wrong)

    with pytest.raises(ValueError, match=f"1 tensors differ .* {named}"):
        optimizer.load_state_dict(wrong)

    assert differing(optimizer.state_dict(), state) == []
    assert differing(weights_of(parameters), weights) == []


@pytest.mark.parametrize("bits", [32, 8])
def test_the_state_of_other_bits_is_refused(tmp_path: Path, bits: int) -> None:
    other = make_optimizer(tmp_path, bits=40 - bits)[0].state_dict()

    with pytest.raises(ValueError, match="tensors differ"):
        make_optimizer(tmp_path, bits=bits)[0].load_state_dict(other)


@pytest.mark.parametrize("bits, expected", [(32, 12.0), (8, 6.0 + 2 * 4 / 256)])
def test_bytes_are_counted(tmp_path: Path, bits: int, expected: float) -> None:
    optimizer, _ = make_optimizer(tmp_path, bits=bits)
    num_elements = optimizer.gradient.numel()

    assert num_elements % BLOCK_ELEMENTS == 0
    assert optimizer.num_bytes == {"gradient": 4 * num_elements, "optimizer": int(expected * num_elements)}


def test_state_is_named_by_parameter(tmp_path: Path) -> None:
    optimizer, parameters = make_optimizer(tmp_path, bits=8)
    state = optimizer.state_dict()

    expected = {f"{name}.{key}" for name in SHAPES for key in ("master", "state1", "state2", "absmax1", "absmax2")}
    assert state.keys() == expected | {"step_count"}
    for name, parameter in parameters.items():
        assert same_bits(state[f"{name}.master"], parameter.detach().float())


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_on_a_gpu_paged_is_resident_bit_for_bit(tmp_path: Path, bits: int) -> None:
    gpu, states = torch.device("cuda", 0), []
    for residency in ("device", "paged"):
        parameters = {}
        for name, parameter in make_parameters(torch.bfloat16).items():
            parameters[name] = nn.Parameter(parameter.data.to(gpu))
            parameters[name].grad_dtype = torch.float32
        optimizer = AdapterOptimizer(parameters, make_settings(bits=bits, residency=residency, paging_folder=tmp_path))
        run_steps(optimizer, parameters, range(5), RATE)
        optimizer.load_state_dict(copied_state(optimizer))
        run_steps(optimizer, parameters, range(5, 10), RATE)
        states.append(copied_state(optimizer) | weights_of(parameters))

    assert differing(states[1], states[0]) == []


@EVERY_OPTIMIZER
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_leaves_everything_to_the_bit(
    bits: int, residency: str, bad: float, disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several pieces, by the flag on the device alone; the next update is what it had been without it.

    Fails where the moments are updated with gradients of zero, which is no update of the weights only at first sight.
    """
    monkeypatch.setattr(optimizer_module, "CPU_PIECE_ELEMENTS", 4 * BLOCK_ELEMENTS)
    optimizer, parameters = make_optimizer(disk_folder, bits=bits, residency=residency)
    other, other_parameters = make_optimizer(disk_folder, bits=bits, residency=residency)
    for own, its_parameters in ((optimizer, parameters), (other, other_parameters)):
        run_steps(own, its_parameters, range(3), RATE)
    saved, weights = copied_state(optimizer), weights_of(parameters)

    optimizer.gradient[::7] = bad
    norm = optimizer.clip_gradients(1.0)
    optimizer.update(RATE, norm)
    optimizer.forget_update()

    assert len(optimizer.gradient) > 4 * BLOCK_ELEMENTS
    assert differing(optimizer.state_dict(), saved) == []
    assert differing(weights_of(parameters), weights) == []
    run_steps(optimizer, parameters, range(3, 5), RATE)
    run_steps(other, other_parameters, range(3, 5), RATE)
    assert differing(optimizer.state_dict(), other.state_dict()) == []


@EVERY_OPTIMIZER
def test_a_finite_update_is_the_same_with_the_flag(bits: int, residency: str, disk_folder: Path) -> None:
    flagged, parameters = make_optimizer(disk_folder, bits=bits, residency=residency)
    plain, plain_parameters = make_optimizer(disk_folder, bits=bits, residency=residency)
    for own, its_parameters in ((flagged, parameters), (plain, plain_parameters)):
        run_steps(own, its_parameters, range(2), RATE)
    before = copied_state(plain)

    flagged.update(RATE, torch.tensor([2.5, 0.0]))
    plain.update(RATE)

    assert differing(flagged.state_dict(), plain.state_dict()) == []
    assert len(differing(plain.state_dict(), before)) > 3
