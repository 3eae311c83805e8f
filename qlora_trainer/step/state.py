"""What is looked at before state is handed out for a save."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor holds a NaN or an infinity; integers pass. Under fake tensors, None."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # NaN becomes both ends; `isfinite` would write a temporary for each element, at ten times the time.
        ends = torch.aminmax(tensor.detach())
        if not is_fake(ends.min) and not (math.isfinite(ends.min) and math.isfinite(ends.max)):
            return name
    return None
