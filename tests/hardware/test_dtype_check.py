"""A CPU that computes wrongly in 16 bits is found out, whichever operation it is that is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.hardware import device, doctor, dtype_check
from qlora_trainer.hardware.dtype_check import why_not_computed_in
from qlora_trainer.hardware.quant_library import functional


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_this_machine_computes_rightly(dtype: torch.dtype) -> None:
    assert why_not_computed_in(dtype) is None


def test_it_takes_less_than_fifty_milliseconds() -> None:
    seconds = []
    for _ in range(3):  # the least of them: whatever else runs on the machine takes the caches
        start = time.process_time()
        why_not_computed_in(torch.bfloat16)
        seconds.append(time.process_time() - start)

    assert min(seconds) < 0.05


def _summed_up_in_16_bits(left: Tensor, right: Tensor) -> Tensor:
    """Block by block, rounded in between: what a kernel without 32-bit sums does."""
    out = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype)
    for start in range(0, left.shape[1], 16):
        out += (left[:, start : start + 16].float() @ right[start : start + 16].float()).to(left.dtype)
    return out


def _last_column_missing(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :-8].float() @ right[:-8].float()).to(left.dtype)


@pytest.mark.parametrize("wrong", [_summed_up_in_16_bits, _last_column_missing])
@pytest.mark.parametrize(
    "is_hit, told",
    [
        (lambda left, right: not right.is_contiguous(), "a product by a transposed weight is off by"),
        (lambda left, right: left.is_contiguous() and right.is_contiguous(), "a product is off by"),
        (lambda left, right: not left.is_contiguous(), "a transposed product is off by"),
    ],
)
def test_a_layout_in_which_products_are_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Tensor, Tensor], Tensor],
    is_hit: Callable[[Tensor, Tensor], bool],
    told: str,
) -> None:
    stock = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda left, right: wrong(left, right) if is_hit(left, right) else stock(left, right)
    )

    reason = why_not_computed_in(torch.bfloat16)

    assert reason is not None
    assert reason.startswith(told)


def _too_large(stock: Any) -> Any:
    return lambda *args, **options: stock(*args, **options) * 1.01


def _nan(stock: Any) -> Any:
    return lambda *args, **options: stock(*args, **options) * float("nan")


@pytest.mark.parametrize("broken", [_too_large, _nan])
@pytest.mark.parametrize(
    "owner, name, told",
    [
        (Tensor, "addmm_", "a product that is added"),
        (nn.functional, "linear", "a linear with a bias"),
        (dtype_check, "attend", "attention"),
    ],
)
def test_every_operation_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, told: str, broken: Callable[[Any], Any]
) -> None:
    stock = getattr(owner, name)
    replaced = broken(stock)
    if name == "attend":
        replaced = lambda *args: (broken(lambda: stock(*args)[0])(), None)  # noqa: E731 -- of a pair, the first
    monkeypatch.setattr(owner, name, replaced)

    assert str(why_not_computed_in(torch.bfloat16)).startswith(told)


def test_a_weight_that_is_unpacked_wrongly_in_16_bits_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = functional.dequantize_4bit

    def dequantize(packed: Tensor, state: Any) -> Tensor:
        unpacked: Tensor = stock(packed, state)
        return unpacked * 1.01 if state.dtype == torch.bfloat16 else unpacked

    monkeypatch.setattr(functional, "dequantize_4bit", dequantize)

    assert str(why_not_computed_in(torch.bfloat16)).startswith("an unpacked weight is off by")


def test_a_kernel_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor BFloat16")

    monkeypatch.setattr(dtype_check, "attend", attend)

    assert why_not_computed_in(torch.bfloat16) == "fails: no kernel for BFloat16"


def test_doctor_says_in_a_line_why_the_faster_dtype_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda left, right: torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype))
    gflops = {"float32": 100.0, "bfloat16": 200.0}
    monkeypatch.setattr(doctor, "best_gemm_gflops", lambda: gflops)
    monkeypatch.setattr(device, "best_gemm_gflops", lambda: gflops)

    findings = {finding.name: finding for finding in doctor._speed(torch.device("cpu"))}

    found = findings["compute dtype"]
    assert (found.value, found.verdict) == ("float32", "warn")
    assert found.note == (
        "What auto takes: the faster one computes wrongly, a product by a transposed weight is off by 1.0e+00, "
        "where 3.9e-03 is rounding."
    )
    assert device.choose_compute_dtype(torch.device("cpu")) == "float32"
