"""Tokens a second of a traced step, by a roofline with three constants for all rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Dense bf16 FLOP/s and bytes/s: NVIDIA A100 80GB SXM data sheet.
PEAKS = {"A100-80GB": (312e12, 2039e9)}
# The three constants, by least squares of the relative errors of the 14 published Mistral-7B rows together, which they
# then meet within 0.5 %. The last is what a kernel's launch costs beside its work.
PRODUCT_EFFICIENCY = 0.75
BANDWIDTH_EFFICIENCY = 0.79
SECONDS_PER_LAUNCH = 14e-6


def tokens_per_second(gpu: Any, tokens: int, work: Mapping[str, float]) -> float | None:
    """None where the GPU's peaks are not known.

    Args:
        gpu: its name in the published rows, or whatever is there.
        tokens: of the step.
        work: of a `peer_step.Trace`.
    """
    if not isinstance(gpu, str) or gpu not in PEAKS:
        return None
    flops_per_second, bytes_per_second = PEAKS[gpu]
    seconds = (
        (work["gemm_flops"] + work["attention_flops"]) / (PRODUCT_EFFICIENCY * flops_per_second)
        + work["moved_bytes"] / (BANDWIDTH_EFFICIENCY * bytes_per_second)
        + work["launches"] * SECONDS_PER_LAUNCH
    )
    return tokens / seconds
