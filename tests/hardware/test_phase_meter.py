"""What the meter counts is what was allocated, phase by phase."""

from __future__ import annotations

import pytest
import torch

from qlora_trainer.hardware.phase_meter import PhaseMeter

MIB = 2**20


def test_each_phase_has_the_most_that_was_alive_in_it() -> None:
    meter = PhaseMeter(torch.device("cpu"))
    before = torch.zeros(MIB, dtype=torch.uint8)  # is not counted: it was there
    meter.start("first")
    kept = torch.zeros(3 * MIB, dtype=torch.uint8)
    meter.mark("second")
    dropped = torch.zeros(5 * MIB, dtype=torch.uint8)
    del dropped
    meter.mark("third")
    meter.mark("second")  # goes on: the larger of both counts
    other = torch.zeros(MIB, dtype=torch.uint8)
    meter.stop()
    del before, other
    assert kept.numel() == 3 * MIB
    assert meter.peaks == {"first": 3 * MIB, "second": 8 * MIB, "third": 3 * MIB}


def test_marks_of_backward_count() -> None:
    leaf = torch.zeros(MIB, dtype=torch.uint8).float().requires_grad_()
    meter = PhaseMeter(torch.device("cpu"))
    meter.start("forward")
    loss = (leaf * 2.0).sum()
    leaf.register_hook(lambda _: meter.mark("backward"))
    loss.backward()
    meter.stop()
    assert list(meter.peaks) == ["forward", "backward"]
    assert meter.peaks["backward"] >= 4 * MIB


def test_on_cuda_the_allocator_is_asked_where_a_phase_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"live": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: counted["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: counted.update(peak=counted["live"]))
    meter = PhaseMeter(torch.device("cuda", 0))

    meter.start("load")  # what was before is forgotten
    counted |= {"live": 300, "peak": 400}
    meter.mark("step")
    counted |= {"live": 200, "peak": 700}
    meter.mark("load")
    meter.stop()

    assert meter.peaks == {"load": 400, "step": 700}
