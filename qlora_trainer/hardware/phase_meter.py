"""The most bytes that were allocated on a device in each phase of something, as the device's own allocator counts.

On CUDA these are torch's statistics, read where one phase ends and the next begins. A CPU's allocator keeps none, but
torch.profiler is told of each allocation and release: their sum is taken afterwards. Neither knows anything of a plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "qlora_trainer phase: "


class PhaseMeter:
    """Counts from `start` to `stop`; everything between two marks belongs to the first one's phase.

    Args:
        device: whose allocations are counted.

    Attributes:
        peaks: phase -> bytes; complete when it has been stopped. On CUDA what was there before `start` is counted too.
    """

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, int] = {}
        self._device = device
        self._phase = ""
        self._profile: Any = None

    def start(self, phase: str) -> None:
        """Begin to count, with this phase."""
        self._phase = phase
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
            self._mark_profile(phase)

    def mark(self, phase: str) -> None:
        """Another phase begins, or goes on."""
        if self._device.type == "cuda":
            self._close()
        else:
            self._mark_profile(phase)
        self._phase = phase

    def stop(self) -> None:
        """Count no more."""
        if self._device.type == "cuda":
            self._close()
        elif self._profile is not None:
            self._profile.stop()
            self.peaks = _profiled_peaks(self._profile.profiler.kineto_results.experimental_event_tree())
            self._profile = None

    def _close(self) -> None:
        peak_bytes = int(torch.cuda.max_memory_allocated(self._device))
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), peak_bytes)
        torch.cuda.reset_peak_memory_stats(self._device)

    def _mark_profile(self, phase: str) -> None:
        with record_function(f"{_MARK}{phase}"):
            pass


def _profiled_peaks(roots: Any) -> dict[str, int]:
    """Phase -> most bytes alive in it; what was allocated before the profile is not in it."""
    from torch._C._profiler import _EventType

    events: list[tuple[int, str, int]] = []  # nanoseconds, phase that begins, bytes
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            if event.extra_fields.device.type == "cpu":
                events.append((event.start_time_ns, "", event.extra_fields.alloc_size))
        elif event.name.startswith(_MARK):
            events.append((event.start_time_ns, event.name.removeprefix(_MARK), 0))
    peaks: dict[str, int] = {}
    phase, level_bytes = "", 0
    for _, begun, num_bytes in sorted(events, key=lambda event: event[0]):
        phase = begun or phase
        level_bytes += num_bytes
        peaks[phase] = max(peaks.get(phase, level_bytes), level_bytes)
    return peaks
