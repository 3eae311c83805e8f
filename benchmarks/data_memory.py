"""The memory that a large data file takes: `train --dry-run` over a generated JSON Lines file, watched from outside.

    python -m benchmarks.data_memory [--size 2GB] [--base smollm2-135m] [--folder DIR]

Reads the file twice (once to validate it, once to tokenise it), plans, and prints the most anonymous memory (RssAnon of
/proc/PID/status, every 20 ms), the most resident memory, and the seconds; then once more, when the tokens are there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.config.sizes import parse_size_bytes

WATCH_SECONDS = 0.02
MIB = 2**20
UNPACK = "import sys; from qlora_trainer.model.base import resolve_base; resolve_base(sys.argv[1]); print()"


@dataclass(frozen=True, slots=True)
class Watched:
    """A process: its most anonymous and resident bytes, its wall seconds, and its last line."""

    anonymous_bytes: int
    resident_bytes: int
    seconds: float
    last_line: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GB")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, help="where the file and the cache of tokens go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name) / "train.jsonl"
        num_rows = write_rows(path, parse_size_bytes(arguments.size))
        print(f"{path.stat().st_size / 1e9:.2f} GB, {num_rows:,} rows")
        cache = Path(name) / "cache"
        watch([sys.executable, "-c", UNPACK, arguments.base], cache=cache)  # a base in a package takes more than data
        print("| | anonymous, MiB | resident, MiB | seconds |")
        print("|---|---:|---:|---:|")
        for what in ("tokenised", "found again"):
            found = watch(dry_run(path, arguments.base), cache=cache)
            mebibytes = f"{found.anonymous_bytes / MIB:.0f} | {found.resident_bytes / MIB:.0f}"
            print(f"| {what} | {mebibytes} | {found.seconds:.0f} |")


def write_rows(path: Path, num_bytes: int) -> int:
    """Questions and answers of 200 to 2,000 random words; returns how many rows there are."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    num_rows = written = 0
    with path.open("w") as file:
        while written < num_bytes:
            answer = " ".join(rng.choices(words, k=rng.randint(20, 300)))
            written += file.write(json.dumps({"prompt": f"Say number {num_rows}.", "completion": answer}) + "\n")
            num_rows += 1
    return num_rows


def dry_run(path: Path, base: str) -> list[str]:
    """The command, for documents of at most 2,048 tokens."""
    options = (f"model.base={base}", f"data.train={path}", "data.seq_len=2048", "memory.budget=4GiB")
    return [
        sys.executable,
        "-m",
        "qlora_trainer.cli",
        "train",
        "--dry-run",
        *(part for o in options for part in ("--set", o)),
    ]


def watch(command: list[str], *, cache: Path) -> Watched:
    """Runs it to its end with an own cache."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        anonymous = resident = 0
        while process.poll() is None:
            found = _status_bytes(status)
            anonymous = max(anonymous, found.get("RssAnon", 0))
            resident = max(resident, found.get("VmHWM", 0))
            time.sleep(WATCH_SECONDS)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    return Watched(anonymous, resident, time.perf_counter() - start, lines[-1])


def _status_bytes(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # it ended
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


if __name__ == "__main__":
    main()
