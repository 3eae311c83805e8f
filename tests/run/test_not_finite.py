"""A loss or gradient that is not finite: the update is skipped, the rows are logged, and after a few the run stops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.run import attempts
from qlora_trainer.run.checkpoint.load import load_checkpoint, newest_verified
from qlora_trainer.run.records import StepDone, StepSkipped
from qlora_trainer.step.train_step import accumulate_gradients
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once")

OPTIONS = (
    "training.save_every=1",
    "training.eval_every=6",
    "output.keep_checkpoints=9",
)


def poisoned(kind: str, *, at_steps: tuple[int, ...], first_step: int = 1) -> Callable[..., Tensor]:
    """`accumulate_gradients` whose loss is NaN, or whose gradients hold an infinity, at some steps."""
    step = first_step - 1

    def accumulate(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal step
        step += 1
        loss = accumulate_gradients(model, *args, **kwargs)
        if step not in at_steps:
            return loss
        if kind == "loss":
            return loss * math.nan
        gradient = next(iter(trainable_parameters(model).values())).grad
        assert gradient is not None
        gradient.view(-1)[3] = -math.inf
        return loss

    return accumulate


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_names_its_rows(
    kind: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: with the update made all the same, step 3 is refused at its save: weights are NaN."""
    monkeypatch.setattr(attempts, "accumulate_gradients", poisoned(kind, at_steps=(3,)))
    records = run_to_end(tiny_config(tmp_path, base, *OPTIONS))
    (skipped,) = [record for record in records if isinstance(record, StepSkipped)]
    assert skipped.step == 3
    assert len(skipped.rows) == 8
    run = tmp_path / "run"
    (line,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert line["rows"] == list(skipped.rows)
    assert (line["loss"] is None) == (kind == "loss")
    done = [record for record in records if isinstance(record, StepDone)]
    assert [record.step for record in done] == [1, 2, 3, 4, 5, 6]
    assert [record.samples_seen for record in done] == [8, 16, 24, 32, 40, 48]
    before, after = (load_checkpoint(run / "checkpoints" / f"step-{step:08d}") for step in (2, 3))
    for name, tensor in before.optimizer.items():
        assert torch.equal(tensor, after.optimizer[name]), name
    for name, tensor in before.adapter.items():
        assert torch.equal(tensor, after.adapter[name]), name


def test_a_run_that_diverges_stops_with_exit_code_6(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad steps with a good one between them are no divergence; three in a row are."""
    monkeypatch.setattr(attempts, "accumulate_gradients", poisoned("loss", at_steps=(1, 2, 4, 5, 6)))
    assert train_command(tiny_config(tmp_path, base, *OPTIONS)) == 6
    told = complaint(capsys)
    assert told.startswith("qlora-trainer: error: step 6: found loss nan")
    assert "on rows" in told
    loaded = newest_verified(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    assert loaded.step == 5
    assert loaded.state["progress"]["skipped_in_a_row"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in loaded.adapter.values())


def test_a_resume_knows_of_the_steps_that_were_skipped(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two before the crash and one after it are three in a row; and the log tells each once."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    at_steps = (1, 4, 5)
    monkeypatch.setattr(attempts, "accumulate_gradients", poisoned("gradient", at_steps=at_steps))
    run_to_end(tiny_config(whole, base, *OPTIONS))
    config = tiny_config(stopped, base, *OPTIONS, "training.save_every=2")
    monkeypatch.setattr(attempts, "accumulate_gradients", poisoned("gradient", at_steps=at_steps))
    run_until_step(config, 5)
    monkeypatch.setattr(attempts, "accumulate_gradients", poisoned("gradient", at_steps=at_steps, first_step=5))
    assert train_command(config, "--resume", "auto") == 0
    assert "step 5 skipped, no weight was changed" in capsys.readouterr().out
    assert course(stopped / "run") == course(whole / "run")
    assert (stopped / "run" / "skipped.jsonl").read_text() == (whole / "run" / "skipped.jsonl").read_text()
