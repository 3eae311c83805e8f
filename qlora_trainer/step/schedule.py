"""The learning rate as a function of the step: linear warm-up, then cosine, linear or no decay."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, *, num_steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """Learning rate of optimizer step `step`, counted from 0; the same as transformers' schedulers give.

    Args:
        step: 0 <= step < num_steps.
        num_steps: steps of the whole run.
        peak: the rate after warm-up.
        schedule: cosine to 0, linear to 0, or constant.
        warmup_ratio: share of `num_steps` over which the rate rises from 0, rounded up to whole steps.
    """
    num_warmup_steps = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup_steps:
        return peak * step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (1.0 - progress) if schedule == "linear" else peak
