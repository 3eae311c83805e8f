"""What the optimizer of a run is, and what its phases need: an update, a save, a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qlora_trainer.planning.inside import bytes_of, inside_bytes
from qlora_trainer.planning.timeline import Level, on_a_line, read_levels
from qlora_trainer.planning.tracker import StorageTracker
from qlora_trainer.step.optimizer import CPU_PIECE_ELEMENTS, GPU_PIECE_ELEMENTS, AdapterOptimizer, OptimizerSettings
from qlora_trainer.step.state import first_non_finite

# An update goes piece by piece, and pieces are alike: of many, two numbers of them are traced and the rest is a line.
# No temporary of a piece is as large as what some of them keep, so that the phases peak where they will with more.
FEW_PIECES, SOME_PIECES = 8, 12


@dataclass(frozen=True, slots=True)
class StateTrace:
    """What the optimizer is and needs, in bytes on the device.

    Attributes:
        gradient, optimizer: sizes of what stays: the flat gradient; master, moments and their scales.
        pageable_bytes: of `optimizer`, what a paged optimizer keeps in managed memory or in a file.
        levels: phase ("optimizer", "save", "resume") -> the most above that.
        host_bytes: of the state that is on the host, and then nothing of it on the device.
    """

    gradient: tuple[int, ...]
    optimizer: tuple[int, ...]
    pageable_bytes: int
    levels: Mapping[str, Level]
    host_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StateForm:
    """What the bytes of an optimizer depend on, beside how much it trains.

    Attributes:
        bits: of a moment.
        adapter_dtype: of what it updates.
        device: where that is.
        alignment_bytes: of the device's allocator.
        is_on_host: whether master and moments are on the host.
    """

    bits: Literal[8, 32]
    adapter_dtype: torch.dtype
    device: torch.device
    alignment_bytes: int
    is_on_host: bool = False

    @property
    def piece_elements(self) -> int:
        """That are updated at once."""
        return CPU_PIECE_ELEMENTS if self.is_on_host or self.device.type == "cpu" else GPU_PIECE_ELEMENTS


def trace_state(num_flat_elements: int, form: StateForm) -> StateTrace:
    """Update, hand out and take back the state of an optimizer over that many elements.

    All adapters together are one parameter here: the optimizer's buffers are flat in any case.
    """
    num_pieces, rest = divmod(num_flat_elements, form.piece_elements)
    if num_pieces <= SOME_PIECES:
        return trace_whole_state(num_flat_elements, form)
    few, some = (trace_whole_state(number * form.piece_elements + rest, form) for number in (FEW_PIECES, SOME_PIECES))
    return _further(few, some, num_pieces)


def trace_whole_state(num_flat_elements: int, form: StateForm) -> StateTrace:
    """The same, every piece of it traced, of which a 70B at rank 128 has fifteen hundred."""
    device, alignment_bytes = form.device, form.alignment_bytes
    tracker = StorageTracker(device_type=device.type, alignment_bytes=alignment_bytes, inside=inside_bytes)
    residency: Literal["device", "host"] = "host" if form.is_on_host else "device"
    settings = OptimizerSettings(bits=form.bits, residency=residency, weight_decay=0.0, paging_folder=Path())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        parameter = nn.Parameter(torch.empty(num_flat_elements, dtype=form.adapter_dtype, device=device))
        parameter.grad_dtype = torch.float32
        optimizer = AdapterOptimizer({"adapters": parameter}, settings)
        with tracker:
            tracker.mark("optimizer")
            optimizer.zero_gradients()
            norm = optimizer.clip_gradients(1.0)
            optimizer.update(1e-4, norm)
            del norm
            tracker.mark("save")
            first_non_finite(optimizer.state_dict())
            tracker.mark("resume")
            # Both files are mapped on the host, which on a CPU is the device itself.
            saved_adapter = torch.empty_like(parameter, device="cpu")
            saved = {name: torch.empty_like(value, device="cpu") for name, value in optimizer.state_dict().items()}
            optimizer.load_state_dict(saved)
            del saved, saved_adapter
        flats = optimizer.state_tensors()
    return StateTrace(
        gradient=(optimizer.gradient.nbytes,),
        optimizer=tuple(flat.nbytes for flat in flats if flat.device.type == device.type),
        pageable_bytes=sum(flat.nbytes for flat in flats if flat.numel() == num_flat_elements),
        host_bytes=sum(flat.nbytes for flat in flats if flat.device.type != device.type),
        levels={str(level.label): level for level in read_levels(tracker, alignment_bytes, bytes_of)},
    )


def _further(few: StateTrace, some: StateTrace, num_pieces: int) -> StateTrace:
    """On the line through two traces."""

    def at(low: int, high: int) -> int:
        return on_a_line((FEW_PIECES, low), (SOME_PIECES, high), num_pieces)

    def all_at(low: tuple[int, ...], high: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(at, low, high))

    levels = {}
    for phase, high in some.levels.items():
        at_peak = {name: at(few.levels[phase].at_peak[name], value) for name, value in high.at_peak.items()}
        levels[phase] = Level(high.label, at(few.levels[phase].peak_bytes, high.peak_bytes), at_peak)
    return StateTrace(
        gradient=all_at(few.gradient, some.gradient),
        optimizer=all_at(few.optimizer, some.optimizer),
        pageable_bytes=at(few.pageable_bytes, some.pageable_bytes),
        levels=levels,
        host_bytes=at(few.host_bytes, some.host_bytes),
    )
