"""From allocated bytes to what a driver or a kernel shows: every constant of the device's side of a plan.

Each says where it is from, or that it was chosen; docs/memory.md has them in one table.

On CUDA torch's allocator rounds sizes up, takes memory from the driver in segments, and the driver itself holds a
context; on a CPU the resident set also has the interpreter, its libraries, and what malloc keeps. On Windows and WSL
managed memory does not page well, so paged optimizer state counts as if it never left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize. Every allocation is a multiple of it.
CUDA_ALIGNMENT_BYTES = 512
# aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: ":4096:2:16:8" (KiB x count) before Hopper, 32 MiB
# from it on. Comes from torch's own allocator, so it is part of the allocated peak.
CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES = 8_519_680, 32 * 2**20
# A handle and its workspace belong to one thread, and two multiply: the main one and autograd's. With two, 14 published
# peaks of an A100 are met within 0.01 % (docs/memory.md).
NUM_CUBLAS_WORKSPACES = 2
HOPPER = (9, 0)
# What the driver shows beyond torch's segments: CUDA context, loaded kernels, cuBLAS handles. Chosen, between two
# figures of fms-acceleration's A100 benchmarks (scripts/benchmarks/refs/a100_80gb.csv): 0.33 GiB, where a line through
# the driver's peaks over 12 to 69 GiB begins (0.33 GiB + 1.113 x allocated), and 0.44 GiB, where nothing large is ever
# free.
CUDA_CONTEXT_BYTES = int(0.4 * 2**30)
# A margin, chosen: under pressure the allocator gives back what it does not use, and parts of the 2 MiB pages of
# expandable segments are what stays. Nobody has measured it for us.
CUDA_EXPECTED_SPREAD = 0.02
# The same benchmarks: the driver's peak is 1.11 to 1.14 times the allocated one while memory is plentiful.
CUDA_WORST_SPREAD = 0.14
# Resident set of a Python process after importing torch (CPU build), transformers, bitsandbytes and datasets: 434 MB in
# docs/log.md, 2026-11-23; a run measures its own instead.
INTERPRETER_BYTES = 434 * 10**6
# What a process has beyond interpreter and live tensors: what malloc holds, stacks of threads. Margins, chosen: five
# runs had 17 to 97 MiB of it, whatever their size (docs/memory.md, "Resident memory of the process").
CPU_FIXED_BYTES, CPU_EXPECTED_SPREAD, CPU_WORST_SPREAD = 48 * 2**20, 0.02, 0.08
# A margin, chosen: a 256 MiB shard of the NF4 cache is held on the host while it is filled, beside the tensor that is
# quantized.
HOST_LOADING_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """How one device turns allocations into memory that is gone.

    Attributes:
        kind: "cpu" or "cuda".
        alignment_bytes: what the allocator rounds a size up to.
        workspace_bytes: allocated by libraries for the whole run, through the same allocator.
        fixed_bytes: not allocated by tensors, but taken all the same.
        expected_spread, worst_spread: share of allocated bytes that is taken on top.
        host_bytes: of the process on the host, where that is other memory.
    """

    kind: Literal["cpu", "cuda"]
    alignment_bytes: int
    workspace_bytes: int
    fixed_bytes: int
    expected_spread: float
    worst_spread: float
    host_bytes: int

    def aligned(self, num_bytes: int) -> int:
        """What the allocator makes of a size."""
        return -(-num_bytes // self.alignment_bytes) * self.alignment_bytes

    def process_bytes(self, allocated_bytes: int, paged_bytes: int = 0) -> int:
        """What the driver or the kernel is expected to show; `paged_bytes` are beyond `allocated_bytes`."""
        return self.fixed_bytes + paged_bytes + round(allocated_bytes * (1 + self.expected_spread))

    def worst_bytes(self, allocated_bytes: int, paged_bytes: int = 0) -> int:
        """The same with all the margins."""
        return self.fixed_bytes + paged_bytes + round(allocated_bytes * (1 + self.worst_spread))

    def host_peak_bytes(self, process_bytes: int) -> int:
        """Resident memory of the process on the host."""
        return process_bytes if self.kind == "cpu" else self.host_bytes


def cuda_memory(compute_capability: tuple[int, int]) -> DeviceMemory:
    """A GPU of NVIDIA's, with expandable segments."""
    is_hopper = compute_capability >= HOPPER
    return DeviceMemory(
        kind="cuda",
        alignment_bytes=CUDA_ALIGNMENT_BYTES,
        workspace_bytes=NUM_CUBLAS_WORKSPACES
        * (CUBLAS_WORKSPACE_HOPPER_BYTES if is_hopper else CUBLAS_WORKSPACE_BYTES),
        fixed_bytes=CUDA_CONTEXT_BYTES,
        expected_spread=CUDA_EXPECTED_SPREAD,
        worst_spread=CUDA_WORST_SPREAD,
        host_bytes=INTERPRETER_BYTES + HOST_LOADING_BYTES,
    )


def cpu_memory(interpreter_bytes: int = INTERPRETER_BYTES, *, compiled_bytes: int = 0) -> DeviceMemory:
    """The host itself, as the resident set of one process.

    Args:
        interpreter_bytes: what interpreter and data take.
        compiled_bytes: of kernels that are compiled meanwhile (see `kernel_workspace.compiled_bytes`).
    """
    return DeviceMemory(
        kind="cpu",
        alignment_bytes=1,
        workspace_bytes=0,
        fixed_bytes=interpreter_bytes + compiled_bytes + CPU_FIXED_BYTES,
        expected_spread=CPU_EXPECTED_SPREAD,
        worst_spread=CPU_WORST_SPREAD,
        host_bytes=0,
    )
