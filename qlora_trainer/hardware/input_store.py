"""Host memory for tensors that are needed again much later: layers' inputs between forward and backward.

On a GPU they go to pinned memory and come back on a stream of their own, beside the work that goes on: out while their
layer is computed, in, by turns into two buffers, while the layer above is computed back. On a CPU the host is the
device: there they go through a file without a name, whose pages are the kernel's, not this process's.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlora_trainer.config.paths import require_on_disk
from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.side_stream import SideStream

NUM_BUFFERS = 2
_FIX = "Free some space, set memory.paging_dir to another disk, or memory.activation_offload to false."


class InputStore(Protocol):
    """Takes tensors numbered from 0 upward and gives them back from the last one down."""

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep the values of `tensor`, which is not written until `sent`."""

    def sent(self) -> None:
        """What was put may be written and dropped from now on."""

    def take(self, number: int) -> Tensor:
        """A tensor with the values, dtype and shape that were put under that number, on the same device.

        It is good until the next but one is taken.
        """


@dataclass(frozen=True, slots=True)
class _Form:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(slots=True)
class HostInputs:
    """For a device whose memory is not the host's.

    Memory is kept for the next time, so it is taken once, by the largest tensors that come: on the host for each
    number, and on the device two buffers, by turns for the one that is used and for the next. `take` gives out a view
    of a buffer, which is overwritten when the next but one is fetched.
    """

    stream: SideStream
    _kept: dict[int, Tensor] = field(default_factory=dict)
    _forms: dict[int, _Form] = field(default_factory=dict)
    _leaving: Tensor | None = None
    _buffers: list[Tensor] = field(default_factory=list)
    _held: list[int | None] = field(default_factory=lambda: [None] * NUM_BUFFERS)

    def put(self, number: int, tensor: Tensor) -> None:
        self._held = [None] * NUM_BUFFERS  # what a backward has left that did not come to its end
        self._forms[number] = _Form.of(tensor)
        if not self._buffers or not _holds(self._buffers[0], tensor):
            self._buffers = []
            self._buffers = [tensor.new_empty(tensor.numel()) for _ in range(NUM_BUFFERS)]
        if number not in self._kept or not _holds(self._kept[number], tensor):
            self._kept[number] = self.stream.host_memory(tensor.numel(), tensor.dtype)
        self._leaving = tensor.detach()
        self.stream.copy(_shaped(self._kept[number], tensor), self._leaving)

    def sent(self) -> None:
        self.stream.join()  # only now may its memory be given to others: what they do with it comes after the copy
        self._leaving = None

    def take(self, number: int) -> Tensor:
        tensor = self._fetch(number)
        self.stream.join()
        if number - 1 in self._forms:
            self._fetch(number - 1)
        return tensor

    def _fetch(self, number: int) -> Tensor:
        slot, form = number % NUM_BUFFERS, self._forms[number]
        num_elements = form.shape.numel()
        buffer = self._buffers[slot][:num_elements]
        if self._held[slot] != number:
            self.stream.copy(buffer, self._kept[number][:num_elements])
            self._held[slot] = number
        return buffer.view(form.shape)


class _UnnamedFile:
    """A file that is gone when nobody has it any more."""

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder, prefix=".inputs-") as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):  # the kernel takes 2 GiB at a time at most
            done += os.pwrite(self._descriptor, data[done:], done)

    def read(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            num_bytes = os.preadv(self._descriptor, [data[done:]], done)
            if num_bytes == 0:
                raise OSError(errno.EIO, f"a file of layers' inputs ends at {done} of {len(data)} bytes")
            done += num_bytes


@dataclass(slots=True)
class FileInputs:
    """For a CPU: one file without a name for each number.

    Written and read by system calls, not mapped: what is mapped counts as this process's memory while it is touched.
    """

    folder: Path
    _files: dict[int, _UnnamedFile] = field(default_factory=dict)
    _forms: dict[int, _Form] = field(default_factory=dict)

    def put(self, number: int, tensor: Tensor) -> None:
        """See `InputStore`.

        Raises:
            StorageError: the folder is missing, in memory itself (tmpfs), cannot be written, or has no room.
        """
        self._forms[number] = _Form.of(tensor)
        try:
            if number not in self._files:
                require_on_disk(self.folder)
                self._files[number] = _UnnamedFile(self.folder)
            self._files[number].write(_bytes_of(tensor.detach().contiguous()))
        except OSError as error:
            raise StorageError(
                where=str(self.folder),
                found=f"no room for {math.ceil(tensor.nbytes / 2**20)} MiB of a layer's input ({error.strerror})",
                expected="a writable folder with that much free space for each layer",
                fix=_FIX,
            ) from error

    def sent(self) -> None:
        """It was written by `put`."""

    def take(self, number: int) -> Tensor:
        tensor = self._forms[number].empty()
        self._files[number].read(_bytes_of(tensor))
        return tensor


@dataclass(slots=True)
class NoInputs:
    """For a dry run of `FileInputs`: nothing is kept but what the tensors looked like."""

    _forms: dict[int, _Form] = field(default_factory=dict)

    def put(self, number: int, tensor: Tensor) -> None:
        self._forms[number] = _Form.of(tensor)

    def sent(self) -> None:
        """Nothing was."""

    def take(self, number: int) -> Tensor:
        return self._forms[number].empty()


def input_store(device: torch.device, folder: Path) -> InputStore:
    """The one for a device; `folder` is where a CPU's files lie."""
    return FileInputs(folder) if device.type == "cpu" else HostInputs(SideStream(device))


def _holds(flat: Tensor, tensor: Tensor) -> bool:
    return flat.dtype == tensor.dtype and flat.numel() >= tensor.numel()


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    return flat[: like.numel()].view(like.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
