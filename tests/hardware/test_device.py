"""Which device, dtype and number of threads are chosen."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from qlora_trainer.hardware import device
from qlora_trainer.hardware.device import (
    DTYPES,
    best_gemm_gflops,
    choose_adapter_dtype,
    choose_compute_dtype,
    choose_device,
    faster_cpu_dtype,
    measure_gemm_gflops,
    num_cpu_threads,
)

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("is_available, expected", [(True, GPU), (False, torch.device("cpu"))])
def test_the_first_gpu_is_taken_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, is_available: bool, expected: torch.device
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)

    assert choose_device() == expected


@pytest.mark.parametrize(
    "capability, expected",
    [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_a_gpu_computes_in_bf16_from_sm_80_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    assert choose_compute_dtype(GPU) == expected


@pytest.mark.parametrize(
    "asked, compute_dtype, expected",
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "bfloat16"),
        ("auto", "float16", "float32"),
        ("bfloat16", "float16", "bfloat16"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_adapters_are_bf16_where_the_device_has_it(asked: Any, compute_dtype: Any, expected: str) -> None:
    assert choose_adapter_dtype(asked, compute_dtype) == expected


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_a_cpu_computes_in_what_it_multiplies_faster(monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    """Though two of three products are disturbed, those of the faster dtype by more.

    Mutation tried: the median instead of the best, which takes the slower one.
    """
    clock, num_products = [0.0], [0]

    def product(left: torch.Tensor, _right: torch.Tensor) -> None:
        num_products[0] += 1
        is_faster = left.dtype == DTYPES[faster]
        clock[0] += 1.0 if is_faster else 1.5
        if num_products[0] % 3:
            clock[0] += 9.0 if is_faster else 1.0

    monkeypatch.setattr(device, "why_not_computed_in", lambda _dtype: None)
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    assert faster_cpu_dtype() == faster
    assert choose_compute_dtype(torch.device("cpu")) == faster


@pytest.mark.parametrize(
    "bfloat16_gflops, reason, expected",
    [(200.0, None, "bfloat16"), (200.0, "a product is off", "float32"), (50.0, "a product is off", "float32")],
)
def test_a_dtype_in_which_a_cpu_computes_wrongly_is_not_taken_however_fast(
    monkeypatch: pytest.MonkeyPatch, bfloat16_gflops: float, reason: str | None, expected: str
) -> None:
    looked_at: list[torch.dtype] = []

    def why_not(dtype: torch.dtype) -> str | None:
        looked_at.append(dtype)
        return reason

    gflops = {"float32": 100.0, "bfloat16": bfloat16_gflops}
    monkeypatch.setattr(device, "why_not_computed_in", why_not)
    monkeypatch.setattr(device, "best_gemm_gflops", lambda: gflops)

    assert choose_compute_dtype(torch.device("cpu")) == expected
    assert looked_at == ([torch.bfloat16] if bfloat16_gflops > 100.0 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_speed_is_one_that_a_cpu_can_have(dtype: torch.dtype) -> None:
    assert 0.01 < measure_gemm_gflops(dtype, size=128, repeats=3) < 1e5
    assert all(0.01 < gflops < 1e5 for gflops in best_gemm_gflops(size=128, rounds=3).values())


def test_threads_are_the_processors_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert num_cpu_threads() == len(allowed)

    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_cpu_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
