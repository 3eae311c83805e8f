"""What is looked at before state is handed out for a save."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_PIECE_ELEMENTS = 2**22  # `isfinite` makes temporaries as large as its argument


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor holds a NaN or an infinity; integers pass. Under fake tensors, None."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE_ELEMENTS):
            finite = torch.isfinite(flat[start : start + _PIECE_ELEMENTS]).all()
            if not is_fake(finite) and not bool(finite):
                return name
    return None
