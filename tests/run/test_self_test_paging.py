"""A self test sees where an optimizer's state lies, before a save and after a load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.errors import StorageError
from qlora_trainer.run.self_test import paging
from qlora_trainer.run.self_test.check import Check
from qlora_trainer.run.self_test.paging import paging_checks
from qlora_trainer.step import optimizer
from qlora_trainer.step.optimizer import AdapterOptimizer

CPU = torch.device("cpu")


def checked(folder: Path) -> dict[str, Check]:
    found = {check.name.removeprefix("optimizer state, "): check for check in paging_checks(CPU, folder)}
    assert list(found) == ["32 bits, resident", "32 bits, paged", "8 bits, resident", "8 bits, paged"]
    return found


def verdicts(folder: Path) -> set[str]:
    return {name for name, check in checked(folder).items() if check.verdict == "failed"}


def test_state_stays_where_it_was_planned(disk_folder: Path) -> None:
    for check in checked(disk_folder).values():
        assert check.verdict == "ok", check


def test_state_that_is_not_paged_is_seen(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resident(num_elements: int, *, dtype: torch.dtype, **_: Any) -> Tensor:
        return torch.zeros(num_elements, dtype=dtype)

    monkeypatch.setattr(optimizer, "zeros_paged", resident)
    assert verdicts(disk_folder) == {"32 bits, paged", "8 bits, paged"}


def test_a_load_that_brings_its_own_buffers_is_seen(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes' own `load_state_dict` does: the state comes back resident (its issues 782 and 1381)."""
    load = AdapterOptimizer.load_state_dict

    def replace_buffers(self: AdapterOptimizer, state: Mapping[str, Tensor]) -> None:
        load(self, state)
        self._master = self._master.clone()

    monkeypatch.setattr(AdapterOptimizer, "load_state_dict", replace_buffers)
    found = checked(disk_folder)
    assert {check.verdict for check in found.values()} == {"failed"}
    assert found["32 bits, paged"].found.startswith("paged, then partly paged; other buffers, ")


def test_a_load_that_loses_state_is_seen(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AdapterOptimizer.load_state_dict

    def without_a_moment(self: AdapterOptimizer, state: Mapping[str, Tensor]) -> None:
        load(self, state)
        self._moments["state2"].zero_()

    monkeypatch.setattr(AdapterOptimizer, "load_state_dict", without_a_moment)
    assert len(verdicts(disk_folder)) == 4


def test_a_folder_in_memory_shows_nothing_of_paging(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise StorageError(where=str(folder), found="a tmpfs", expected="a disk", fix="Set XDG_CACHE_HOME.")

    monkeypatch.setattr(paging, "require_on_disk", refuse)
    found = checked(disk_folder)
    assert found["8 bits, paged"].verdict == "not on this device"
    assert found["8 bits, resident"].verdict == "ok"
