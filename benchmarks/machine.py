"""What a measurement was made with: the CPU, its threads, and the versions that its numbers depend on. No torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from pathlib import Path

PACKAGES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


def cpu_model() -> str:
    """As the kernel names it, with its number."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name, number = fields.get("model name", "unknown"), fields.get("model")
    return name if number is None else f"{name}, model {number}"


def describe() -> dict[str, object]:
    """JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def describe_in_words() -> str:
    """One line of Markdown."""
    told = describe()
    threads, versions = told["threads"], told["versions"]
    assert isinstance(threads, dict)
    assert isinstance(versions, dict)
    variables = ", ".join(f"{name}={value}" for name, value in threads.items())
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{told['date']}, {told['cores']} cores of {told['cpu']}{f' ({variables})' * bool(variables)}; {packages}."
