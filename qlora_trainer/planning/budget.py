"""What a plan may use, and on which device: this machine, a card of the catalogue, or a number of bytes."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Literal

import torch

from qlora_trainer.config.sizes import format_size
from qlora_trainer.errors import ConfigError, DoesNotFitError
from qlora_trainer.hardware.device import (
    DTYPES,
    ComputeDtype,
    choose_compute_dtype,
    choose_device,
    gpu_compute_dtype,
    require_has,
)
from qlora_trainer.hardware.device_memory import DeviceMemory, cpu_memory, cuda_memory
from qlora_trainer.hardware.gpu_catalogue import LARGEST_NOMINAL_GIB, choose_gpu, nearest_by_name
from qlora_trainer.hardware.kernel_workspace import compiled_bytes
from qlora_trainer.hardware.memory import available_memory_bytes, resident_bytes, total_memory_bytes
from qlora_trainer.planning.plan import DEVICE_KEY, HOST_KEY
from qlora_trainer.planning.throughput import Speed, cpu_speed, gpu_speed

NO_LIMIT_BYTES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A device and the memory of it that a run may use.

    Attributes:
        kind: "cpu" or "cuda".
        device_name: as a person would call it.
        budget_bytes: of the device, for the whole run: context, libraries and margins included.
        host_budget_bytes: of the host; on a CPU the same memory.
        most_bytes, most_host_bytes: what of either could be asked for at most.
        compute_dtype: what the device multiplies in.
        memory: from allocated bytes to used ones.
        speed: for the estimate of time.
        device_key: who asks for memory of the device: "memory.budget", or the option that takes its place.
        asked_bytes, asked_host_bytes: what was asked for by `device_key` and by memory.host_budget; None for neither.
    """

    kind: Literal["cpu", "cuda"]
    device_name: str
    budget_bytes: int
    host_budget_bytes: int
    most_bytes: int
    most_host_bytes: int
    compute_dtype: ComputeDtype
    memory: DeviceMemory
    speed: Speed
    device_key: str = DEVICE_KEY
    asked_bytes: int | None = None
    asked_host_bytes: int | None = None

    @property
    def limiting_key(self) -> str:
        """Who limits `budget_bytes`: on a CPU, where two ask for the same memory, who asks for less."""
        if self.kind == "cuda" or self.asked_host_bytes is None:
            return self.device_key
        is_host_less = self.asked_bytes is None or self.asked_host_bytes < self.asked_bytes
        return HOST_KEY if is_host_less else self.device_key


def gpu_budget(
    gpu_name: str | None, vram_bytes: int | None, host_bytes: int | None = None, *, where: str = "--vram"
) -> Budget:
    """A GPU that need not be here.

    Args:
        gpu_name: of the catalogue; None stands for the smallest card with that much memory.
        vram_bytes: what the run may use of it, if the driver leaves that much; None is all of it.
        host_bytes: what it may use of the host; None is no limit.
        where: who asks for `vram_bytes`, for the message.

    Raises:
        ConfigError: no such card, or more memory than it has.
    """
    gpu = choose_gpu(gpu_name, vram_bytes, where=where)
    budget_bytes, most_bytes = vram_bytes or gpu.memory_bytes, LARGEST_NOMINAL_GIB * 2**30
    if gpu_name is not None:
        budget_bytes, most_bytes = min(budget_bytes, gpu.memory_bytes), gpu.memory_bytes
    return Budget(
        kind="cuda",
        device_name=gpu.name if gpu_name is not None else f"GPU with {format_size(budget_bytes)}",
        budget_bytes=budget_bytes,
        host_budget_bytes=host_bytes or NO_LIMIT_BYTES,
        most_bytes=most_bytes,
        most_host_bytes=NO_LIMIT_BYTES,
        compute_dtype=gpu_compute_dtype(gpu.compute_capability),
        memory=cuda_memory(gpu.compute_capability),
        speed=gpu_speed(gpu),
        device_key=where,
        asked_bytes=vram_bytes,
        asked_host_bytes=host_bytes,
    )


def cpu_budget(
    ram_bytes: int | None,
    host_bytes: int | None = None,
    *,
    compute_dtype: ComputeDtype | None = None,
    where: str = "--ram",
) -> Budget:
    """This machine's CPU.

    Args:
        ram_bytes, host_bytes: resident memory of the whole process, of which the smaller counts; None for both is what
            is free now, and what this process has already.
        compute_dtype: None for the one that this machine multiplies faster.
        where: who asks for `ram_bytes`, for messages.

    Raises:
        ConfigError: more memory than this machine has.
    """
    cpu = torch.device("cpu")
    _require_machine_has(ram_bytes, cpu, where=where)
    _require_machine_has(host_bytes, cpu, where=HOST_KEY)
    asked = [limit for limit in (ram_bytes, host_bytes) if limit is not None]
    # Of what this process has, the limit of a control group leaves out file pages: that much may be above it.
    free_bytes = min(total_memory_bytes(cpu), available_memory_bytes(cpu) + resident_bytes())
    budget_bytes = min(asked) if asked else free_bytes
    dtype = compute_dtype or choose_compute_dtype(cpu)
    return Budget(
        kind="cpu",
        device_name="cpu",
        budget_bytes=budget_bytes,
        host_budget_bytes=budget_bytes,
        most_bytes=total_memory_bytes(cpu),
        most_host_bytes=total_memory_bytes(cpu),
        compute_dtype=dtype,
        memory=cpu_memory(compiled_bytes=compiled_bytes(DTYPES[dtype], has_one_length=True)),
        speed=cpu_speed(dtype),
        device_key=where,
        asked_bytes=ram_bytes,
        asked_host_bytes=host_bytes,
    )


def machine_budget(
    budget_bytes: int | None, host_bytes: int | None, compute_dtype: ComputeDtype | None = None
) -> Budget:
    """The device that training takes on this machine, with what is free on it as the upper bound.

    Args:
        budget_bytes, host_bytes: what was asked for; None is what is free.
        compute_dtype: None for the one that the device multiplies faster.

    Raises:
        ConfigError: more is asked for than the device has, or a dtype that it has not.
        DoesNotFitError: nothing is free on the device.
    """
    device, host = choose_device(), torch.device("cpu")
    if device.type == "cpu":
        return cpu_budget(budget_bytes, host_bytes, compute_dtype=compute_dtype, where=DEVICE_KEY)
    _require_machine_has(budget_bytes, device, where=DEVICE_KEY)
    _require_machine_has(host_bytes, host, where=HOST_KEY)
    free = available_memory_bytes(device)
    if free < 2**26:
        raise DoesNotFitError(
            where=DEVICE_KEY,
            found=f"{free / 2**20:.0f} MiB free on the GPU",
            expected="some memory to train in",
            fix="End what is using the GPU (see nvidia-smi).",
        )
    name = torch.cuda.get_device_name(device)
    known = nearest_by_name(name, total_bytes=total_memory_bytes(device))
    like = known or choose_gpu(None, min(free, LARGEST_NOMINAL_GIB * 2**30))
    capability = torch.cuda.get_device_capability(device)
    require_has(compute_dtype or "auto", gpu_compute_dtype(capability), name)
    return Budget(
        kind="cuda",
        device_name=name,
        budget_bytes=min(free, budget_bytes or free),
        host_budget_bytes=host_bytes or available_memory_bytes(host),
        most_bytes=free,
        most_host_bytes=total_memory_bytes(host),
        compute_dtype=compute_dtype or choose_compute_dtype(device),
        memory=cuda_memory(capability),
        speed=gpu_speed(like),
        asked_bytes=budget_bytes,
        asked_host_bytes=host_bytes,
    )


def _require_machine_has(num_bytes: int | None, device: torch.device, *, where: str) -> None:
    total = total_memory_bytes(device)
    if num_bytes is not None and num_bytes >= total + mmap.PAGESIZE:  # a control group's limit is whole pages
        raise ConfigError(
            where=where,
            found=format_size(num_bytes),
            expected=f"at most the {total / 2**30:.1f} GiB of this machine's {device.type}",
            fix=f"Lower {where}.",
        )
