"""The one place where bitsandbytes is imported.

On CPUs with AVX512-BF16, bitsandbytes 0.50 asks the hub for a prebuilt kernel (`kernels.get_kernel`) while it is being
imported, and writes a line to stderr when it gets none. An import must not touch the network, and that kernel repacks
weights in place, so `kernels` is hidden for the length of the import and that one line is filtered.

`triton` comes with torch's CUDA wheels. Without a GPU nothing here uses it, but bitsandbytes and what it imports of
torch look for it, and would make every run 82 MiB larger (triton 3.7.1): then it is hidden too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

_HIDDEN = ("kernels",) if torch.cuda.is_available() else ("kernels", "triton")


def _import_alone() -> ModuleType:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hidden = {name: sys.modules[name] for name in _HIDDEN if name in sys.modules}
    for name in _HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import` of it raise ImportError

    def is_not_about_kernels(record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()

    logger.addFilter(is_not_about_kernels)
    try:
        import bitsandbytes
    finally:
        logger.removeFilter(is_not_about_kernels)
        for name in _HIDDEN:
            del sys.modules[name]
        sys.modules.update(hidden)
    return bitsandbytes


bitsandbytes: Any = _import_alone()
functional: Any = bitsandbytes.functional


def make_adamw(parameters: Sequence[nn.Parameter], *, weight_decay: float, optim_bits: int) -> Any:
    """bitsandbytes' AdamW, also for fake parameters: it fills its 8-bit maps when it is made."""
    with unset_fake_temporarily():
        return bitsandbytes.optim.AdamW(parameters, weight_decay=weight_decay, optim_bits=optim_bits)


def dynamic_map(*, signed: bool, device: torch.device) -> Tensor:
    """bitsandbytes' 8-bit dynamic data type: its 256 levels, float32, on `device`.

    The library makes it from Python numbers, which a dry run's fake tensors do not have: made real, then moved.
    """
    with unset_fake_temporarily():
        levels: Tensor = functional.create_dynamic_map(signed=signed)
    return torch.empty(levels.shape, dtype=torch.float32, device=device).copy_(levels)
