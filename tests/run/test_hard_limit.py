"""A real run inside a control group whose hard limit is its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hard_limit import (
    IN_FP32,
    SPARE_BYTES,
    between,
    estimate_all,
    run_limited,
    small_run,
    smallest_and_fastest,
)
from tests.hardware.memory_group import can_limit_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # six processes, each with its imports
    pytest.mark.skipif(not can_limit_memory(), reason="this user can make no memory-limited control group"),
]


def test_a_run_lives_within_its_budget_and_uses_it(
    tmp_path: Path, disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides = [*small_run(disk_folder, "phi3", seq_len=512, batch=8), IN_FP32]
    smallest, fastest = smallest_and_fastest(overrides)
    least, most = (plan["predicted"]["process_peak_bytes"] + SPARE_BYTES for plan in (smallest, fastest))

    outcomes = [
        run_limited(overrides, budget, disk_folder / f"run-{budget}")
        for budget in between(least, round(1.05 * most), 4)
    ]

    layouts = estimate_all(overrides)
    assert smallest["fits"] is False
    for outcome in outcomes:
        assert outcome.is_right(layouts), outcome
        assert 0 < outcome.measured_bytes <= outcome.budget_bytes
        assert len(outcome.losses) == 4
        before, after = outcome.eval_losses
        assert after < before  # it has learned: else the losses say nothing of the steps
        assert outcome.losses == pytest.approx(outcomes[0].losses, rel=1e-5)
    assert outcomes[-1].tokens_per_second(layouts) > outcomes[0].tokens_per_second(layouts)
