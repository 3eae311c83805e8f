"""How fast this machine's CPU does what a training step consists of: a quarter of a second of each."""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qlora_trainer.hardware.cache_folder import cache_folder
from qlora_trainer.hardware.device import DTYPES, ComputeDtype, measure_gemm_gflops
from qlora_trainer.hardware.quant_library import functional

_ELEMENTS = 2**20
_FILE_BYTES = 2**23


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSpeed:
    """Per second: FLOP of matrix products, bytes read or written by simple operations, weights dequantized.

    `launch_seconds` is what one operation costs however small it is, Python and autograd included; `file_bytes` are
    read from a file in the cache folder that the kernel has not in memory.
    """

    flops: float
    bytes: float
    unpacked_elements: float
    launch_seconds: float
    file_bytes: float


@functools.cache
def measure_cpu_speed(compute_dtype: ComputeDtype) -> CpuSpeed:
    """Measured once in a process; where cores are shared, the figures swing by a factor of two."""
    dtype = DTYPES[compute_dtype]
    values, out = torch.ones(_ELEMENTS, dtype=dtype), torch.empty(_ELEMENTS, dtype=dtype)
    packed, state = functional.quantize_4bit(torch.ones(512, 2048), blocksize=64, quant_type="nf4")
    state.dtype = dtype
    small = torch.ones(8)
    return CpuSpeed(
        flops=measure_gemm_gflops(dtype) * 1e9,
        bytes=2 * out.nbytes / _seconds(lambda: torch.mul(values, 2.0, out=out)),
        unpacked_elements=_ELEMENTS / _seconds(lambda: functional.dequantize_4bit(packed, state)),
        launch_seconds=4 * _seconds(lambda: small * 2.0),
        file_bytes=_file_bytes_a_second(),
    )


def _file_bytes_a_second() -> float:
    """Of the disk, not of the kernel's cache: what was written is put on the disk and dropped from the cache."""
    with tempfile.TemporaryFile(dir=cache_folder(), prefix=".speed-") as file:
        descriptor = file.fileno()
        os.pwrite(descriptor, os.urandom(_FILE_BYTES), 0)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        num_bytes = len(os.pread(descriptor, _FILE_BYTES, 0))
        return num_bytes / (time.perf_counter() - start)


def _seconds(run: Callable[[], object], repeats: int = 9) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
