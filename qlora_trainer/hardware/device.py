"""Which device trains, in which dtype, with how many threads."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from typing import Literal

import torch

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.dtype_check import why_not_computed_in

ComputeDtype = Literal["float32", "bfloat16", "float16"]
AdapterDtype = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BF16_COMPUTE_CAPABILITY = (8, 0)  # Ampere; older cards emulate bf16 (CUDA C programming guide, compute capabilities)


def choose_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def num_cpu_threads() -> int:
    """Threads for CPU kernels: the processors this process may run on, not all that the machine has."""
    return len(os.sched_getaffinity(0))


def measure_gemm_gflops(dtype: torch.dtype, *, size: int = 512, repeats: int = 5) -> float:
    """Median speed of a square matrix product on the CPU, in GFLOP/s (2 x size^3 operations a product)."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(left, right)  # the first product pays for oneDNN's kernel generation
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def best_gemm_gflops(*, size: int = 512, rounds: int = 15) -> dict[ComputeDtype, float]:
    """The best speed of a square matrix product on the CPU in each dtype it may compute in, in GFLOP/s.

    By turns, and the best of them: whatever else runs on the machine only makes a product slower, and a run that took
    the other dtype for that would learn something else.
    """
    least: dict[ComputeDtype, float] = {"float32": math.inf, "bfloat16": math.inf}
    factors = {name: torch.ones(size, size, dtype=DTYPES[name]) for name in least}
    for number in range(rounds + 1):
        for name, factor in factors.items():
            start = time.perf_counter()
            torch.mm(factor, factor)
            if number:  # the first product pays for oneDNN's kernel generation
                least[name] = min(least[name], time.perf_counter() - start)
    return {name: 2 * size**3 / seconds / 1e9 for name, seconds in least.items()}


def choose_cpu_dtype(gflops: Mapping[ComputeDtype, float]) -> tuple[ComputeDtype, str | None]:
    """The dtype in which this machine multiplies fastest, but `"float32"` where what it computes there is wrong.

    Args:
        gflops: as `best_gemm_gflops` measures them.

    Returns:
        The dtype, and what is wrong in the fastest one; None where that one is taken.
    """
    fastest = max(gflops, key=lambda name: gflops[name])
    reason = None if fastest == "float32" else why_not_computed_in(DTYPES[fastest])
    return ("float32" if reason else fastest), reason


def faster_cpu_dtype() -> ComputeDtype:
    """`"bfloat16"` or `"float32"`, whichever this machine multiplies faster, and rightly."""
    return choose_cpu_dtype(best_gemm_gflops())[0]


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's number for the generation of `device`, such as (8, 0); None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose_compute_dtype(device: torch.device) -> ComputeDtype:
    """The dtype in which matrices are multiplied: bf16 from sm_80, fp16 on older cards, the faster one on a CPU."""
    capability = compute_capability(device)
    return faster_cpu_dtype() if capability is None else gpu_compute_dtype(capability)


def gpu_compute_dtype(capability: tuple[int, int]) -> ComputeDtype:
    """What a GPU of that compute capability multiplies in: bf16 where it has it."""
    return "bfloat16" if capability >= BF16_COMPUTE_CAPABILITY else "float16"


def require_has(asked: ComputeDtype | Literal["auto"], own: ComputeDtype, device_name: str) -> None:
    """Refuse bf16 on a GPU without it: products would be emulated, and attention would make T x T matrices.

    Args:
        asked: the config's `quantization.compute_dtype`.
        own: what the device computes in where nothing is asked.
        device_name: for the message.

    Raises:
        ConfigError: the device has no such numbers.
    """
    if asked == "bfloat16" and own == "float16":
        raise ConfigError(
            where="quantization.compute_dtype",
            found=f"bfloat16, which {device_name} has not",
            expected="auto, float16 or float32 on a GPU of a compute capability below 8.0",
            fix="Set quantization.compute_dtype to auto. A run that began in bfloat16 goes on on newer GPUs only.",
        )


def choose_adapter_dtype(asked: AdapterDtype | Literal["auto"], compute_dtype: ComputeDtype) -> AdapterDtype:
    """What adapters are held in: as asked, else bf16, and fp32 beside fp16, on cards that have no bf16."""
    if asked != "auto":
        return asked
    return "float32" if compute_dtype == "float16" else "bfloat16"
