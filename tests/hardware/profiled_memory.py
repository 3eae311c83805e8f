"""What torch's profiler saw being allocated while something ran: a counter that knows nothing of ours."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Allocated:
    """Bytes of the CPU allocator, above what was allocated before.

    Attributes:
        peak_bytes: the most at any moment.
        net_bytes: what is left at the end, results included.
    """

    peak_bytes: int
    net_bytes: int


def allocated_by(call: Callable[[], object]) -> Allocated:
    """Run `call` under the profiler and add up its allocations and releases; its result is dropped afterwards."""
    was_collecting = gc.isenabled()
    gc.disable()  # garbage of before, dropped meanwhile, would hide a peak
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
    finally:
        if was_collecting:
            gc.enable()
    results: Any = profiler.profiler
    changes = sorted(_memory_events(results.kineto_results.experimental_event_tree()), key=lambda event: event[0])
    del result
    level_bytes = peak_bytes = 0
    for _, num_bytes in changes:
        level_bytes += num_bytes
        peak_bytes = max(peak_bytes, level_bytes)
    return Allocated(peak_bytes, level_bytes)


def bytes_beyond_results(call: Callable[[], Tensor | tuple[Tensor, ...] | None]) -> int:
    """The peak of `call` less what it returns, counted once a storage."""
    results: list[Tensor] = []

    def run() -> None:
        out = call()
        results.extend((out,) if isinstance(out, Tensor) else out or ())

    peak_bytes = allocated_by(run).peak_bytes
    storages = {result.untyped_storage().data_ptr(): result.untyped_storage().nbytes() for result in results}
    return peak_bytes - sum(storages.values())


def _memory_events(tree: Any) -> Iterator[tuple[int, int]]:
    """(time, signed bytes) of each allocation and release on the host."""
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
