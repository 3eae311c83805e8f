"""Tiny runs of a self test: bytes as planned, gradients as without the lever; and both checks can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.price import PHASES
from qlora_trainer.run.self_test import levers, measured
from qlora_trainer.run.self_test.levers import BASELINE, Lever, LeverRun, judged_bytes, judged_gradients
from qlora_trainer.run.self_test.levers import lever_checks as checks_of
from qlora_trainer.run.self_test.measured import Measured
from qlora_trainer.run.self_test.tiny_base import sizes_for

CPU = torch.device("cpu")
GRADIENT = torch.linspace(-1.0, 1.0, 1000)
RUN = Measured({"forward": (100_000, 100_000), "eval": (50_000, 50_000)}, GRADIENT, GRADIENT, 0.0, "float32")
EXACT, UPDATED, REORDERED = (Lever(what, (), reorders=what) for what in ("nothing", "update", "gradient"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "predicted, verdict", [(100_000, "ok"), (101_900, "ok"), (98_100, "ok"), (102_100, "failed"), (97_900, "failed")]
)
def test_a_phase_that_took_something_else_is_seen(predicted: int, verdict: str) -> None:
    found = judged_bytes("x", replace(RUN, phases={**RUN.phases, "forward": (predicted, 100_000)}))
    assert found.verdict == verdict


@pytest.mark.parametrize("lever, error, verdict", [
    (EXACT, 0.0, "ok"),
    (EXACT, 1e-7, "failed"),
    (UPDATED, 5e-6, "ok"),
    (UPDATED, 2e-5, "failed"),
    (REORDERED, 5e-6, "ok"),
    (REORDERED, 2e-5, "failed"),
    (REORDERED, float("nan"), "failed"),
    (EXACT, float("nan"), "failed"),
])  # fmt: skip
def test_gradients_that_differ_are_seen(lever: Lever, error: float, verdict: str) -> None:
    other = GRADIENT * (1.0 + error)
    found = replace(RUN, gradient_of_same=other) if lever is REORDERED else replace(RUN, gradient=other)
    assert judged_gradients(lever, found, RUN).verdict == verdict


def test_a_device_whose_sums_have_no_order_is_compared_with_itself() -> None:
    noisy = replace(RUN, noise=1e-4)
    assert judged_gradients(EXACT, replace(RUN, gradient=GRADIENT * (1.0 + 3e-4)), noisy).verdict == "ok"
    assert judged_gradients(EXACT, replace(RUN, gradient=GRADIENT * (1.0 + 5e-4)), noisy).verdict == "failed"


@pytest.mark.usefixtures("plans_made_once")
def test_a_tiny_run_is_as_planned_and_faults_in_it_are_seen(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, five seconds each: as it is, then with 3 MiB too much in a step and a gradient that is another."""
    monkeypatch.setattr(levers, "LEVERS", ())
    runs: list[LeverRun] = []
    good: list[Measured] = []

    def remembered(config: RunConfig, device: torch.device) -> Measured:
        good.append(measured.measure(config, device))
        return good[-1]

    monkeypatch.setattr(levers, "measure", remembered)

    (check,) = checks_of(CPU, disk_folder, runs)

    assert (check.name, check.verdict) == (f"memory, {BASELINE.name}", "ok"), check
    assert [run.name for run in runs] == [BASELINE.name]
    assert set(runs[0].phases) == {*PHASES, "rehearsal"}

    accumulate = vars(measured)["accumulate_gradients"]
    kept: list[torch.Tensor] = []

    def with_faults(model: Any, *args: Any, **options: Any) -> Any:
        kept.append(torch.zeros(3 * 2**18))
        loss = accumulate(model, *args, **options)
        next(iter(model.linears.values())).adapter.lora_B.grad[0, 0] += 1e-3
        return loss

    monkeypatch.setattr(measured, "accumulate_gradients", with_faults)
    base, rows, sizes = disk_folder / "base", disk_folder / "rows.jsonl", sizes_for(CPU)
    bad = measured.measure(levers.config_of(BASELINE, base, rows, disk_folder / "bad", sizes), CPU)

    assert judged_bytes("x", bad).verdict == "failed"
    assert judged_gradients(EXACT, bad, good[0]).verdict == "failed"
    assert judged_gradients(EXACT, good[0], good[0]).verdict == "ok"
