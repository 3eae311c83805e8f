"""A card without bf16 (compute capability 7.5, faked): fp16, fp32 adapters and a loss scaler that survives a resume.

The arithmetic is real: the CPU computes in fp16 here, attention by the operations that such a card runs, and the
overflows come of a scale that is too large.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qlora_trainer.errors import DivergedError, StorageError
from qlora_trainer.hardware import causal_attention, device
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.run import attempts
from qlora_trainer.run.checkpoint.load import load_checkpoint, newest_verified
from qlora_trainer.run.records import Prepared, Record, StepDone, StepSkipped
from qlora_trainer.run.resume import restore
from qlora_trainer.step import loss_scaler
from qlora_trainer.step.train_step import accumulate_gradients
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once", "turing")

OPTIONS = (
    "quantization.compute_dtype=auto",
    "training.save_every=1",
    "training.eval_every=6",
    "training.max_steps=8",
    "output.keep_checkpoints=9",
)
# Gradients of the tiny model overflow fp16 from about 2^19 on.
TOO_LARGE = 2.0**22


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "compute_capability", lambda _device: (7, 5))
    monkeypatch.setattr(causal_attention, "_has_cpu_kernel", lambda _q: False)


def skipped_of(records: list[Record]) -> list[StepSkipped]:
    return [record for record in records if isinstance(record, StepSkipped)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_overflows_are_recorded_and_are_no_divergence(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: overflows counted as the steps of a run that diverges, which ends it after three."""
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", TOO_LARGE)
    config = tiny_config(tmp_path, base, *OPTIONS)
    records = run_to_end(config)
    (prepared,) = [record for record in records if isinstance(record, Prepared)]
    assert prepared.compute_dtype == "float16"
    run = tmp_path / "run"
    asked = yaml.safe_load((run / "config.yaml").read_text())
    assert (asked["quantization"]["compute_dtype"], asked["lora"]["dtype"]) == ("float16", "float32")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}

    skipped = skipped_of(records)
    assert len(skipped) > attempts.MAX_SKIPPED_IN_A_ROW
    assert [record.step for record in skipped[:4]] == [1, 2, 3, 4]  # more in a row than a run that diverges may have
    assert all(record.is_overflow and record.num_in_a_row == 0 and math.isfinite(record.loss) for record in skipped)
    assert [line["is_overflow"] for line in lines_of(run / "skipped.jsonl")] == [True] * len(skipped)
    done = [record for record in records if isinstance(record, StepDone)]
    assert [record.loss_scale for record in done] == [line["loss_scale"] for line in lines_of(run / "metrics.jsonl")]
    scales = [TOO_LARGE]
    for record in done:
        scales.append(scales[-1] / 2 if record.step in {bad.step for bad in skipped} else scales[-1])
    assert [record.loss_scale for record in done] == scales[:-1]
    assert done[-1].loss < done[0].loss
    before, after = (load_checkpoint(run / "checkpoints" / f"step-{step:08d}") for step in (1, 4))
    for name, tensor in before.optimizer.items():
        assert torch.equal(tensor, after.optimizer[name]), name
    assert after.state["loss_scaler"] == {"scale": TOO_LARGE / 2**4, "num_good_steps": 0}


def test_a_resume_goes_on_with_the_scale_to_the_bit(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut where the scale has been halved, and where it goes up and down. Mutation tried: the scaler not restored."""
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", TOO_LARGE)
    monkeypatch.setattr(loss_scaler, "GROWTH_INTERVAL", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    records = run_to_end(tiny_config(whole, base, *OPTIONS))
    scales = [record.loss_scale for record in records if isinstance(record, StepDone)]
    assert any(after > before for before, after in pairwise(scales))  # type: ignore[operator]
    config = tiny_config(stopped, base, *OPTIONS)
    run_until_step(config, 3)
    run_until_step(config, 7, resume="auto")
    run_to_end(config, resume="auto")
    assert course(stopped / "run") == course(whole / "run")
    assert (stopped / "run" / "skipped.jsonl").read_text() == (whole / "run" / "skipped.jsonl").read_text()


def test_gradients_that_no_scale_cures_are_a_divergence(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An infinity in each step: an overflow while the scale can be halved, and at 1 what it is elsewhere."""
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", 4.0)

    def poisoned(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = accumulate_gradients(model, *args, **kwargs)
        gradient = next(iter(trainable_parameters(model).values())).grad
        assert gradient is not None
        gradient.view(-1)[3] = math.inf
        return loss

    monkeypatch.setattr(attempts, "accumulate_gradients", poisoned)
    config = tiny_config(tmp_path, base, *OPTIONS)
    assert train_command(config) == DivergedError.exit_code
    assert complaint(capsys).startswith("qlora-trainer: error: step 5: found loss")
    lines = lines_of(tmp_path / "run" / "skipped.jsonl")
    assert [line["is_overflow"] for line in lines] == [True, True, False, False, False]


def test_a_checkpoint_without_the_scaler_is_refused(tmp_path: Path, base: Path) -> None:
    config = tiny_config(tmp_path, base, *OPTIONS)
    run_until_step(config, 2)
    loaded = newest_verified(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    del loaded.state["loss_scaler"]

    class AnyOptimizer:
        def load_state_dict(self, _state: object) -> None:
            """Takes all."""

    with pytest.raises(StorageError, match="loss scaler of another run"):
        restore(loaded, AnyOptimizer(), loss_scaler.LossScaler(torch.device("cpu")))  # type: ignore[arg-type]
