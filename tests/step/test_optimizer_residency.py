"""State comes back where the plan put it, in the dtypes of a fresh optimizer: told by a fake allocator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.step import optimizer as module
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings

Bits = Literal[8, 32]


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the paged allocator gave out; a fake one, so that no disk is needed."""
    given: list[Tensor] = []

    def zeros(num_elements: int, *, dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
        given.append(torch.zeros(num_elements, dtype=dtype, device=device))
        return given[-1]

    monkeypatch.setattr(module, "zeros_paged", zeros)
    return given


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., AdapterOptimizer]:
    def make_optimizer(bits: Bits, residency: Literal["device", "paged", "host"]) -> AdapterOptimizer:
        shapes = {"q.lora_A": (4, 96), "q.lora_B": (80, 4)}
        parameters = {
            name: nn.Parameter(torch.full(shape, 0.5, dtype=torch.bfloat16)) for name, shape in shapes.items()
        }
        for parameter in parameters.values():
            parameter.grad_dtype = torch.float32
        return AdapterOptimizer(parameters, OptimizerSettings(bits, residency, 0.0, tmp_path))

    return make_optimizer


def trained_state(optimizer: AdapterOptimizer) -> dict[str, Tensor]:
    """The state after two updates, on its own memory as a checkpoint's is."""
    for step in (1, 2):
        optimizer.gradient.copy_(torch.linspace(-1, 1, optimizer.gradient.numel()) * step)
        optimizer.update(1e-2)
    return {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}


def addresses(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


@pytest.mark.parametrize("saved_as", ["device", "paged"])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_loaded_state_lies_where_the_allocator_put_it(
    bits: Bits, saved_as: Literal["device", "paged"], allocated: list[Tensor], make: Callable[..., AdapterOptimizer]
) -> None:
    """Mutation tried: `load_state_dict` that puts the given tensors in place of its own fails here."""
    state = trained_state(make(bits, saved_as))
    allocated.clear()
    optimizer = make(bits, "paged")
    given = addresses(tuple(allocated))
    assert len(given) == (2 if bits == 8 else 1)  # master and two moments, stacked by dtype
    before = addresses(optimizer.state_tensors())
    optimizer.load_state_dict(state)
    assert addresses(optimizer.state_tensors()) == before
    assert list(dict.fromkeys(before[:3])) == given
    assert len(allocated) == len(given)  # loading asked for nothing more
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    optimizer.gradient.fill_(0.25)
    optimizer.update(1e-2)  # bitsandbytes still works on the same buffers
    assert addresses(optimizer.state_tensors()) == before


@pytest.mark.parametrize("residency", ["device", "paged"])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_loaded_state_has_the_dtypes_of_a_fresh_one(
    bits: Bits,
    residency: Literal["device", "paged"],
    allocated: list[Tensor],
    make: Callable[..., AdapterOptimizer],
) -> None:
    """Mutation tried: without the comparison of dtypes a state in bf16 is taken and rounded without a word."""
    state = trained_state(make(bits, residency))
    fresh, loaded = make(bits, residency), make(bits, residency)
    loaded.load_state_dict(state)
    dtypes = {name: tensor.dtype for name, tensor in fresh.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dtypes
    assert dtypes["q.lora_A.state1"] == (torch.uint8 if bits == 8 else torch.float32)
    for name in ("q.lora_A.master", "q.lora_B.state2"):
        other = torch.bfloat16 if dtypes[name] == torch.float32 else torch.int16
        with pytest.raises(ValueError, match=name):
            loaded.load_state_dict({**state, name: state[name].to(other)})
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())  # nothing was taken


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the parameters were on a GPU: the host's path, on memory that both are."""
    monkeypatch.setattr(module, "_is_host", lambda _device: False)
    monkeypatch.setattr(module, "CPU_PIECE_ELEMENTS", 256)  # parameters and pieces end in different places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 32])
def test_an_update_on_the_host_is_to_the_bit_that_of_a_cpu(bits: Bits, dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for residency in ("device", "host"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CPU_PIECE_ELEMENTS", 256)
            patch.setattr(module, "_is_host", lambda _device, residency=residency: residency == "device")
            shapes = {"q.lora_A": (4, 96), "q.lora_B": (80, 4), "q.lora_magnitude_vector": (80,)}
            parameters = {name: nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for name, shape in shapes.items()}
            for parameter in parameters.values():
                parameter.grad_dtype = torch.float32
            settings = OptimizerSettings(bits, residency, 0.01, tmp_path, rate_ratio=4.0)
            optimizer = AdapterOptimizer(parameters, settings)
            state = trained_state(optimizer)
            optimizer.gradient.fill_(0.5)
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            optimizer.update(1e-2, torch.tensor([float("nan")]))  # changes nothing
            optimizer.forget_update()
            assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
            found.append(state | {f"{name}.weight": parameter.detach() for name, parameter in parameters.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert any(not torch.equal(found[0][f"{name}.weight"], torch.full(shape, 0.5)) for name, shape in shapes.items())


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("bits", [8, 32])
def test_a_state_is_resumed_across_residencies(bits: Bits, make: Callable[..., AdapterOptimizer]) -> None:
    state = trained_state(make(bits, "device"))
    on_host = make(bits, "host")
    on_host.load_state_dict(state)
    for optimizer in (on_host, make(bits, "device")):
        optimizer.load_state_dict(state)
        optimizer.gradient.fill_(0.25)
        optimizer.update(1e-2)
        state_after = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
        assert all(torch.equal(tensor, state_after[name]) for name, tensor in on_host.state_dict().items())


@pytest.mark.usefixtures("apart")
def test_a_master_on_the_host_is_nobodys_weight(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.full((4, 96), 0.5))
    optimizer = AdapterOptimizer({"q.lora_A": parameter}, OptimizerSettings(32, "host", 0.0, tmp_path))
    owned = {tensor.untyped_storage().data_ptr() for tensor in optimizer.state_tensors()}
    assert parameter.data.untyped_storage().data_ptr() not in owned
    optimizer.gradient.fill_(1.0)
    optimizer.update(1e-2)
    assert torch.equal(parameter.detach(), optimizer.state_dict()["q.lora_A.master"])
