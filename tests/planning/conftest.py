"""Tests of this room are kept off the user's cache folder and on one thread, and plan for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_trainer.hardware import kernel_workspace
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.planning import inside

# Before any test runs: autograd's engine counts the devices once, at the first backward of the process.
python_accelerator()


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora_trainer"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is small is slower on more threads; what a kernel needs is asked for one, as it runs on one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(kernel_workspace, "num_cpu_threads", lambda: 1)
    inside._traced_bytes.cache_clear()
    yield
    torch.set_num_threads(num_threads)
    inside._traced_bytes.cache_clear()
