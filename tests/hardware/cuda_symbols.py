"""Which C functions of bitsandbytes' CUDA library our calls end in, on a machine without a GPU.

bitsandbytes' own CUDA code, in Python, runs on CPU tensors; only the library under it is replaced, by one that notes
what is called and does nothing. Prints a JSON object: symbol -> how many arguments it was given.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.hardware import paging
from qlora_trainer.hardware.quant_library import bitsandbytes
from qlora_trainer.model import nf4
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings

OPERATIONS = "bitsandbytes.backends.cuda.ops"


class Library:
    """In the place of `bitsandbytes.cextension.lib`."""

    compiled_with_cuda = True

    def __init__(self) -> None:
        self.called: set[str] = set()
        self._memory: list[Any] = []

    @functools.cache  # noqa: B019 - one library, one process
    def __getattr__(self, name: str) -> Any:
        def noted(*arguments: Any) -> int:
            self.called.add(name)
            if name != "cget_managed_ptr":
                return 0
            self._memory.append(ctypes.create_string_buffer(arguments[0].value))
            return ctypes.addressof(self._memory[-1])

        return noted


class AsOnCuda(TorchDispatchMode):
    """Sends bitsandbytes' operations to what they are registered to be on a GPU."""

    def __init__(self, kernels: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("bitsandbytes::"):
            return self._kernels[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def cuda_kernels(library: Library, patch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Operation -> what bitsandbytes registers for it on CUDA, over `library`."""
    found: dict[str, Callable[..., Any]] = {}

    def noted(name: str, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            assert device == "cuda"
            found[name] = function
            return function

        return keep

    patch.setattr("bitsandbytes._ops.register_kernel", noted)
    patch.setattr("bitsandbytes.cextension.lib", library)
    patch.setattr(bitsandbytes.functional, "lib", library)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: 0, raising=False)
    patch.delitem(sys.modules, OPERATIONS, raising=False)
    importlib.import_module(OPERATIONS)
    patch.delitem(sys.modules, OPERATIONS)
    return found


def called_symbols() -> frozenset[str]:
    """What a run does with bitsandbytes: quantize, unpack, update, page."""
    library = Library()
    with pytest.MonkeyPatch.context() as patch:
        kernels = cuda_kernels(library, patch)
        patch.setattr(torch, "as_tensor", lambda data, **_: data.paged)  # a GPU would see managed memory in it
        with AsOnCuda(kernels):
            _run()
    return frozenset(library.called)


def _run() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for double_quant in (True, False):
            weight = nf4.quantize(torch.ones(64, 64, dtype=dtype), double_quant=double_quant)
            nf4.dequantize(weight, dtype)
            nf4.dequantize(weight, dtype, torch.ones(64))
    all_bits: tuple[Literal[8, 32], ...] = (8, 32)
    for bits in all_bits:
        settings = OptimizerSettings(bits=bits, residency="device", weight_decay=0.0, paging_folder=Path())
        optimizer = AdapterOptimizer({"adapter": nn.Parameter(torch.ones(512))}, settings)
        optimizer.gradient.fill_(1.0)
        optimizer.update(1e-3)
    for dtype in (torch.float32, torch.uint8):
        paging.zeros_paged(512, dtype=dtype, device=torch.device("cuda", 0), folder=Path())
