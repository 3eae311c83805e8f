"""Wall time of saving SmolLM2-135M's rank-16 adapters with a 32-bit optimizer's state, fsyncs and the disk included.

    python -m benchmarks.save_seconds [--saves 15] [--folder DIR]

The parts by CPU time and by waiting tell a slow disk from a slow program. The folder decides which disk is measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from qlora_trainer.run.checkpoint.save import save_checkpoint
from tests.run.small_run import state_of_rank_16


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the median and the range over the saves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save_seconds")
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where a temporary folder is made; the system's by default")
    options = parser.parse_args(arguments)
    adapter, optimizer = state_of_rank_16()
    wall_seconds, cpu_seconds, num_bytes = [], [], 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for step in range(1, options.saves + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            saved = save_checkpoint(
                Path(folder),
                step=step,
                adapter=adapter,
                optimizer=optimizer,
                state={"run_id": "benchmark", "best_step": None},
                fingerprints={},
            )
            wall_seconds.append(time.perf_counter() - wall)
            cpu_seconds.append(time.process_time() - cpu)
            num_bytes = saved.num_bytes
    print(f"{options.saves} saves of {num_bytes:,} bytes: ", end="")
    print(f"wall {median(wall_seconds):.3f} s ({min(wall_seconds):.3f} to {max(wall_seconds):.3f}), ", end="")
    print(f"CPU {median(cpu_seconds):.3f} s")


if __name__ == "__main__":
    main()
