"""A run with the levers of a plan pulled learns what one without them learns, to the bit, and may go on with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.run.records import StepDone
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config

pytestmark = pytest.mark.usefixtures("plans_made_once")

PULLED = (
    "memory.activation_checkpointing=true",
    "memory.activation_offload=true",
    "memory.base_residency=streamed",
)


def losses(config: RunConfig, **options: Any) -> list[float]:
    return [record.loss for record in run_to_end(config, **options) if isinstance(record, StepDone)]


def knobs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text())["knobs"]
    return found


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_levers_change_no_bit_of_what_is_learned(disk_folder: Path, base: Path) -> None:
    plain = tiny_config(disk_folder, base, f"output.dir={disk_folder / 'plain'}")
    pulled = tiny_config(disk_folder, base, f"output.dir={disk_folder / 'pulled'}", *PULLED)
    assert losses(pulled) == losses(plain)
    assert adapter(disk_folder / "pulled") == adapter(disk_folder / "plain")
    found = knobs(disk_folder / "pulled")
    assert (found["activation_offload_layers"], found["activation_recompute_layers"]) == (2, 0)
    assert found["base_residency"] == "streamed"
    off = knobs(disk_folder / "plain")
    assert (off["activation_offload_layers"], off["base_residency"]) == (0, "device")


def test_a_resume_may_pull_others(disk_folder: Path, base: Path) -> None:
    """Where something lives in the meantime is no part of what a state is the state of."""
    plain = tiny_config(disk_folder, base, f"output.dir={disk_folder / 'plain'}")
    expected = losses(plain)
    folder = f"output.dir={disk_folder / 'changed'}"
    run_until_step(tiny_config(disk_folder, base, folder, *PULLED), 4)
    changed = tiny_config(disk_folder, base, folder, PULLED[0], "memory.activation_offload=1")
    found = losses(changed, resume="auto")
    assert 0 < len(found) < len(expected)
    assert found == expected[-len(found) :]
    assert adapter(disk_folder / "changed") == adapter(disk_folder / "plain")
