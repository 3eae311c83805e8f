"""An accelerator that exists in Python only, for dry runs of what a GPU would do on a machine that has none.

Fake tensors on "cuda" cannot run backward without a GPU. torch can register one device that has no kernels at all; fake
tensors live on it, forward and backward, host and device tensors are told apart, and mixing them raises as it would on
a GPU. The registration is a private API of torch, so it is called here, once, and nowhere else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import backend_registration

NAME = "dryrun"


@functools.cache
def python_accelerator() -> torch.device | None:
    """The Python-only device; None where this version of torch cannot make one (a dry run then uses "cpu")."""
    try:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _backend_module())
    except (AttributeError, RuntimeError, TypeError):  # a private API that changed, or another backend took its place
        return None
    return torch.device(NAME)


def _backend_module() -> object:
    """What torch asks a backend's module for, beyond what its own stand-in answers."""
    module: Any = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    # Whatever keeps random states aside (`torch.random.fork_rng`) asks the accelerator for its own: it has none.
    module.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda *_: None
    return module
