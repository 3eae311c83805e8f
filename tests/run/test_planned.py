"""A run obeys its plan: it refuses what does not fit, rehearses, and goes on in smaller pieces when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, DoesNotFitError
from qlora_trainer.hardware.memory import resident_bytes
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.run import attempts, loop, planned, prepare
from qlora_trainer.run.dry_run import dry_run
from qlora_trainer.run.folder import open_run_folder
from qlora_trainer.run.records import Planned, PlanRevised, Record, StepDone
from qlora_trainer.run.rehearsal import rehearse
from qlora_trainer.step.optimizer import AdapterOptimizer
from qlora_trainer.step.train_step import accumulate_gradients
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora_trainer"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def losses(records: list[Record]) -> list[float]:
    return [record.loss for record in records if isinstance(record, StepDone)]


def out_of_memory_once(function: Callable[..., Any], *, at_call: int) -> Callable[..., Any]:
    """`function`, which fails as a device does when memory runs out, at its `at_call`-th call."""
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return function(*args, **kwargs)

    return failing


def test_a_budget_that_is_too_small_is_refused_before_anything_is_quantized(
    tmp_path: Path, base: Path, cache_home: Path
) -> None:
    config = tiny_config(tmp_path, base, "memory.budget=10MiB")
    with pytest.raises(DoesNotFitError, match=r"10MiB|0\.01 GiB on cpu, .* GiB too little.*memory\.budget") as caught:
        run_to_end(config)
    assert caught.value.exit_code == 3
    assert not (cache_home / "nf4").exists()
    assert not (tmp_path / "run").exists()


def test_a_pin_that_cannot_fit_is_named(tmp_path: Path, base: Path) -> None:
    pins = ("memory.micro_batch_tokens=640", "training.optimizer=adamw_8bit")
    with pytest.raises(DoesNotFitError) as caught:
        run_to_end(tiny_config(tmp_path, base, "memory.budget=10MiB", *pins))

    assert "the smallest plan with the pinned memory.micro_batch_tokens = 640. " in str(caught.value)


def test_the_plan_is_kept_and_compared_with_what_was_measured(tmp_path: Path, base: Path) -> None:
    records = run_to_end(tiny_config(tmp_path, base, "training.max_steps=2"))
    (made,) = [record for record in records if isinstance(record, Planned)]
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert kept["fits"] is True
    assert kept["knobs"] == made.plan.knobs.as_json()
    assert kept["in_force"]["plan"]["micro_batch_tokens"] == made.plan.knobs.micro_batch_tokens
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["predicted_peak_bytes"] == made.plan.predicted.process_peak_bytes
    assert summary["measured_peak_bytes"] > 0


def test_the_rehearsal_leaves_adapters_and_optimizer_as_they_were(tmp_path: Path, base: Path) -> None:
    for optimizer in ("adamw_32bit", "adamw_8bit"):
        config = tiny_config(tmp_path, base, f"training.optimizer={optimizer}", f"output.dir={tmp_path / optimizer}")
        with open_run_folder(tmp_path / optimizer, resume=False) as folder:
            steps = prepare.prepare(config, folder, resume=None)
            try:
                while True:
                    next(steps)
            except StopIteration as stop:
                session = stop.value
            before = _state(session)
            assert all(bool(torch.isfinite(value).all()) for value in before.values())
            rehearse(
                session.model,
                session.optimizer,
                session.lora,
                session.knobs.plan,
                packing=True,
                max_grad_norm=1.0,
                seed=config.training.seed,
            )
            after = _state(session)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def _state(session: Any) -> dict[str, Tensor]:
    weights = {name: parameter.data.clone() for name, parameter in trainable_parameters(session.model).items()}
    state = {f"optimizer {name}": value.clone() for name, value in session.optimizer.state_dict().items()}
    return weights | state | {"gradient": session.optimizer.gradient.clone()}


def test_out_of_memory_in_a_step_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("memory.micro_batch_tokens=512", "lora.dropout=0.1", "training.max_steps=4")
    expected = losses(run_to_end(tiny_config(tmp_path, base, *options)))
    monkeypatch.setattr(attempts, "accumulate_gradients", out_of_memory_once(accumulate_gradients, at_call=3))
    config = tiny_config(tmp_path, base, *options, f"output.dir={tmp_path / 'again'}")
    records = run_to_end(config)
    (revised,) = [record for record in records if isinstance(record, PlanRevised)]
    assert (revised.step, revised.micro_batch_tokens_before, revised.micro_batch_tokens) == (3, 512, 256)
    assert losses(records) == pytest.approx(expected, rel=1e-5)
    kept = json.loads((tmp_path / "again" / "plan.json").read_text())
    assert kept["in_force"]["plan"]["micro_batch_tokens"] == 256
    assert kept["knobs"]["micro_batch_tokens"] == 512


def test_out_of_memory_with_one_document_gives_up_with_the_plan_in_the_message(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes")

    monkeypatch.setattr(attempts, "accumulate_gradients", failing)
    with pytest.raises(DoesNotFitError, match="step 1: found no memory left for a micro-batch") as caught:
        run_to_end(tiny_config(tmp_path, base))
    told = str(caught.value)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["predicted"]
    process_bytes = plan["process_peak_bytes"] - plan["allocated_peak_bytes"]
    assert f"(in MiB: program and libraries {process_bytes / 2**20:,.2f}, " in told
    for name, num_bytes in plan["breakdown"].items():
        assert num_bytes == 0 or f"{name.replace('_', ' ')} {num_bytes / 2**20:,.2f}" in told


def test_out_of_memory_in_the_update_is_not_retried(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = 2  # the plan's dry run and the rehearsal
    monkeypatch.setattr(AdapterOptimizer, "update", out_of_memory_once(AdapterOptimizer.update, at_call=before + 2))
    with pytest.raises(DoesNotFitError, match=r"the optimizer's update of step 2: .* half updated"):
        run_to_end(tiny_config(tmp_path, base))


def test_an_error_that_is_no_lack_of_memory_is_not_retried(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(attempts, "accumulate_gradients", failing)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_to_end(tiny_config(tmp_path, base))


def test_out_of_memory_in_the_rehearsal_revises_the_plan(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "rehearse", out_of_memory_once(rehearse, at_call=1))
    records = run_to_end(tiny_config(tmp_path, base, "memory.micro_batch_tokens=512", "training.max_steps=1"))
    (revised,) = [record for record in records if isinstance(record, PlanRevised)]
    assert (revised.step, revised.micro_batch_tokens) == (0, 256)


def test_the_budget_does_not_change_what_is_learned(tmp_path: Path, base: Path) -> None:
    """The same run in the least that fits, in twice and in four times as much."""
    options = ("lora.dropout=0.1", "training.max_steps=4")
    least = resident_bytes() + 300 * 2**20
    found, cuts = [], []
    for factor in (1, 2, 4):
        folder = tmp_path / f"x{factor}"
        tokens = () if factor > 1 else ("memory.micro_batch_tokens=64",)
        config = tiny_config(
            tmp_path, base, *options, *tokens, f"memory.budget={factor * least}B", f"output.dir={folder}"
        )
        found.append(losses(run_to_end(config)))
        cuts.append(json.loads((folder / "plan.json").read_text())["knobs"]["micro_batch_tokens"])
    assert cuts[0] < cuts[2]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_another_budget_at_a_resume_cuts_otherwise_and_learns_the_same(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: without memory.budget in `PLANNED_KEYS` the resumed run keeps its micro-batches."""
    process_bytes = resident_bytes()
    monkeypatch.setattr(planned, "_process_bytes", lambda: process_bytes)  # it grows by more than a tiny run takes
    options = ("lora.dropout=0.1", "training.max_steps=4", "training.optimizer=adamw_8bit")

    def config(budget_bytes: int, name: str) -> RunConfig:
        budget = f"memory.budget={budget_bytes}B"
        return tiny_config(tmp_path, base, *options, budget, f"output.dir={tmp_path / name}")

    ample_bytes = process_bytes + 2**30
    whole = run_to_end(config(ample_bytes, "whole"))
    (ample,) = [record.plan for record in whole if isinstance(record, Planned)]
    short_bytes = ample.predicted.process_peak_bytes - ample.predicted.allocated_peak_bytes * 2 // 3
    run_until_step(config(short_bytes, "part"), 3)
    short = json.loads((tmp_path / "part" / "plan.json").read_text())["in_force"]["plan"]
    resumed = run_to_end(config(ample_bytes, "part"), resume="auto")
    (anew,) = [record.plan for record in resumed if isinstance(record, Planned)]
    assert short["micro_batch_tokens"] < anew.knobs.micro_batch_tokens == ample.knobs.micro_batch_tokens
    assert losses(resumed) == pytest.approx(losses(whole)[2:], rel=1e-5)


def test_other_micro_batches_at_a_resume_need_the_flag_and_change_nothing(tmp_path: Path, base: Path) -> None:
    options = ("lora.dropout=0.1", "training.max_steps=4", "training.optimizer=auto")
    whole = tiny_config(tmp_path, base, *options, "memory.micro_batch_tokens=96", f"output.dir={tmp_path / 'whole'}")
    expected = losses(run_to_end(whole))
    run_until_step(tiny_config(tmp_path, base, *options, "memory.micro_batch_tokens=96"), 3)
    other = tiny_config(tmp_path, base, *options, "memory.micro_batch_tokens=256")
    with pytest.raises(ConfigError, match=r"found 256; expected 96, .*--allow-change memory\.micro_batch_tokens"):
        run_to_end(other, resume="auto")
    records = list(loop.train(other, resume="auto", allow_change=["memory.micro_batch_tokens"]))
    (made,) = [record for record in records if isinstance(record, Planned)]
    assert made.plan.knobs.micro_batch_tokens == 256
    assert losses(records) == pytest.approx(expected[2:], rel=1e-5)


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, base: Path, cache_home: Path) -> None:
    told = list(dry_run(tiny_config(tmp_path, base)))
    plan: Any = told[-1]
    assert plan.fits
    assert plan.knobs.seq_len > 0
    assert "48 documents" in str(told[1])
    assert not (tmp_path / "run").exists()
    assert not (cache_home / "nf4").exists()
