"""A side stream at its slowest: every copy is done as late as a GPU may do it, at the next `join`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.hardware.side_stream import SideStream

_NAN_BYTE = 0xFF  # of nothing else is NaN made in fp32, bf16 and fp16; in packed weights it is two codes of 1.0


@dataclass(frozen=True, slots=True)
class _Queued:
    """A copy; of what is copied only the place is known, as a GPU knows it.

    Attributes:
        to: gets the values.
        memory: weakly, the memory that they are in.
        layout: shape, strides, first element and dtype there.
    """

    to: Tensor
    memory: weakref.ref[Any]
    layout: tuple[torch.Size, tuple[int, ...], int, torch.dtype]

    @classmethod
    def of(cls, to: Tensor, source: Tensor) -> _Queued:
        layout = (source.size(), source.stride(), int(source.storage_offset()), source.dtype)
        return cls(to, weakref.ref(source.untyped_storage()), layout)

    def do(self) -> None:
        storage, (shape, stride, first, dtype) = self.memory(), self.layout
        if storage is not None:  # else it was given to somebody else, and what is there now is nobody's values
            self.to.copy_(torch.empty(0, dtype=dtype).set_(storage, first, shape, stride))


@dataclass(slots=True)
class LateStream(SideStream):
    """For a CPU, whose own side stream has copied when `copy` returns: there a `join` that is missing is not seen.

    Until `join` the target is NaN, and so it stays where the source was dropped in the meantime; a source that was
    written in the meantime is copied as it is then.
    """

    queued: list[_Queued] = field(default_factory=list)

    def copy(self, to: Tensor, source: Tensor) -> None:
        assert to.is_contiguous()
        assert to.shape == source.shape
        to.view(-1).view(torch.uint8).fill_(_NAN_BYTE)
        self.queued.append(_Queued.of(to, source))

    def join(self) -> None:
        for copy in self.queued:
            copy.do()
        self.queued.clear()
