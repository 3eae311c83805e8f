"""Host memory for tensors that are needed again much later: layers' inputs between forward and backward.

On a GPU they go to pinned memory and come back on a stream of their own, beside the work that goes on: what leaves is
held until the next one leaves, what is due next comes while the one before is in use, so two of them at most are on the
device for it. On a CPU the host is the device: there they go through a file without a name, whose pages are the
kernel's, not this process's.
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

_FIX = "Free some space, set memory.paging_dir to another disk, or memory.activation_offload to false."


class InputStore(Protocol):
    """Takes tensors numbered from 0 upward and gives them back from the last one down."""

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep the values of `tensor`; the tensor itself may be dropped."""

    def take(self, number: int) -> Tensor:
        """A new tensor with the values, dtype and shape that were put under that number, on the same device."""


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

    Host memory is kept for the next time, so it is taken once, by the largest tensors that come.
    """

    stream: SideStream
    _kept: dict[int, Tensor] = field(default_factory=dict)
    _forms: dict[int, _Form] = field(default_factory=dict)
    _leaving: Tensor | None = None
    _coming: dict[int, Tensor] = field(default_factory=dict)

    def put(self, number: int, tensor: Tensor) -> None:
        self._coming.clear()  # of a backward that did not come to its end
        self.stream.join()  # only now may the one before be dropped: its copy is done before what comes next
        self._forms[number] = _Form.of(tensor)
        self._leaving = tensor.detach()
        self.stream.copy(self._host_memory(number, tensor), self._leaving)

    def take(self, number: int) -> Tensor:
        self.stream.join()
        self._leaving = None
        tensor = self._coming.pop(number, None)
        if tensor is None:
            tensor = self._fetch(number)
            self.stream.join()
        if number - 1 in self._forms:
            self._coming[number - 1] = self._fetch(number - 1)
        return tensor

    def _fetch(self, number: int) -> Tensor:
        tensor = self._forms[number].empty()
        self.stream.copy(tensor, self._kept[number][: tensor.numel()].view(tensor.shape))
        return tensor

    def _host_memory(self, number: int, tensor: Tensor) -> Tensor:
        kept = self._kept.get(number)
        if kept is None or kept.dtype != tensor.dtype or kept.numel() < tensor.numel():
            kept = self._kept[number] = self.stream.host_memory(tensor.numel(), tensor.dtype)
        return kept[: tensor.numel()].view(tensor.shape)


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

    def take(self, number: int) -> Tensor:
        return self._forms[number].empty()


def input_store(device: torch.device, folder: Path) -> InputStore:
    """The one for a device; `folder` is where a CPU's files lie."""
    return FileInputs(folder) if device.type == "cpu" else HostInputs(SideStream(device))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
