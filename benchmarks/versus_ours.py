"""One run of ours for `versus_trl.py`, in a process of its own.

    python -m benchmarks.versus_ours SPEC.json RESULT.json

SPEC is a list of overrides of the config. Nothing is evaluated and nothing saved before the last step, so that the time
from `Prepared` to the last `StepDone` is what TRL's callbacks see between the beginning of training and its last step.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.plan_accuracy_run import status_bytes


def run(overrides: list[str], result: Path) -> None:
    """Train, and write what it took."""
    import bitsandbytes  # noqa: F401 -- as in versus_peer.py

    from qlora_trainer.config.load import load_config
    from qlora_trainer.errors import QloraTrainerError
    from qlora_trainer.run.loop import train
    from qlora_trainer.run.records import Finished, PlanRevised, Prepared, Preparing, StepDone

    told: dict[str, Any] = {"import_bytes": status_bytes()["resident"], "num_revisions": 0}
    start = time.perf_counter()
    marks: list[float] = []
    steps: list[StepDone] = []
    try:
        for record in train(load_config(None, overrides), resume=None):
            match record:
                case Preparing() if record.what.startswith("rehearsing"):
                    told["rehearsal_begins_seconds"] = time.perf_counter() - start
                case PlanRevised():
                    told["num_revisions"] += 1
                case Prepared():
                    marks.append(time.perf_counter())
                    told["prepared_seconds"] = marks[0] - start
                    told["num_train_documents"] = record.num_train_documents
                    told["compute_dtype"] = record.compute_dtype
                case StepDone():
                    marks.append(time.perf_counter())
                    steps.append(record)
                case Finished():
                    told["process_peak_bytes"] = record.summary.process_peak_bytes
    except QloraTrainerError as error:
        told["error"] = str(error)
        told["exit_code"] = error.exit_code
    else:
        told["seconds_of_steps"] = [later - earlier for earlier, later in itertools.pairwise(marks)]
        told["tokens_of_steps"] = [step.tokens for step in steps]
        told["num_tokens"] = sum(step.tokens for step in steps)
        told["losses"] = [step.loss for step in steps]
        # Preparing sets the kernel's mark back; what it took until then is in the summary.
        told["training_peak_bytes"] = status_bytes()["peak"]
        told["peak_bytes"] = max(told["training_peak_bytes"], told["process_peak_bytes"])
        told["is_done"] = True
    result.write_text(json.dumps(told))


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    run(json.loads(spec_path.read_text()), result)


if __name__ == "__main__":
    main()
