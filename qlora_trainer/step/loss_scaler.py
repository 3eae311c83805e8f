"""A dynamic scale for the loss where gradients are fp16, whose least number is 6e-8, as `torch.amp.GradScaler` has it.

Gradients are those of the loss times the scale, and are divided by it before anything looks at them. Where one is not
finite, the step changes nothing and the scale is halved; after 2,000 good steps in a row it is doubled. That one is
not used, because it wants the optimizer's parameters and asks the host before each step.

The scale is applied inside the loss, to fp32 gradients of the logits, before anything is rounded to fp16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# torch/amp/grad_scaler.py, the defaults of GradScaler.
INITIAL_SCALE, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScaler:
    """Owns the scale and the number of good steps since it last changed.

    Both live on the device, so that no step waits for the host.

    Args:
        device: of the gradients.

    Attributes:
        scale: 0-dim fp32.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device)
        self._num_good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale_(self, gradient: Tensor) -> None:
        """Divide by the scale, in place: exact, as the scale is a power of two, unless a number gets subnormal."""
        gradient.mul_(self.scale.reciprocal())

    def update(self, must_be_finite: Tensor) -> None:
        """The scale of the next step, by what came of this one.

        Args:
            must_be_finite: numbers on the device; one that is not finite, an overflow as a rule, makes the step a bad
                one.
        """
        is_bad = (must_be_finite * 0.0).sum().isnan()
        num_good_steps = torch.where(is_bad, 0, self._num_good_steps + 1)
        grown = self.scale * GROWTH_FACTOR
        is_grown = (num_good_steps == GROWTH_INTERVAL) & grown.isfinite()
        self.scale = torch.where(is_bad, self.scale * BACKOFF_FACTOR, torch.where(is_grown, grown, self.scale))
        self._num_good_steps = torch.where(num_good_steps == GROWTH_INTERVAL, 0, num_good_steps)

    def state_dict(self) -> dict[str, Any]:
        """`{"scale": float, "num_good_steps": int}`, plain values for JSON, exact; waits for the device."""
        return {"scale": float(self.scale), "num_good_steps": int(self._num_good_steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved state.

        Raises:
            ValueError: it is no state of a scaler.
        """
        scale, num_good_steps = state.get("scale"), state.get("num_good_steps")
        if not (isinstance(scale, float) and math.isfinite(scale) and scale > 0):
            raise ValueError(f"a scale of {scale!r}")
        if type(num_good_steps) is not int or not 0 <= num_good_steps < GROWTH_INTERVAL:
            raise ValueError(f"num_good_steps of {num_good_steps!r}")
        self.scale.fill_(scale)
        self._num_good_steps.fill_(num_good_steps)
