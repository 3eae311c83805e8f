"""The peak of this process's resident memory over a call, read from the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

from qlora_trainer.hardware.memory import process_peak_bytes


def peak_growth_bytes(call: Callable[[], object]) -> int:
    """By how much resident memory rose above what it was before, at its peak during `call`."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM back to what is resident now
    before_bytes = psutil.Process().memory_info().rss
    call()
    return process_peak_bytes() - before_bytes
