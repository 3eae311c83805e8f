"""What an allocator takes for a traced step, and that a plan for a GPU says it."""

from __future__ import annotations

import pytest
import torch

from qlora_trainer.hardware.device_memory import cuda_memory
from qlora_trainer.planning import replay as replay_module
from qlora_trainer.planning.replay import Reserved, Storages, read_storages, replay, resident_sizes
from qlora_trainer.planning.tracker import StorageTracker

KIB, MIB = 2**10, 2**20


def of(*events: int, grows: bool = True) -> Storages:
    """Sizes that are made; `-1` drops what was made first of what is left."""
    num_bytes: list[int] = []
    allocation: list[int] = []
    alive: list[int] = []
    for index, size in enumerate(events):
        made = alive.pop(0) if size == -1 else index
        num_bytes.append(-num_bytes[made] if size == -1 else size)
        allocation.append(made)
        if size != -1:
            alive.append(index)
    return Storages(tuple(num_bytes), tuple(allocation), tuple(grows for _ in events))


def test_steps_of_one_size_take_what_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 MiB stay, 12 and 5 come and go: segments of 30, 12 and 20 MiB, or three pages of 20 MiB."""
    step = of(12 * MIB, 5 * MIB, -1, -1)
    for shares in ((1.0,), (1.0, 1.0, 1.0)):
        monkeypatch.setattr(replay_module, "SHARES", shares)
        assert replay([30 * MIB], step) == Reserved(60 * MIB, 62 * MIB, 47 * MIB)


def test_steps_of_other_sizes_leave_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 MiB, then 28: plain segments of both sizes are there at the end, an expandable one has grown.

    Mutation tried: sizes that do not grow with the tokens scaled as well.
    """
    monkeypatch.setattr(replay_module, "SHARES", (0.5, 1.0))
    found = replay([], of(28 * MIB, -1))
    assert found == Reserved(expandable_bytes=40 * MIB, plain_bytes=42 * MIB, allocated_bytes=28 * MIB)
    assert (found.ratio, found.worst_ratio) == (40 / 28, 42 / 28)
    assert found.fragmentation == 1 - 28 / 40
    assert replay([], of(28 * MIB, -1, grows=False)).plain_bytes == 28 * MIB


def test_what_a_step_hands_out_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "SHARES", (1.0,) * 5)
    assert replay([], of(16 * MIB)).plain_bytes == 16 * MIB


def test_resident_tensors_come_one_by_one_where_they_are_known() -> None:
    memory = cuda_memory((8, 0))
    tensors = {"base": [100, 600], "adapter": [64]}
    resident = {"base": 512 + 1024, "adapter": 1024, "other": 2048, "logits": 0}
    assert list(resident_sizes(resident, tensors, memory)) == [100, 600, 1024, 2048]


def test_a_trace_is_read_with_its_drops_and_without_the_host() -> None:
    """Mutation tried: what a kernel allocates inside itself left out."""
    tracker = StorageTracker(device_type="cpu", inside=lambda name, _: 77 if name == "aten::mul" else None)
    with tracker:
        kept = torch.empty(100)
        gone = torch.empty(50)
        del gone
        product = kept * 2
    found = read_storages(tracker, lambda _inside: 4096)
    assert found.num_bytes == (400, 200, -200, 400, 4096, -4096)
    assert found.allocation == (0, 1, 1, 3, 4, 4)
    assert all(found.grows)
    elsewhere = StorageTracker(device_type="cuda")
    with elsewhere:
        product = product + 1
    assert set(read_storages(elsewhere, lambda _inside: 0).num_bytes) == {0}
