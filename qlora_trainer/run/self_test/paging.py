"""An optimizer's state is where the plan put it, before a save and after it was loaded into another optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qlora_trainer.config.paths import require_on_disk
from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.paging import is_paged
from qlora_trainer.run.checkpoint.load import load_checkpoint
from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.self_test.check import Check, attempted, judged
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings

_SHAPES = {"q_proj.lora_A": (16, 1024), "q_proj.lora_B": (1000, 16)}  # one that is not whole blocks of 256
_LEARNING_RATE = 1e-3


def paging_checks(device: torch.device, folder: Path) -> Iterator[Check]:
    """Both widths, resident and paged.

    Args:
        device: of the adapters.
        folder: that checkpoints go into, and on a CPU the files of paged state.
    """
    for bits in (32, 8):
        for residency in ("device", "paged"):
            name = f"optimizer state, {bits} bits, {'paged' if residency == 'paged' else 'resident'}"
            if residency == "paged" and device.type == "cpu" and (reason := _why_no_paging(folder)):
                yield Check(name, "not on this device", "no folder on a disk", "a folder on a disk", reason)
                continue
            own = folder / f"{residency}-{bits}"
            yield from attempted(
                name,
                lambda name=name, bits=bits, residency=residency, own=own: _saved_and_loaded(  # type: ignore[misc]
                    name, device, bits, residency, own
                ),
            )


def _why_no_paging(folder: Path) -> str:
    try:
        require_on_disk(folder)
    except StorageError as error:
        return str(error)
    return ""


def _saved_and_loaded(
    name: str, device: torch.device, bits: Literal[8, 32], residency: Literal["device", "paged"], folder: Path
) -> Check:
    folder.mkdir()
    settings = OptimizerSettings(bits=bits, residency=residency, weight_decay=0.01, paging_folder=folder)
    first, second = (AdapterOptimizer(_parameters(device), settings) for _ in range(2))
    for step in range(2):
        _update(first, step)
    before = _places(first)
    saved = save_checkpoint(
        folder,
        step=2,
        adapter={name: parameter.detach() for name, parameter in _parameters(device).items()},
        optimizer=first.state_dict(),
        state={"run_id": "self test", "samples_seen": 2, "best_step": None},
        fingerprints={},
        keep_checkpoints=2,
        is_best=False,
    )
    addresses = [tensor.data_ptr() for tensor in second.state_tensors()]
    second.load_state_dict(load_checkpoint(saved.path).optimizer)
    is_own = addresses == [tensor.data_ptr() for tensor in second.state_tensors()]
    after = _places(second)
    is_loaded = _are_equal(first, second)
    for optimizer in (first, second):
        _update(optimizer, 2)
    planned = "paged" if residency == "paged" else "resident"
    is_equal = is_loaded and _are_equal(first, second)
    buffers, state = ("own" if is_own else "other"), ("equal" if is_equal else "different")
    return judged(
        name,
        is_right=before == after == planned and is_own and is_equal,
        found=f"{before}, then {after}; {buffers} buffers, {state} state",
        expected=f"{planned}, then {planned}; own buffers, equal state",
    )


def _places(optimizer: AdapterOptimizer) -> str:
    """Where master and moments are; the scales of 8 bits are small and never paged."""
    found = {is_paged(tensor) for tensor in optimizer.state_tensors()[:3]}
    return "partly paged" if len(found) == 2 else "paged" if found == {True} else "resident"


def _are_equal(first: AdapterOptimizer, second: AdapterOptimizer) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def _parameters(device: torch.device) -> dict[str, nn.Parameter]:
    parameters = {}
    for number, (name, shape) in enumerate(_SHAPES.items()):
        parameters[name] = nn.Parameter(_normal(shape, number).to(device, torch.bfloat16))
        parameters[name].grad_dtype = torch.float32
    return parameters


def _update(optimizer: AdapterOptimizer, step: int) -> None:
    gradient = optimizer.gradient
    gradient.copy_(_normal(tuple(gradient.shape), 10 + step))
    optimizer.update(_LEARNING_RATE)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
