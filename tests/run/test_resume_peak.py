"""A run that fits fits after a resume too: it never has more allocated than one that nobody disturbed."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.hardware.profiled_memory import allocated_by
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config

pytestmark = pytest.mark.usefixtures("plans_made_once")


def test_a_resumed_run_allocates_no_more_than_an_uninterrupted_one(tmp_path: Path, base: Path) -> None:
    """Counted by torch's profiler, mapped files included. The optimizer's state is large, as is that of a real run.

    Mutation tried: `_saved_before` that does not let go of the checkpoint's tensors.
    """
    options = ("lora.rank=16", "lora.dtype=float32", "training.optimizer=adamw_32bit", "memory.micro_batch_tokens=256")
    resumed = tiny_config(tmp_path, base, *options)
    run_until_step(resumed, 5)  # it also makes the plan and the NF4 cache, which are then counted in neither
    whole = tiny_config(tmp_path, base, *options, f"output.dir={tmp_path / 'whole'}")
    gc.collect()
    whole_bytes = allocated_by(lambda: run_to_end(whole)).peak_bytes
    gc.collect()
    resumed_bytes = allocated_by(lambda: run_to_end(resumed, resume="auto")).peak_bytes
    assert whole_bytes > 0
    assert resumed_bytes <= 1.01 * whole_bytes
