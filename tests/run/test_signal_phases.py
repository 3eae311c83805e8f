"""A signal in every phase of a run: the step is finished, everything saved, exit code 75, and nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.run import attempts, loop, prepare
from qlora_trainer.run.checkpoint.load import newest_verified
from qlora_trainer.run.checkpoint.storage import LocalStorage
from qlora_trainer.step.optimizer import AdapterOptimizer
from tests.run.faulty_storage import Crash
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

OPTIONS = ("memory.micro_batch_tokens=96", "training.max_steps=4", "training.eval_every=2")


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        run_to_end(tiny_config(folder, base, *OPTIONS))
    return course(folder / "run")


def signalling(function: Callable[..., Any], number: signal.Signals, *, at_call: int) -> Callable[..., Any]:
    """`function`, during whose `at_call`-th call the signal comes."""
    calls = 0

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            signal.raise_signal(number)
        return function(*args, **kwargs)

    return with_signal


@pytest.mark.parametrize(
    "where, name, at_call, number, step",
    [
        (prepare, "read_inputs", 1, signal.SIGTERM, 0),  # while tokenising
        (prepare, "load_quantized", 1, signal.SIGINT, 0),
        (attempts, "make_micro_batch", 4 + 3 + 2, signal.SIGTERM, 2),  # in the middle of an accumulation
        (AdapterOptimizer, "update", 2 + 3, signal.SIGINT, 3),  # after the plan's dry run and the rehearsal
        (attempts, "evaluate", 2, signal.SIGTERM, 2),
        (loop, "save_checkpoint", 1, signal.SIGINT, 2),
    ],
    ids=["tokenising", "loading", "accumulating", "updating", "evaluating", "saving"],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_there_had_been_none(
    where: Any,
    name: str,
    at_call: int,
    number: signal.Signals,
    step: int,
    tmp_path: Path,
    base: Path,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Mutation tried: without `or interruption.requested` at the save, the step is lost and done twice."""
    config = tiny_config(tmp_path, base, *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, signalling(getattr(where, name), number, at_call=at_call))
        assert train_command(config) == 75
    told = complaint(capsys)
    assert f"{number.name} after step" in told
    assert "--resume auto" in told
    loaded = newest_verified(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if loaded.step else []
    assert loaded.step == len(logged)  # no step that was done is done again
    assert f"after step {loaded.step} of 4" in told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert train_command(config, "--resume", "auto") == 0
    assert course(tmp_path / "run") == undisturbed
    assert loaded.step == step


def test_a_second_signal_in_a_save_leaves_the_last_commit(
    tmp_path: Path, base: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a process exits at once then is shown in test_signals; here its exit is a crash, half-way through a file.

    Mutation tried: a second signal that is taken for the first lets the save go on, and nothing crashes.
    """
    codes = []
    working = LocalStorage.write

    def exiting(code: int) -> None:
        codes.append(code)
        raise Crash

    def signalled_twice(storage: LocalStorage, file: FileIO, data: memoryview) -> None:
        if ".tmp-step-00000004/optimizer" in os.fsdecode(file.name):
            working(storage, file, data[: len(data) // 2])
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        working(storage, file, data)

    config = tiny_config(tmp_path, base, *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", signalled_twice)
        patch.setattr(os, "_exit", exiting)
        with pytest.raises(Crash):
            train_command(config)
    assert codes == [128 + signal.SIGTERM]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*step-*")) == [".tmp-step-00000004", "step-00000002"]
    loaded = newest_verified(checkpoints)
    assert loaded is not None
    assert loaded.step == 2
    assert train_command(config, "--resume", "auto") == 0
    assert course(tmp_path / "run") == undisturbed


def test_an_evaluation_that_a_signal_put_off_is_logged_once(
    tmp_path: Path, base: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: `cut_logs` that keeps every evaluation up to the step has the one of step 2 twice."""
    config = tiny_config(tmp_path, base, *OPTIONS, "training.save_every=4")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterOptimizer, "update", signalling(AdapterOptimizer.update, signal.SIGTERM, at_call=4))
        assert train_command(config) == 75
    evaluated = (tmp_path / "run" / "evals.jsonl").read_text()
    assert evaluated.count("\n") == 1  # before the first step; the one of step 2 is put off
    run_until_step(config, 3, resume="auto")
    assert (tmp_path / "run" / "evals.jsonl").read_text().count("\n") == 2
    assert train_command(config, "--resume", "auto") == 0
    assert course(tmp_path / "run")["evals"] == undisturbed["evals"]
