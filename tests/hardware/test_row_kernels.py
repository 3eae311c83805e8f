"""Kernels are used where they run; where they do not, it is known why, and rows are computed without them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_trainer.errors import StorageError
from qlora_trainer.hardware import row_kernels
from qlora_trainer.hardware.row_kernels import expects_row_kernels, has_row_kernels, why_no_row_kernels
from qlora_trainer.model import row_ops

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    why_no_row_kernels.cache_clear()
    yield
    why_no_row_kernels.cache_clear()


@pytest.fixture
def fake_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A triton with nothing in it, and a device to make tensors on."""
    fake: Any = SimpleNamespace(TritonError=type("TritonError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "triton", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: fake)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(shape))


def launching(launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "row_kernels", lambda: SimpleNamespace(gated=launch))


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_arguments: Any) -> None:
        raise error

    return fail


def test_a_cpu_has_none_and_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "why_no_row_kernels", failing(AssertionError("tried")))

    assert not has_row_kernels(CPU)
    assert not expects_row_kernels(CPU)


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    assert why_no_row_kernels(GPU) == "triton is not installed"
    assert not has_row_kernels(GPU)


@pytest.mark.usefixtures("fake_triton")
@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("Failed to find C compiler."), "RuntimeError: Failed to find C compiler."),
        (subprocess.CalledProcessError(1, ["gcc"]), "CalledProcessError: Command '['gcc']' returned non-zero exit"),
        (AssertionError("libcuda.so\ncannot found!"), "AssertionError: libcuda.so cannot found!"),
        (OSError("noexec"), "OSError: noexec"),
        (StorageError(where="~/.cache", found="a full disk", expected="room", fix="Delete."), "a full disk"),
    ],
)
def test_kernels_that_do_not_start_are_none(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    launching(failing(error), monkeypatch)

    assert said in str(why_no_row_kernels(GPU))
    assert not has_row_kernels(GPU)


@pytest.mark.usefixtures("fake_triton")
def test_memory_that_runs_out_says_nothing_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launching(failing(torch.OutOfMemoryError("CUDA out of memory")), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        has_row_kernels(GPU)

    launching(lambda *_arguments: None, monkeypatch)
    assert has_row_kernels(GPU)


def test_a_plan_for_a_gpu_that_is_not_here_counts_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert expects_row_kernels(GPU)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for is_there in (True, False):
        monkeypatch.setattr(row_kernels, "has_row_kernels", lambda _device, is_there=is_there: is_there)
        assert expects_row_kernels(GPU) == is_there


def test_each_operation_starts_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that has kernels every operation is one launch, and nothing else is computed."""
    launched: list[str] = []

    class Launchers:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_arguments: launched.append(name)

    monkeypatch.setattr(row_ops, "has_row_kernels", lambda _device: True)
    monkeypatch.setattr(row_ops, "row_kernels", Launchers)
    monkeypatch.setattr(row_ops, "by_rows", failing(AssertionError("computed in blocks")))
    rows, weight = torch.ones(3, 8), torch.ones(8)

    _, inverse = row_ops.rms_norm(rows, weight, 1e-5, 0.0)
    row_ops.rms_norm_again(rows, inverse, weight, 0.0)
    row_ops.rms_norm_backward_(rows, rows.clone(), inverse, weight, 0.0, None)
    row_ops.rotate_(rows.view(3, 2, 4), torch.ones(3, 4), torch.ones(3, 4), False)
    row_ops.gated(rows, rows, row_ops.SILU)
    row_ops.gated_backward_(rows, rows.clone(), rows.clone(), row_ops.SILU)

    assert launched == ["rms_norm", "rms_norm_again", "rms_norm_backward", "rotate", "gated", "gated_backward"]


def test_what_is_compiled_is_kept_in_a_folder_of_its_owner(tmp_path: Path) -> None:
    program = (
        "import os, triton; from qlora_trainer.hardware.row_kernels import row_kernels; row_kernels(); "
        "print(triton.knobs.cache.dir)"
    )
    for environment, folder in (({}, tmp_path / "qlora_trainer" / "triton"), ({"TRITON_CACHE_DIR": "/own"}, "/own")):
        child = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={"PATH": "", "XDG_CACHE_HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.strip() == str(folder)
    assert (tmp_path / "qlora_trainer").stat().st_mode & 0o777 == 0o700
