"""Whether the row operations run as kernels of `triton_rows`; where they do not, rows are computed in `row_blocks`.

Triton comes with torch's CUDA wheels. What it starts kernels with it compiles once on the machine, so it also needs a C
compiler and Python's headers there; whether all of that works is seen by starting a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
from types import ModuleType

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.cache_folder import cache_folder

NOT_INSTALLED = "triton is not installed"
# What a missing compiler, header, driver or right to load a library ends in; triton asserts some of it.
_FAILURES = (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError)


def has_row_kernels(device: torch.device) -> bool:
    """Whether each row operation on `device` is one kernel."""
    return device.type == "cuda" and why_no_row_kernels(device) is None


def expects_row_kernels(device: torch.device) -> bool:
    """Whether a plan counts on them: on a GPU that is not here, or on one that is and runs them."""
    if device.type == "cpu":
        return False
    return not torch.cuda.is_available() or has_row_kernels(torch.device("cuda"))


@functools.cache
def why_no_row_kernels(device: torch.device) -> str | None:
    """What keeps the kernels from running on a CUDA `device`; None where they run.

    Raises:
        torch.OutOfMemoryError: no kilobyte is left to try one in.
    """
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    try:
        import triton
    except (ImportError, OSError) as error:
        return _in_a_line(error)
    try:
        with unset_fake_temporarily():
            ones = torch.ones(1, 16, device=device)
            row_kernels().gated(torch.empty_like(ones), ones, ones, "silu")
    except torch.OutOfMemoryError:
        raise
    except StorageError as error:
        return f"{error.where}: {error.found}"
    except (*_FAILURES, triton.TritonError) as error:
        return _in_a_line(error)
    return None


@functools.cache
def row_kernels() -> ModuleType:
    """The module `triton_rows`, which cannot be imported where triton is not installed.

    What triton compiles is loaded as code: it is kept in our cache folder, which is its owner's alone, unless
    TRITON_CACHE_DIR names another.

    Raises:
        StorageError: the cache folder cannot be made, or belongs to somebody else.
    """
    import triton

    from qlora_trainer.hardware import triton_rows

    if "TRITON_CACHE_DIR" not in os.environ:
        triton.knobs.cache.dir = str(cache_folder() / "triton")
    return triton_rows


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
