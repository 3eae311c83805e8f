"""AdamW on one flat fp32 master copy of all adapter weights; the model's bf16 weights are rounded from it.

An AdamW step of 1e-4 on a bf16 weight rounds away, so the truth is fp32 and lives here, with the moments, each as one
flat buffer. Every parameter is padded to 256 elements, bitsandbytes' 8-bit block, so that no block spans two
parameters and state can be saved and loaded by parameter name. The update itself is bitsandbytes' AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.paging import zeros_paged
from qlora_trainer.hardware.quant_library import dynamic_map, make_adamw
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model.adapters import MAGNITUDE

BLOCK_ELEMENTS = 256  # bitsandbytes' 8-bit optimizer block
# bitsandbytes' CPU update makes five fp32 temporaries of its argument's size; pieces bound them to 20 MiB. The CUDA
# kernel makes none, but a piece's state is copied before: 96 MiB in 32 bits, while no activations are there.
CPU_PIECE_ELEMENTS, GPU_PIECE_ELEMENTS = 2**20, 2**23
# What an update writes, stacked by dtype: a value an element, and a value a block.
_ROWS: dict[int, tuple[tuple[tuple[str, ...], torch.dtype], ...]] = {
    32: ((("master", "state1", "state2"), torch.float32),),
    8: ((("master",), torch.float32), (("state1", "state2"), torch.uint8)),
}
_SCALE_ROWS: dict[int, tuple[tuple[tuple[str, ...], torch.dtype], ...]] = {
    32: (),
    8: ((("absmax1", "absmax2"), torch.float32),),
}


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What the optimizer is.

    Attributes:
        bits: width of the two moments, 32 or 8.
        residency: where master and moments live: with the model, in memory that can be paged out, or on the host, where
            they are updated, too: gradients go there in pieces, and rounded weights come back.
        weight_decay: decoupled (Loshchilov & Hutter, 2019). Of trained biases and norms none, as in PEFT and
            transformers: it would pull them to 0, and what the base was trained with is not there.
        paging_folder: where the files of paged state lie on a CPU.
        rate_ratio: learning rate of the B matrices over that of A (LoRA+, Hayou et al., 2024); of DoRA's magnitudes
            and of trained biases (a head's, too) and norms as well, as in PEFT.
    """

    bits: Literal[8, 32]
    residency: Literal["device", "paged", "host"]
    weight_decay: float
    paging_folder: Path
    rate_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the flat buffers that is updated at once.

    Attributes:
        parameter: a view of the master; bitsandbytes leaves a parameter alone whose `.grad` is None.
        elements: where it is in the flat buffers.
        gradient: its gradient, on the model's device.
        state: all that an update writes: its columns of the stacks.
        rate_ratio: its learning rate over that of the step.
        weight_decay: its own.
    """

    parameter: nn.Parameter
    elements: slice
    gradient: Tensor
    state: tuple[Tensor, ...]
    rate_ratio: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter lies in the flat buffers."""

    first: int
    num_elements: int
    shape: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.first : self.first + self.num_elements].view(self.shape)

    def padded(self, flat: Tensor) -> Tensor:
        """With the padding: in 8 bits the byte that means zero is not 0, so a moment's padding is state too."""
        return flat[self.first : _padded(self.first + self.num_elements)]

    def blocks(self, flat_absmax: Tensor) -> Tensor:
        first = self.first // BLOCK_ELEMENTS
        return flat_absmax[first : first + math.ceil(self.num_elements / BLOCK_ELEMENTS)]


class AdapterOptimizer:
    """Owns gradients, master weights and moments of all adapter parameters.

    Making one points every parameter's `.grad` into a flat fp32 buffer, in which backward accumulates.

    Args:
        parameters: name -> parameter; the names are those of the saved state.
        settings: see `OptimizerSettings`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings) -> None:
        self.settings = settings
        self.step_count = 0
        self._parameters = dict(parameters)
        # What has its own rate or no decay lies behind all else: a piece then has one of each, and pieces stay large.
        self._places = _lay_out(self._parameters, settings)
        self._device = next(iter(self._parameters.values())).device
        is_on_host = settings.residency == "host" and not _is_host(self._device)
        self._host = SideStream(self._device) if is_on_host else None
        last = list(self._places.values())[-1]
        num_elements = _padded(last.first + last.num_elements)
        # Rows of one dtype lie in one stack, so that a piece of all of them is copied by one kernel.
        self._stacks = tuple(self._zeros(names, num_elements, dtype) for names, dtype in _ROWS[settings.bits])
        self._moments = _by_name(_ROWS[settings.bits], self._stacks)
        self._master = self._moments.pop("master")
        for name, parameter in self._parameters.items():
            place = self._places[name]
            place.view(self._master).copy_(parameter.data)
            if parameter.dtype == torch.float32 and self._host is None:
                parameter.data = place.view(self._master)  # an fp32 adapter is its own master
        # Only now: where adapters are fp32, what they were in is free again.
        self.gradient = torch.zeros(num_elements, dtype=torch.float32, device=self._device)
        for name, parameter in self._parameters.items():
            parameter.grad = self._places[name].view(self.gradient)
        num_blocks = num_elements // BLOCK_ELEMENTS
        self._scale_stacks = tuple(
            torch.zeros((len(names), num_blocks), dtype=dtype, device=self._master.device)
            for names, dtype in _SCALE_ROWS[settings.bits]
        )
        self._scales = _by_name(_SCALE_ROWS[settings.bits], self._scale_stacks)
        self._pieces = self._cut()
        self._num_updated_pieces = 0  # of an update that is under way
        self._adamw = self._make_adamw()

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of gradients and of optimizer state (master, moments and their scales)."""
        return {"gradient": self.gradient.nbytes, "optimizer": sum(tensor.nbytes for tensor in self.state_tensors())}

    def state_tensors(self) -> tuple[Tensor, ...]:
        """Master, moments and their scales: the flat buffers themselves."""
        return (self._master, *self._moments.values(), *self._scales.values())

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        self.gradient.zero_()

    def clip_gradients(self, max_grad_norm: float | None) -> Tensor:
        """Scale gradients so that their joint 2-norm is at most `max_grad_norm`; returns the norm before, 0-dim."""
        norm: Tensor = torch.linalg.vector_norm(self.gradient)
        if max_grad_norm is not None:
            self.gradient.mul_(torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def reset(self, weights: Mapping[str, Tensor]) -> None:
        """Begin anew: parameters and master become `weights` (rounded to the parameters' dtype), all else zero."""
        for buffer in (self.gradient, *self._moments.values(), *self._scales.values()):
            buffer.zero_()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(weights[name])
            self._places[name].view(self._master).copy_(parameter.data)
        self._begin_at(0)

    @torch.no_grad()
    def update(self, learning_rate: float, must_be_finite: Tensor | None = None) -> None:
        """One AdamW step on the master; then the model's weights are rounded from it.

        Piece by piece, and each wholly or not at all: where it raises, calling it again with the same gradients does
        the rest of the step.

        Args:
            learning_rate: of this step.
            must_be_finite: numbers on the device. If one of them is not finite, weights and moments stay what they
                were, to the bit, and the gradients are gone, without the host knowing; when it does, `forget_update`
                is due.

        Raises:
            Exception: whatever the device raises when memory runs out (see `hardware.memory`).
        """
        is_bad = None
        if must_be_finite is not None:
            is_bad = (must_be_finite * 0.0).sum().isnan()  # three kernels; `isfinite` and `all` take five
            self.gradient.masked_fill_(is_bad, 0.0)  # what the library makes of NaN in 8 bits is not told
            is_bad = is_bad.to(self._master.device)
        for piece in self._pieces[self._num_updated_pieces :]:
            with _wholly_or_not_at_all(piece.state, is_bad):
                asked = {"lr": learning_rate * piece.rate_ratio, "weight_decay": piece.weight_decay}
                self._adamw.param_groups[0].update(asked)
                self._adamw.state[piece.parameter]["step"] = self.step_count  # a try that failed has counted it
                piece.parameter.grad = self._beside_the_master(piece.gradient)
                try:
                    self._adamw.step()
                finally:
                    piece.parameter.grad = None
            self._num_updated_pieces += 1
        self._refresh_parameters()
        self._num_updated_pieces = 0
        self.step_count += 1

    def forget_update(self) -> None:
        """The last update, which changed nothing, does not count: AdamW corrects its means by the number."""
        self.step_count -= 1

    def state_dict(self) -> dict[str, Tensor]:
        """`{parameter}.master`, `.state1`, `.state2` (and `.absmax1`, `.absmax2` at 8 bits), and `step_count`.

        Views of the optimizer's own buffers, not copies, each in its own dtype. A master has its parameter's shape, a
        moment is flat and as long as the parameter's whole blocks.
        """
        state = {"step_count": torch.tensor(self.step_count)}
        for name, place in self._places.items():
            state[f"{name}.master"] = place.view(self._master)
            state |= {f"{name}.{key}": place.padded(flat) for key, flat in self._moments.items()}
            state |= {f"{name}.{key}": place.blocks(flat) for key, flat in self._scales.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` into this optimizer's own buffers, so that residency stays as it was planned.

        Raises:
            ValueError: names, shapes or dtypes differ from this optimizer's.
        """
        own = self.state_dict()
        wrong = sorted(
            name
            for name in own.keys() | state.keys()
            if name not in own
            or name not in state
            or own[name].shape != state[name].shape
            or own[name].dtype != state[name].dtype
        )
        if wrong:
            raise ValueError(f"{len(wrong)} tensors differ from this optimizer's, the first is {wrong[0]}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._begin_at(int(state["step_count"]))
        self._refresh_parameters()

    def _beside_the_master(self, gradient: Tensor) -> Tensor:
        """The gradient of a piece where it is updated."""
        if self._host is None:
            return gradient
        return self._host.host_memory(gradient.numel(), gradient.dtype).copy_(gradient)

    def _zeros(self, names: Sequence[str], num_elements: int, dtype: torch.dtype) -> Tensor:
        if self._host is not None:
            return self._host.host_memory(len(names) * num_elements, dtype).zero_().view(len(names), num_elements)
        if self.settings.residency != "paged":
            return torch.zeros((len(names), num_elements), dtype=dtype, device=self._device)
        folder = self.settings.paging_folder
        flat = zeros_paged(len(names) * num_elements, dtype=dtype, device=self._device, folder=folder)
        return flat.view(len(names), num_elements)

    def _begin_at(self, step_count: int) -> None:
        self.step_count = step_count
        self._num_updated_pieces = 0

    def _refresh_parameters(self) -> None:
        if self._host is not None:
            self._refresh_from_host()
            return
        rounded = [name for name, parameter in self._parameters.items() if parameter.dtype != torch.float32]
        if rounded:
            sources = [self._places[name].view(self._master) for name in rounded]
            torch._foreach_copy_([self._parameters[name].data for name in rounded], sources)

    def _refresh_from_host(self) -> None:
        """A piece of the master goes to the device as it is, and is rounded there into the weights it belongs to."""
        weights = [(place, self._parameters[name].data.view(-1)) for name, place in self._places.items()]
        for piece in self._pieces:
            first, end = piece.elements.start, piece.elements.stop
            arrived = self._master[first:end].to(self._device, non_blocking=True)
            for place, flat in weights:
                begin, stop = max(first, place.first), min(end, place.first + place.num_elements)
                if begin < stop:
                    flat[begin - place.first : stop - place.first].copy_(arrived[begin - first : stop - first])
            del arrived

    def _cut(self) -> tuple[_Piece, ...]:
        num_elements = self._master.numel()
        piece_elements = CPU_PIECE_ELEMENTS if self._master.device.type == "cpu" else GPU_PIECE_ELEMENTS
        firsts: dict[tuple[float, float], int] = {}  # of each stretch with terms of its own
        for name, place in self._places.items():
            firsts.setdefault(_terms_of(name, place.shape, self.settings), place.first)
        ends = [*list(firsts.values())[1:], num_elements]
        pieces = []
        for (terms, begin), stop in zip(firsts.items(), ends, strict=True):
            for first in range(begin, stop, piece_elements):
                pieces.append(self._piece(first, min(first + piece_elements, stop), *terms))
        return tuple(pieces)

    def _piece(self, first: int, end: int, rate_ratio: float, weight_decay: float) -> _Piece:
        elements = slice(first, end)
        blocks = slice(first // BLOCK_ELEMENTS, end // BLOCK_ELEMENTS)
        parameter = nn.Parameter(self._master[elements], requires_grad=True)
        state = (
            *(stack_KE[:, elements] for stack_KE in self._stacks),
            *(stack_KB[:, blocks] for stack_KB in self._scale_stacks),
        )
        return _Piece(parameter, elements, self.gradient[elements], state, rate_ratio, weight_decay)

    def _make_adamw(self) -> Any:
        """bitsandbytes' AdamW over pieces of the flat master, its state laid out here instead of by itself.

        Left alone it would allocate per parameter, fall back to resident memory on a CPU, and keep tensors under
        4,096 elements in 32 bits.
        """
        parameters = [piece.parameter for piece in self._pieces]
        adamw = make_adamw(parameters, weight_decay=self.settings.weight_decay, optim_bits=self.settings.bits)
        signed_map, unsigned_map = (dynamic_map(signed=signed, device=self._master.device) for signed in (True, False))
        maps = {"qmap1": signed_map, "qmap2": unsigned_map} if self._scales else {}
        for piece in self._pieces:
            rows = _by_name((*_ROWS[self.settings.bits], *_SCALE_ROWS[self.settings.bits]), piece.state)
            del rows["master"]
            adamw.state[piece.parameter] = {"step": 0, **rows, **maps}
        return adamw


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _by_name(stacked: Iterable[tuple[Sequence[str], torch.dtype]], stacks: Iterable[Tensor]) -> dict[str, Tensor]:
    """The rows of the stacks."""
    return {
        name: row
        for (names, _), stack in zip(stacked, stacks, strict=True)
        for name, row in zip(names, stack, strict=True)
    }


@contextmanager
def _wholly_or_not_at_all(tensors: Sequence[Tensor], is_bad: Tensor | None) -> Iterator[None]:
    """Put `tensors` back as they were where the body raises, or where `is_bad` is True on the device.

    To put them back takes no memory; the copies are made before.
    """
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
        if is_bad is not None:
            for tensor, copy in zip(tensors, before, strict=True):
                torch.where(is_bad, copy, tensor, out=tensor)
    except BaseException:
        for tensor, copy in zip(tensors, before, strict=True):
            tensor.copy_(copy)
        raise


def num_flat_elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """Elements of the flat buffers over parameters of these shapes, each padded to whole blocks."""
    return sum(_padded(math.prod(shape)) for shape in shapes)


def _lay_out(parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings) -> dict[str, _Place]:
    """Where each parameter lies: those with the same terms side by side, those with the step's own first."""
    usual = (1.0, settings.weight_decay)

    def differs(name: str) -> tuple[bool, ...]:
        terms = _terms_of(name, parameters[name].shape, settings)
        return tuple(own != common for own, common in zip(terms, usual, strict=True))

    places, first = {}, 0
    for name in sorted(parameters, key=differs):  # stable
        parameter = parameters[name]
        places[name] = _Place(first, parameter.numel(), tuple(parameter.shape))
        first = _padded(first + parameter.numel())
    return places


def _terms_of(name: str, shape: Sequence[int], settings: OptimizerSettings) -> tuple[float, float]:
    """Learning rate of a parameter over that of the step, and its weight decay."""
    is_vector = len(shape) == 1  # a bias, a norm, or a magnitude
    rate_ratio = settings.rate_ratio if is_vector or name.endswith(".lora_B") else 1.0
    decays = not is_vector or name.endswith(MAGNITUDE)
    return rate_ratio, settings.weight_decay if decays else 0.0


def _padded(num_elements: int) -> int:
    return math.ceil(num_elements / BLOCK_ELEMENTS) * BLOCK_ELEMENTS
