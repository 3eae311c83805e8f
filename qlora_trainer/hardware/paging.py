"""Memory that the system may take back: CUDA managed memory, or on a CPU a file that is mapped.

On CUDA this is bitsandbytes' paged memory. On a CPU bitsandbytes has none; a shared mapping of a file does the same:
under pressure the kernel writes its pages to the file and reads them when they are touched.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.config.paths import require_on_disk
from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.quant_library import functional

_CU_POINTER_ATTRIBUTE_IS_MANAGED = 8  # cuda.h


def zeros_paged(num_elements: int, *, dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
    """A 1-D tensor of zeros that can leave memory while it is not in use.

    Args:
        num_elements: length.
        dtype: element type, float32 or uint8.
        device: "cuda" takes managed memory, "cpu" maps a file.
        folder: where the file of a CPU tensor lies; it has no name, so nothing is left over.

    Raises:
        StorageError: the folder is missing, in memory itself (tmpfs), cannot be written, or has no room.
    """
    if device.type == "cuda":
        paged = functional.get_paged(num_elements, dtype=dtype, device=device)
        functional.fill(paged, 0)
        return torch.as_tensor(_ManagedMemory(paged), device=device)
    require_on_disk(folder)
    num_bytes = num_elements * dtype.itemsize
    try:
        _require_room(folder, num_bytes)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".paged-") as file:
            # Claims the blocks now: a sparse file on a full disk would kill the process (SIGBUS) at some later step.
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
            return torch.from_file(file.name, shared=True, size=num_elements, dtype=dtype)
    except OSError as error:
        raise StorageError(
            where=str(folder),
            found=f"no room for {math.ceil(num_bytes / 2**20)} MiB of paged optimizer state ({error.strerror})",
            expected="a writable folder with that much free space",
            fix="Free some space, set memory.paging_dir to another disk, or use a resident optimizer (adamw_32bit).",
        ) from error


def is_paged(tensor: Tensor) -> bool:
    """Whether the system may take this tensor's memory back: managed memory, or shared pages of a file.

    Asked of the driver or the kernel, not of whoever made the tensor.

    Raises:
        OSError: there is no CUDA driver to ask.
        RuntimeError: it does not answer.
    """
    address = tensor.data_ptr()
    return _is_managed(address) if tensor.device.type == "cuda" else _is_of_shared_file(address)


def _is_managed(address: int) -> bool:
    value = ctypes.c_uint(0)
    status = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(value), _CU_POINTER_ATTRIBUTE_IS_MANAGED, ctypes.c_uint64(address)
    )
    if status != 0:
        raise RuntimeError(f"cuPointerGetAttribute ends with error {status}")
    return bool(value.value)


def _is_of_shared_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():  # proc(5): first-end permissions offset device inode
        area, permissions, _, _, inode = line.split(maxsplit=5)[:5]
        first, end = (int(border, 16) for border in area.split("-"))
        if first <= address < end:
            return permissions.endswith("s") and inode != "0"
    return False


@dataclass(frozen=True, slots=True)
class _ManagedMemory:
    """CUDA managed memory, described so that torch sees it as memory of the GPU (CUDA Array Interface, version 3).

    bitsandbytes hands it out as a tensor on the CPU, which torch lets neither have a gradient on the GPU nor be a GPU
    parameter's data.
    """

    paged: Tensor

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": tuple(self.paged.shape),
            "typestr": self.paged.numpy().dtype.str,
            "data": (self.paged.data_ptr(), False),  # not read-only
            "version": 3,
        }


def _require_room(folder: Path, num_bytes: int) -> None:
    # Asked for first: posix_fallocate fills the disk to the brim before it gives up, to the harm of everybody else.
    if num_bytes > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
