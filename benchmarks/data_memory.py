"""The memory that a large data file takes: `train --dry-run` over a generated JSON Lines file, watched from outside.

    python -m benchmarks.data_memory [--size 2GB] [--base smollm2-135m] [--folder DIR]

Checks the file twice (before torch is imported, and when accepted rows are written down), tokenises what was accepted,
plans, and prints the most anonymous memory (RssAnon of /proc/PID/status, every 20 ms), the most resident memory
(VmRSS: pages that two processes share count twice), and the seconds; then once more, when the tokens are there. Both
are sums over the command and the process that it has the tokens made by; its own are beside them.
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

import psutil

from qlora_trainer.config.sizes import parse_size_bytes

WATCH_SECONDS = 0.02
MIB = 2**20
UNPACK = "import sys; from qlora_trainer.model.base import resolve_base; resolve_base(sys.argv[1]); print()"


@dataclass(frozen=True, slots=True)
class Watched:
    """A command: the most anonymous and resident bytes of it and its children, those of it alone, and wall seconds."""

    anonymous_bytes: int
    resident_bytes: int
    own_anonymous_bytes: int
    own_resident_bytes: int
    seconds: float


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
        print("| | anonymous, MiB | resident, MiB | of the command: anonymous | resident | seconds |")
        print("|---|---:|---:|---:|---:|---:|")
        for what in ("tokenised", "found again"):
            found = watch(dry_run(path, arguments.base), cache=cache)
            sums = (found.anonymous_bytes, found.resident_bytes, found.own_anonymous_bytes, found.own_resident_bytes)
            mebibytes = " | ".join(f"{num_bytes / MIB:.0f}" for num_bytes in sums)
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
    most = [0, 0, 0, 0]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            own = _memory_of(process.pid)
            others = [_memory_of(child) for child in _children_of(process.pid)]
            sums = [sum(numbers) for numbers in zip(own, *others, strict=True)]
            most = [max(pair) for pair in zip(most, (*sums, *own), strict=True)]
            time.sleep(WATCH_SECONDS)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    anonymous, resident, own_anonymous, own_resident = most
    seconds = time.perf_counter() - start
    return Watched(anonymous, resident, own_anonymous, own_resident, seconds)


def _children_of(process: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:  # it ended
        return []


def _memory_of(process: int) -> tuple[int, int]:
    """RssAnon and VmRSS, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it ended
        return 0, 0
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon", "VmRSS")))
    found = {name: int(value.split()[0]) * 1024 for name, value in pairs}
    return found.get("RssAnon", 0), found.get("VmRSS", 0)


if __name__ == "__main__":
    main()
