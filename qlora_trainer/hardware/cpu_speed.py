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
# Weights that are unpacked one after the other, each as large as `_ELEMENTS`: together more than a core's cache holds.
_NUM_WEIGHTS, _SKINNY_ROWS = 8, 16
# An operation of a step as a multiple of a trivial one: many are our own (`torch.library`), which torch calls through
# Python, and all are prepared and recorded. A SmolLM2 step of 16 tokens has 4,900 of them (docs/log.md, 2026-11-28).
_TRIVIAL_OPERATIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSpeed:
    """What one step's kinds of work come to.

    Attributes:
        flops: of matrix products, a second.
        bytes: read or written by row operations, a second: of a gated activation, the largest of them. A copy would be
            five times faster, out of caches that a step's tensors do not stay in.
        unpacked_elements: weights dequantized and read by a product, a second: what a product of very few rows costs.
        launch_seconds: of one operation however small it is, Python and autograd included.
        file_bytes: read from a file in the cache folder that the kernel has not in memory, a second.
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
    gate, up, out = (torch.ones(_ELEMENTS, dtype=dtype) for _ in range(3))
    small = torch.ones(8)
    return CpuSpeed(
        flops=measure_gemm_gflops(dtype) * 1e9,
        bytes=3 * out.nbytes / _seconds(lambda: torch.mul(torch.nn.functional.silu(gate), up, out=out)),
        unpacked_elements=_unpacked_elements_a_second(dtype),
        launch_seconds=_TRIVIAL_OPERATIONS * _seconds(lambda: small * 2.0),
        file_bytes=_file_bytes_a_second(),
    )


def _unpacked_elements_a_second(dtype: torch.dtype) -> float:
    weight = torch.ones(512, _ELEMENTS // 512)
    packed = [
        functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        for _ in range(_NUM_WEIGHTS)
    ]
    rows = torch.ones(_SKINNY_ROWS, weight.shape[1], dtype=dtype)
    for _, state in packed:
        state.dtype = dtype

    def unpack_all() -> None:
        for one, state in packed:
            torch.nn.functional.linear(rows, functional.dequantize_4bit(one, state))

    return _NUM_WEIGHTS * _ELEMENTS / _seconds(unpack_all, repeats=5)


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
