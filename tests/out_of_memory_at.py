"""Memory that runs out at a chosen operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OutOfMemoryAt(TorchDispatchMode):
    """Fails at operation `k` (0 is the first), once, as a GPU does where `k` is even, else as the CPU's allocator does;
    counts all of them.
    """

    def __init__(self, k: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.k = k
        self.num_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_operations += 1
        if self.num_operations - 1 == self.k:
            if self.k % 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def spread(num_operations: int, num_places: int) -> list[int]:
    """The first, the last, and every so many in between."""
    stride = max(1, num_operations // num_places) | 1  # an odd one, so that both kinds of error come
    return sorted({*range(0, num_operations, stride), num_operations - 1})
