"""Copies between host and device beside the work of the device: a CUDA stream of its own, and nothing elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class SideStream:
    """Where copies to and from `device` are queued.

    A copy begins after all that was queued on the device before it. `join` makes what is queued after it wait for the
    copies before; no call waits on the host. On a device without streams a copy is done when `copy` returns.

    Attributes:
        device: the one that is not the host.
    """

    device: torch.device
    _stream: Any = field(default=None)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Queue a copy; neither tensor's memory may be given to anybody else before the next `join`."""
        if self.device.type != "cuda":
            to.copy_(source, non_blocking=True)  # by its name on the accelerator without kernels; a CPU does it at once
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    def join(self) -> None:
        """What is queued on the device from now on waits for all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def host_memory(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor on the host that the device copies to and from without waiting: pinned, where that exists."""
        return torch.empty(num_elements, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")
