"""How torch takes a GPU's memory: chosen before torch is imported, since it looks only then."""

from __future__ import annotations

import os

# Both names are read by torch 2.13 (c10/cuda/CUDAAllocatorConfig.h, c10/core/AllocatorConfig.h); the first is newer.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expand_segments() -> None:
    """Let segments grow in place, so that freed blocks of many sizes leave no holes: what a plan counts on.

    What the user has set stays. A CPU does not look at it.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = "expandable_segments:True"
