"""The numbers of a self test are right here, and each check sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.model import nf4
from qlora_trainer.run.self_test.numerics import numeric_checks

CPU = torch.device("cpu")
NAMES = ["NF4 levels", "NF4 quantize", "NF4 dequantize", "NF4 dequantize, double quantization", "LoRA linear"]


def failed(dtype: str = "float32") -> list[str]:
    checks = list(numeric_checks(CPU, dtype))
    assert [check.name for check in checks] == NAMES
    return [check.name for check in checks if check.verdict == "failed"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_everything_is_right_here(dtype: str) -> None:
    assert failed(dtype) == []


def test_other_levels_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = nf4.nf4_code(CPU).clone()
    levels[3] += 1e-6
    monkeypatch.setattr(nf4, "nf4_code", lambda _device: levels)
    assert failed() == ["NF4 levels"]


def test_a_level_that_is_not_the_nearest_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = nf4.quantize

    def one_off(weight_OI: Tensor, *, double_quant: bool) -> nf4.NF4Weight:
        packed = quantize(weight_OI, double_quant=double_quant)
        packed.packed[100] ^= 1
        return packed

    monkeypatch.setattr(nf4, "quantize", one_off)
    assert failed() == ["NF4 quantize"]


def test_another_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = nf4.quantize

    def scaled(weight_OI: Tensor, *, double_quant: bool) -> nf4.NF4Weight:
        packed = quantize(weight_OI, double_quant=double_quant)
        return packed if double_quant else replace(packed, absmax=packed.absmax * 1.0001)

    monkeypatch.setattr(nf4, "quantize", scaled)
    assert failed() == ["NF4 quantize"]


@pytest.mark.parametrize(
    "wrong",
    [lambda dense_OI: dense_OI * 1.001, lambda dense_OI: dense_OI.flip(0), lambda dense_OI: dense_OI * float("nan")],
    ids=["scaled", "turned", "nan"],
)
def test_weights_that_are_unpacked_wrongly_are_seen(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    dequantize = nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *args, **options: wrong(dequantize(*args, **options)))
    assert failed() == NAMES[2:]


def test_a_second_rounding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    dequantize = nf4.dequantize

    def through_fp8(weight: nf4.NF4Weight, dtype: torch.dtype, *rest: Any) -> Tensor:
        dense_OI = dequantize(weight, dtype, *rest)
        return dense_OI if dtype == torch.float32 else dense_OI.to(torch.float8_e4m3fn).to(dtype)

    monkeypatch.setattr(nf4, "dequantize", through_fp8)
    assert failed("bfloat16") == NAMES[2:]


def test_a_library_that_breaks_is_a_failed_check_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_arguments: Any, **_options: Any) -> Tensor:
        raise RuntimeError("no kernel image\nin /home/somebody/lib.so")

    monkeypatch.setattr(nf4, "dequantize", missing)
    checks = {check.name: check for check in numeric_checks(CPU, "float32")}
    assert checks["NF4 quantize"].verdict == "ok"
    assert checks["LoRA linear"].found == "RuntimeError"  # all that the report gets
    assert checks["LoRA linear"].reason == "no kernel image in /home/somebody/lib.so"
