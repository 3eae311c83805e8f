"""Traces a side's step in a process of its own: the peer's libraries are changed for it, and autograd must meet the
Python-only accelerator before it has run anything.

    python -m benchmarks.step_trace ours|peer < CASES > TOTALS
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from benchmarks.step_totals import Case

Side = Literal["ours", "peer"]
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}


def traced(side: Side, cases: Sequence[Case]) -> Any:
    """In a child process: `{"steps": [{"totals", "breakdown"}, one a case], "modelled": what is no code's own doing}`.

    Raises:
        RuntimeError: the child failed; with what it said last.
    """
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_trace", side],
        input=json.dumps([asdict(case) for case in cases]),
        cwd=Path(__file__).parents[1],
        env=os.environ | _OFFLINE,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(f"the step of {side!r} cannot be traced:\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """In the child: cases come as JSON, totals go as JSON on the last line."""
    from qlora_trainer.hardware.python_accelerator import python_accelerator

    python_accelerator()
    from benchmarks.step_totals import sum_up

    side: Any = importlib.import_module(f"benchmarks.step_{sys.argv[1]}")

    steps = []
    for fields in json.load(sys.stdin):
        totals, breakdown = sum_up(side.trace(Case(**fields)))
        steps.append({"totals": asdict(totals), "breakdown": asdict(breakdown)})
    print(json.dumps({"steps": steps, "modelled": side.MODELLED}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch never joins the engine's thread of a device without a runtime, which ends in an abort
