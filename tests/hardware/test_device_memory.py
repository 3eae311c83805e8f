"""From allocated bytes to what a driver or a kernel shows, and the margins around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.hardware.device_memory import CPU_FIXED_BYTES, DeviceMemory, cpu_memory, cuda_memory

GIB = 2**30
ALLOCATED = st.integers(0, 200 * GIB)
PAGED = st.integers(0, 20 * GIB)
MEMORIES = [cuda_memory((8, 0)), cuda_memory((9, 0)), cpu_memory()]


@pytest.mark.parametrize("memory", MEMORIES)
@given(allocated=ALLOCATED, paged=PAGED, more=st.integers(1, GIB))
def test_more_allocated_is_more_used(memory: DeviceMemory, allocated: int, paged: int, more: int) -> None:
    for used in (memory.process_bytes, memory.worst_bytes):
        assert used(allocated + more, paged) >= used(allocated, paged) + more
        assert used(allocated, paged + more) == used(allocated, paged) + more


@pytest.mark.parametrize("memory", MEMORIES)
@given(size=ALLOCATED)
def test_the_allocator_rounds_up(memory: DeviceMemory, size: int) -> None:
    assert memory.aligned(size) % memory.alignment_bytes == 0
    assert 0 <= memory.aligned(size) - size < memory.alignment_bytes


@pytest.mark.parametrize("memory", MEMORIES)
@given(allocated=ALLOCATED, paged=PAGED)
def test_the_worst_is_no_less_than_the_expected(memory: DeviceMemory, allocated: int, paged: int) -> None:
    expected = memory.process_bytes(allocated, paged)
    assert memory.worst_bytes(allocated, paged) >= expected >= memory.fixed_bytes + paged + allocated
    assert memory.worst_bytes(allocated, paged) <= memory.fixed_bytes + paged + 1.15 * allocated + 1


@given(st.integers(12 * GIB, 69 * GIB))
def test_the_worst_covers_what_was_published_for_an_a100(allocated: int) -> None:
    """fms-acceleration's benchmarks: the driver shows 0.33 GiB and 1.113 times what is allocated."""
    shown = 0.33 * GIB + 1.113 * allocated
    assert shown <= cuda_memory((8, 0)).worst_bytes(allocated) <= 1.05 * shown


@pytest.mark.parametrize(
    "compute_capability, workspace_bytes",
    [((7, 5), 8_519_680), ((8, 0), 8_519_680), ((8, 9), 8_519_680), ((9, 0), 33_554_432), ((12, 0), 33_554_432)],
)
def test_products_have_a_workspace_by_generation(compute_capability: tuple[int, int], workspace_bytes: int) -> None:
    memory = cuda_memory(compute_capability)
    assert memory.workspace_bytes == 2 * workspace_bytes  # one for each thread that multiplies
    assert (memory.kind, memory.alignment_bytes) == ("cuda", 512)


def test_a_gpu_takes_little_of_the_host() -> None:
    memory = cuda_memory((8, 0))
    assert memory.host_peak_bytes(40 * GIB) == memory.host_peak_bytes(GIB) == memory.host_bytes
    assert 0.5 * GIB < memory.host_bytes < 2 * GIB


@given(st.integers(10**8, 2 * 10**9), ALLOCATED)
def test_on_a_cpu_the_device_is_the_host(interpreter: int, allocated: int) -> None:
    memory = cpu_memory(interpreter)
    process = memory.process_bytes(allocated)
    assert memory.host_peak_bytes(process) == process
    assert process - cpu_memory(0).process_bytes(allocated) == interpreter
    assert memory.process_bytes(0) == interpreter + CPU_FIXED_BYTES
    assert (memory.kind, memory.alignment_bytes, memory.workspace_bytes) == ("cpu", 1, 0)
