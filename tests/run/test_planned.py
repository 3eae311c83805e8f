"""A run obeys its plan: it refuses what does not fit, rehearses, and goes on in smaller pieces when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, DoesNotFitError
from qlora_trainer.hardware.device_memory import cpu_memory
from qlora_trainer.hardware.memory import resident_bytes
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.planning import make_plan as planning
from qlora_trainer.planning.budget import gpu_budget
from qlora_trainer.planning.plan import Plan
from qlora_trainer.report.reading import watched
from qlora_trainer.report.screen import stderr_console
from qlora_trainer.run import attempts, knobs, loop, plan_command, prepare
from qlora_trainer.run import planned as plans
from qlora_trainer.run.dry_run import dry_run
from qlora_trainer.run.folder import open_run_folder
from qlora_trainer.run.knobs import MachineKnobs
from qlora_trainer.run.planned import halved
from qlora_trainer.run.records import Planned, PlanRevised, Record, StepDone
from qlora_trainer.run.rehearsal import rehearse
from qlora_trainer.step.optimizer import AdapterOptimizer
from qlora_trainer.step.train_step import accumulate_gradients
from tests.report.made_plan import KNOBS as PLAN_KNOBS
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config


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


def test_a_gpu_is_capped_at_what_the_plan_counts_with(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no budget was asked for: then it is what is free. Faked up to the cap, which comes before all else."""

    class Capped(Exception):
        pass

    def cap(device: torch.device, budget_bytes: int) -> None:
        raise Capped(device.type, budget_bytes)

    free = replace(gpu_budget("rtx-4060", None), budget_bytes=5 * 2**30)
    monkeypatch.setattr(prepare, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(
        prepare,
        "decide_machine_knobs",
        lambda *_: MachineKnobs(compute_dtype="float32", adapter_dtype="bfloat16", num_threads=1),
    )
    monkeypatch.setattr(
        plans, "machine_budget", lambda asked, host, dtype: replace(free, budget_bytes=asked or 5 * 2**30)
    )
    monkeypatch.setattr(prepare, "cap_device_memory", cap)
    for budget, expected in (("auto", 5 * 2**30), ("3GiB", 3 * 2**30)):
        config = tiny_config(tmp_path, base, f"memory.budget={budget}", f"output.dir={tmp_path / budget}")
        with open_run_folder(tmp_path / budget, resume=False) as folder, pytest.raises(Capped) as caught:
            list(prepare.prepare(config, folder, resume=None))
        assert caught.value.args == ("cuda", expected)


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


@pytest.mark.parametrize("optimizer", ["adamw_32bit", "adamw_8bit"])
def test_the_rehearsal_leaves_adapters_and_optimizer_as_they_were(
    optimizer: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first rehearsal of a run: byte for byte, and the moments did move in between."""
    seen: list[dict[str, Tensor]] = []

    def watched(model: Any, adapter_optimizer: AdapterOptimizer, *args: Any, **options: Any) -> None:
        def updated(*given: Any) -> None:
            update(*given)
            seen.append(_state(model, adapter_optimizer))

        update = AdapterOptimizer.update
        seen.append(_state(model, adapter_optimizer))
        with monkeypatch.context() as patch:
            patch.setattr(AdapterOptimizer, "update", updated)
            rehearse(model, adapter_optimizer, *args, **options)
        seen.append(_state(model, adapter_optimizer))

    monkeypatch.setattr(prepare, "rehearse", watched)
    config = tiny_config(tmp_path, base, f"training.optimizer={optimizer}")
    with open_run_folder(tmp_path / "run", resume=False) as folder:
        list(prepare.prepare(config, folder, resume=None))
    before, during, after = seen
    assert all(bool(torch.isfinite(value).all()) for value in before.values())
    assert before.keys() == during.keys() == after.keys()
    assert any(not torch.equal(before[name], during[name]) for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def _state(model: Any, optimizer: Any) -> dict[str, Tensor]:
    weights = {name: parameter.data.clone() for name, parameter in trainable_parameters(model).items()}
    state = {f"optimizer {name}": value.clone() for name, value in optimizer.state_dict().items()}
    return weights | state | {"gradient": optimizer.gradient.clone()}


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


def test_out_of_memory_after_a_resume_keeps_the_prediction(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, base, "memory.micro_batch_tokens=512", "training.max_steps=3")
    run_until_step(config, 3)
    before = json.loads((tmp_path / "run" / "plan.json").read_text())
    monkeypatch.setattr(attempts, "accumulate_gradients", out_of_memory_once(accumulate_gradients, at_call=1))
    assert any(isinstance(record, PlanRevised) for record in run_to_end(config, resume="auto"))
    after = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert after["in_force"]["plan"]["micro_batch_tokens"] == 256
    assert {**after, "in_force": None} == {**before, "in_force": None}


def test_out_of_memory_with_one_document_gives_up_with_the_plan_in_the_message(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes")

    monkeypatch.setattr(attempts, "accumulate_gradients", failing)
    with pytest.raises(DoesNotFitError, match="step 1: found no memory left, in micro-batches of") as caught:
        run_to_end(tiny_config(tmp_path, base))
    told = str(caught.value)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["predicted"]
    process_bytes = plan["process_peak_bytes"] - plan["allocated_peak_bytes"]
    assert f"(in MiB: program and libraries {process_bytes / 2**20:,.2f}, " in told
    for name, num_bytes in plan["breakdown"].items():
        assert num_bytes == 0 or f"{name.replace('_', ' ')} {num_bytes / 2**20:,.2f}" in told


def test_out_of_memory_in_the_update_is_tried_again_also_at_one_document(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: given up where the micro-batch cannot be halved."""
    (tmp_path / "whole").mkdir()
    one_document = ("data.seq_len=64", "memory.micro_batch_tokens=64")
    run_to_end(tiny_config(tmp_path / "whole", base, *one_document))
    before = 2  # the plan's dry run and the rehearsal
    monkeypatch.setattr(AdapterOptimizer, "update", out_of_memory_once(AdapterOptimizer.update, at_call=before + 2))
    records = run_to_end(tiny_config(tmp_path, base, *one_document))
    assert not any(isinstance(record, PlanRevised) for record in records)
    assert course(tmp_path / "run") == course(tmp_path / "whole" / "run")


def test_a_micro_batch_is_halved_to_a_document_of_full_length_at_least() -> None:
    """The step at hand may have short documents only. Mutation tried: halved to the longest of those."""
    knobs = replace(PLAN_KNOBS, seq_len=448, micro_batch_tokens=512)
    assert (smaller := halved(knobs, 16)) is not None
    assert smaller.micro_batch_tokens == 448
    assert halved(smaller, 16) is None


@pytest.mark.parametrize("before, after, num_after", [(2048, 1024, 16), (1536, 1024, 16), (7168, 3584, 6)])
def test_halved_micro_batches_are_counted_by_whole_documents(before: int, after: int, num_after: int) -> None:
    """Of 16 documents of 1,024 tokens. Mutation tried: twice as many as before."""
    assert (smaller := halved(replace(PLAN_KNOBS, micro_batch_tokens=before), 16)) is not None
    assert (smaller.micro_batch_tokens, smaller.micro_batches_per_step) == (after, num_after)


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


@pytest.fixture
def _tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of what the run itself allocates: beside the interpreter's 400 MiB this run's one would be nothing."""
    monkeypatch.setattr(planning, "cpu_memory", lambda _, compiled_bytes: replace(cpu_memory(0), fixed_bytes=0))
    monkeypatch.setattr(prepare, "UNASKED_BYTES", -(2**40))  # the interpreter's pages are not given back for it


@pytest.mark.slow
@pytest.mark.usefixtures("_tensors_alone")
def test_the_budget_does_not_change_what_is_learned(tmp_path: Path, base: Path) -> None:
    """The same run in the least that fits, in twice and in four times as much; then resumed in another budget."""
    options = (
        "lora.dropout=0.1",
        "lora.target_modules=[q_proj, down_proj]",
        "data.eval_fraction=0",
        "training.global_batch_size=4",
        "training.max_steps=3",
        "training.warmup_ratio=0",
    )
    *_, nothing_fits = dry_run(tiny_config(tmp_path, base, *options, "memory.budget=1B"))
    assert isinstance(nothing_fits, Plan)
    least = nothing_fits.budget_bytes + nothing_fits.missing_bytes
    found, decided = [], []
    for factor in (1, 2, 4):
        folder = tmp_path / f"x{factor}"
        config = tiny_config(tmp_path, base, *options, f"memory.budget={factor * least}B", f"output.dir={folder}")
        steps = [record for record in run_to_end(config) if isinstance(record, StepDone)]
        assert all(step.lr > 0 for step in steps)
        found.append([step.loss for step in steps])
        decided.append(json.loads((folder / "plan.json").read_text())["knobs"])
    tokens, kept = ([one[key] for one in decided] for key in ("micro_batch_tokens", "activation_keep_layers"))
    assert tokens[0] < tokens[1]
    assert kept[1] < kept[2]
    assert {one["optimizer"] for one in decided} == {"adamw_32bit"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_a_resume_computes_as_the_run_began(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that would now choose another dtype and another number of threads, which change the sums."""
    config = tiny_config(tmp_path, base, "quantization.compute_dtype=auto", "training.max_steps=3")

    def machine_with(dtype: str, num_threads: int) -> None:
        monkeypatch.setattr(knobs, "choose_compute_dtype", lambda _: dtype)
        monkeypatch.setattr(knobs, "num_cpu_threads", lambda: num_threads)

    machine_with("float32", 2)
    run_until_step(config, 3)
    machine_with("bfloat16", 1)
    (step,) = [record for record in run_to_end(config, resume="auto") if isinstance(record, StepDone)]
    assert step.step == 3
    assert torch.get_num_threads() == 2
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    saved = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    for machine in (kept["in_force"]["machine"], saved["plan"]["machine"]):
        assert machine == {"compute_dtype": "float32", "adapter_dtype": "bfloat16", "num_threads": 2}
    assert "compute_dtype: float32" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_plan_of_the_same_config_is_that_of_the_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is measured for both. Mutation tried: `plan` takes what such a process usually takes."""
    process_bytes = resident_bytes() + 2**26
    for module in (plans, plan_command):
        monkeypatch.setattr(module, "process_bytes", lambda: process_bytes)
    config = tiny_config(tmp_path, base, f"memory.budget={process_bytes + 2**30}B")
    *_, of_run = dry_run(config)
    planned = watched(
        plan_command.plan_on(config, gpu=None, vram_bytes=None, ram_bytes=None, with_data=True), stderr_console()
    )[0]
    assert isinstance(of_run, Plan)
    assert planned.predicted == of_run.predicted
    assert planned.predicted.process_peak_bytes >= process_bytes + planned.predicted.allocated_peak_bytes


def test_another_budget_at_a_resume_cuts_otherwise_and_learns_the_same(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: without memory.budget in `PLANNED_KEYS` the resumed run keeps its micro-batches."""
    process_bytes = resident_bytes()
    monkeypatch.setattr(plans, "process_bytes", lambda: process_bytes)  # it grows by more than a tiny run takes
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
    assert "60 rows of the form messages" in str(told[1])
    assert "48 documents" in str(told[2])
    assert not (tmp_path / "run").exists()
    assert not (cache_home / "nf4").exists()
