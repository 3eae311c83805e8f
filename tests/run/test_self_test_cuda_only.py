"""What only CUDA can show: right here, where its calls are answered by a CPU's, and each check sees what it is for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.hardware.paging import is_paged
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model import row_ops
from qlora_trainer.run.self_test import command, cuda_only
from qlora_trainer.run.self_test.check import Check
from qlora_trainer.run.self_test.cuda_only import check_side_stream, cuda_checks
from tests.hardware.late_stream import LateStream

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAMES = ["CUDA kernels", "managed memory", "copies on a side stream"]


class FakeCuda:
    """A CUDA device whose memory is the host's, as far as the checks call it.

    Attributes:
        asked: what `torch.cuda` was told, in order.
        is_managed: what the driver says of paged memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.is_managed = True
        for name in ("check_row_kernels", "check_managed_memory", "check_side_stream"):
            monkeypatch.setattr(cuda_only, name, self._here(getattr(cuda_only, name)))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self._set_sync_debug_mode)
        monkeypatch.setattr(cuda_only, "is_paged", lambda tensor: self.is_managed and is_paged(tensor))

    def _set_sync_debug_mode(self, mode: int | str) -> None:
        if mode == "error":  # torch/csrc/cuda/Module.cpp says it once a process
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
        self.asked.append(mode)

    def _here(self, check: Callable[..., Check]) -> Callable[..., Check]:
        """On the CPU what was asked for on the GPU."""

        def checked(name: str, there: torch.device | SideStream, *others: Path) -> Check:
            assert (there.device if isinstance(there, SideStream) else there) == CUDA
            self.asked.append(name)
            return check(name, LateStream(CPU) if isinstance(there, SideStream) else CPU, *others)

        return checked


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def found(folder: Path) -> dict[str, Check]:
    checks = {check.name: check for check in cuda_checks(CUDA, folder)}
    assert list(checks) == NAMES
    return checks


def failed(folder: Path) -> list[str]:
    return [name for name, check in found(folder).items() if check.verdict == "failed"]


def test_a_cpu_names_them_and_shows_none(disk_folder: Path) -> None:
    checks = list(cuda_checks(CPU, disk_folder))
    assert [(check.name, check.verdict) for check in checks] == [(name, "not on this device") for name in NAMES]


def test_on_cuda_each_is_looked_at(fake: FakeCuda, disk_folder: Path) -> None:
    checks = found(disk_folder)
    assert fake.asked == NAMES
    assert {check.verdict for check in checks.values()} == {"ok"}, checks
    for check in checks.values():
        command._check_entry(check)  # which refuses what the schema does
    assert checks["managed memory"].found == "managed, values equal"
    assert checks["copies on a side stream"].found == "pinned host memory, values equal"


def test_a_norm_that_is_off_is_seen(fake: FakeCuda, disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = row_ops.rms_norm
    monkeypatch.setattr(row_ops, "rms_norm", lambda x, weight, eps, offset: norm(x, weight, eps, offset + 1e-5))
    assert failed(disk_folder) == ["CUDA kernels"]


def test_memory_that_is_not_managed_is_seen(fake: FakeCuda, disk_folder: Path) -> None:
    fake.is_managed = False
    assert failed(disk_folder) == ["managed memory"]


def test_a_driver_that_calls_all_memory_managed_is_seen(
    fake: FakeCuda, disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_only, "is_paged", lambda _tensor: True)
    assert failed(disk_folder) == ["managed memory"]


def test_a_library_that_does_not_fit_fails_one_check(
    fake: FakeCuda, disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> Tensor:
        raise AttributeError("undefined symbol: cget_managed_ptr")

    monkeypatch.setattr(cuda_only, "zeros_paged", missing)
    checks = found(disk_folder)
    assert (checks["managed memory"].verdict, checks["managed memory"].found) == ("failed", "AttributeError")
    assert checks["copies on a side stream"].verdict == "ok"


@pytest.mark.parametrize("lost", range(2))
def test_a_copy_that_nobody_waits_for_is_seen(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way out what is copied was written over by then; on the way in it is not there yet."""
    stream, joined = LateStream(CPU), list[int]()
    join = LateStream.join

    def forgetful(self: LateStream) -> None:
        joined.append(len(joined))
        if joined[-1] != lost:
            join(self)

    monkeypatch.setattr(LateStream, "join", forgetful)
    check = check_side_stream("it", stream)
    assert (len(joined), check.verdict) == (2, "failed")
    assert check.found == "pinned host memory, values differ"


def test_on_cuda_a_wait_of_the_host_is_an_error_for_a_while(fake: FakeCuda) -> None:
    with cuda_only._no_wait(CUDA):
        assert fake.asked == ["error"]
    assert fake.asked == ["error", 0]
    with pytest.raises(RuntimeError, match="synchronizing"), cuda_only._no_wait(CUDA):
        raise RuntimeError("called a synchronizing CUDA operation")
    assert fake.asked == ["error", 0] * 2
