"""Memory readings of this process and its device, and out-of-memory errors told from other errors."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from qlora_trainer.hardware.control_group import memory_free_bytes, memory_limit_bytes
from qlora_trainer.hardware.device_memory import CUDA_CONTEXT_BYTES

# c10's CPU allocator raises a plain RuntimeError; this is the fixed part of its message (c10/core/impl/alloc_cpu.cpp).
_CPU_ALLOCATOR_MESSAGE = "DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes in use now and the most so far, of the device the run trains on.

    On CUDA both are torch's allocated bytes; on CPU the resident set of this process (VmRSS and VmHWM).
    """

    now_bytes: int
    peak_bytes: int


def process_peak_bytes() -> int:
    """The most resident memory this process ever had: VmHWM, mapped file pages included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024  # the kernel prints kB
    raise RuntimeError("/proc/self/status has no VmHWM line")


def resident_bytes() -> int:
    """Resident memory of this process now, mapped file pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def read_memory(device: torch.device) -> MemoryReading:
    """Memory in use on `device` now and at its peak."""
    if device.type == "cuda":
        return MemoryReading(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    return MemoryReading(resident_bytes(), process_peak_bytes())


def total_memory_bytes(device: torch.device) -> int:
    """All the memory `device` has, free or not; on a CPU no more than this process's control group may have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    return min(total, memory_limit_bytes() or total)


def available_memory_bytes(device: torch.device) -> int:
    """What `device` could still give to this process; on a CPU no more than its control group leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available, free = int(psutil.virtual_memory().available), memory_free_bytes()
    return available if free is None else min(available, free)


class OutOfMemoryError(Exception):
    """Memory ran out, on any device; for whoever can try again with less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    if isinstance(error, OutOfMemoryError | torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR_MESSAGE in str(error)


@contextmanager
def memory_errors_as_ours() -> Iterator[None]:
    """Turn what a device raises when memory runs out into our own error; all else passes.

    Raises:
        OutOfMemoryError: memory ran out within.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(str(error)) from error
        raise


def forget_peak(device: torch.device) -> int:
    """Let the peak start anew from what is in use now: what preparing took is not what training takes.

    Returns:
        Bytes: the most resident memory that this process has had until now.
    """
    until_now = process_peak_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not everywhere allowed: then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current resident set
    return until_now


def cap_device_memory(device: torch.device, budget_bytes: int) -> None:
    """Keep this process within `budget_bytes` of a CUDA device.

    The cap is the allocator's, which knows nothing of the context.
    """
    share = (budget_bytes - CUDA_CONTEXT_BYTES) / total_memory_bytes(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
