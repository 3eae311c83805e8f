"""Fifty adapters over SmolLM2-135M take the memory of their weights, and a swap takes no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_fifty_adapters_take_the_memory_of_their_weights() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.adapter_swap"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    assert (found["adapters"], found["linears"]) == (50, 210)
    assert 1.0 <= found["grown_of_adapters"] <= 1.05
    assert found["swap_ms_median"] < 10.0
    assert found["same_logits"]
