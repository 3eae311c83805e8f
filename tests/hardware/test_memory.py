"""Memory readings, and out-of-memory errors told from others."""

from __future__ import annotations

import psutil
import pytest
import torch

from qlora_trainer.hardware import memory
from qlora_trainer.hardware.memory import (
    OutOfMemoryError,
    available_memory_bytes,
    cap_device_memory,
    is_out_of_memory,
    memory_errors_as_ours,
    process_peak_bytes,
    read_memory,
    total_memory_bytes,
)

GIB = 2**30
CPU = torch.device("cpu")
PETABYTE = 10**15


def test_torch_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(PETABYTE, dtype=torch.uint8)

    assert type(caught.value) is RuntimeError  # nothing but its text tells it from others
    assert is_out_of_memory(caught.value)


def test_python_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(MemoryError) as caught:
        bytearray(PETABYTE)

    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))

    assert not is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("the disk is out of memory of better days"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["torch", "python", "c10"],
)
def test_a_lack_of_memory_becomes_our_own_error(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError) as caught, memory_errors_as_ours():
        raise error
    assert caught.value.__cause__ is error
    with pytest.raises(ValueError, match="another"), memory_errors_as_ours():
        raise ValueError("another")


def test_a_peak_stays_after_the_memory_is_given_back() -> None:
    num_bytes = 64 * 2**20
    taken = bytearray(b"\1") * num_bytes
    while_taken = read_memory(CPU)
    del taken
    after = read_memory(CPU)

    assert while_taken.now_bytes >= num_bytes
    assert after.now_bytes <= while_taken.now_bytes - num_bytes // 2
    # The kernel counts pages per CPU and adds up late, so two readings can be apart by some.
    assert after.peak_bytes >= while_taken.now_bytes - 2**21
    assert after.peak_bytes == pytest.approx(process_peak_bytes(), abs=2**21)


def test_the_machine_has_more_than_this_process_takes() -> None:
    total_bytes, available_bytes = total_memory_bytes(CPU), available_memory_bytes(CPU)

    assert total_bytes == psutil.virtual_memory().total
    assert 0 < available_bytes < total_bytes
    assert read_memory(CPU).now_bytes < total_bytes


@pytest.mark.parametrize(
    "budget_bytes, share", [(5 * GIB, 4.6 / 8), (8 * GIB, 7.6 / 8), (80 * GIB, 1.0), (GIB // 4, 0.0)]
)
def test_the_cap_is_the_budget_without_the_context(
    budget_bytes: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card of 8 GiB, of which a context takes 0.4 GiB beside torch's allocator."""
    capped: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(memory, "total_memory_bytes", lambda _: 8 * GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: capped.append(given))
    cap_device_memory(torch.device("cuda"), budget_bytes)
    ((found, device),) = capped
    assert found == pytest.approx(share)
    assert device.type == "cuda"


def test_a_container_has_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: the machine's memory alone, of which a container may have a small part."""
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: GIB)
    monkeypatch.setattr(memory, "memory_free_bytes", lambda: GIB // 2)
    assert total_memory_bytes(CPU) == GIB
    assert available_memory_bytes(CPU) == GIB // 2
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: None)
    monkeypatch.setattr(memory, "memory_free_bytes", lambda: None)
    assert total_memory_bytes(CPU) == psutil.virtual_memory().total
