"""A published row's figures beside what a trace of its step predicts, and by how much the two may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import peer_rows, peer_speed
from qlora_trainer.hardware.device_memory import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_HOPPER_BYTES,
    NUM_CUBLAS_WORKSPACES,
)

GIB = 2**30
PHASES = ("forward_bytes", "backward_bytes", "optimizer_bytes")
FROM_HOPPER_ON = ("H100", "H200", "GH200", "H800", "B100", "B200", "GB200")
# A prediction's error as a fraction: (at least, at most).
STATIC_BOUND, SPEED_BOUND = (-0.005, 0.005), (-0.25, 0.25)
PEAK_BOUNDS = {"stock": (-0.01, 0.02), "fused": (-0.05, 0.05)}
FIGURES = ("static_allocated_gib", "peak_allocated_gib", "tokens_per_second")


@dataclass(frozen=True, slots=True)
class Tracing:
    """What a row's prediction is made of.

    Attributes:
        how: "traced" or "modelled".
        depths: numbers of layers.
        traces: figures of `peer_step.Trace`, at each of them.
        unsplit_bytes: see `peer_allocator.py`.
    """

    how: str
    depths: tuple[int, ...]
    traces: Sequence[Mapping[str, float]]
    unsplit_bytes: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row's figures, predicted and published; None where there is none.

    Attributes:
        id: as in the row, or which row it is, where it has none.
        how: "traced" (the peer's own code) or "modelled" (its step written by hand).
        reason: why there is no prediction; or, beside one, why the row was modelled though it could be traced, how far
            its figures may be trusted, or what of the published ones cannot be read.
    """

    id: str | int
    how: str | None
    traced_static_bytes: int | None
    published_static_bytes: int | None
    traced_peak_bytes: int | None
    published_peak_bytes: int | None
    predicted_tokens_per_second: float | None = None
    published_tokens_per_second: float | None = None
    reason: str | None = None
    is_stock: bool = True

    def errors(self) -> dict[str, float | None]:
        """Predicted / published - 1."""
        return {
            "static": _error(self.traced_static_bytes, self.published_static_bytes),
            "peak": _error(self.traced_peak_bytes, self.published_peak_bytes),
            "tokens_per_second": _error(self.predicted_tokens_per_second, self.published_tokens_per_second),
        }

    def is_within_bounds(self) -> bool:
        """Also true where nothing was predicted."""
        bounds = {
            "static": STATIC_BOUND,
            "peak": PEAK_BOUNDS["stock" if self.is_stock else "fused"],
            "tokens_per_second": SPEED_BOUND,
        }
        errors = self.errors()
        return all(error is None or bounds[key][0] <= error <= bounds[key][1] for key, error in errors.items())


def _error(predicted: float | None, published: float | None) -> float | None:
    return None if predicted is None or not published else predicted / published - 1


def extrapolate(traces: Sequence[Mapping[str, float]], depths: Sequence[int], num_layers: int) -> dict[str, float]:
    """Each figure at the model's depth, from one trace at that depth, or two at others: affine in layers."""
    if tuple(depths) == (num_layers,):
        return dict(traces[0])
    shallow, deep = traces
    layers = (num_layers - depths[0]) / (depths[1] - depths[0])
    return {key: shallow[key] + layers * (deep[key] - shallow[key]) for key in shallow}


def finish(place: int, row: Any, tracing: Tracing | None, reason: str | None) -> Prediction:
    """The row's prediction.

    Args:
        place: of the row, from 0.
        row: whatever was read.
        tracing: None where it could not be handled.
        reason: of `Prediction`.
    """
    named = row if isinstance(row, Mapping) else {}
    published: dict[str, float | None] = dict.fromkeys(FIGURES)
    for key in FIGURES:
        try:
            published[key] = peer_rows.published(named, key)
        except peer_rows.CannotHandle as error:
            reason = f"{reason}; {error}" if reason else str(error)
    static_bytes = peak_bytes = speed = None
    if tracing is not None:
        figures = extrapolate(tracing.traces, tracing.depths, row["config"]["num_hidden_layers"])
        beside = NUM_CUBLAS_WORKSPACES * workspace_bytes(row.get("gpu")) + tracing.unsplit_bytes
        static_bytes = round(figures["static_bytes"]) + beside
        peak_bytes = round(max(figures[phase] for phase in PHASES)) + beside
        speed = peer_speed.tokens_per_second(row.get("gpu"), row["micro_batch"] * row["seq_len"], figures)
    found = named.get("id")
    return Prediction(
        id=found if isinstance(found, str | int) else f"row {place + 1}",
        how=None if tracing is None else tracing.how,
        traced_static_bytes=static_bytes,
        published_static_bytes=_bytes(published["static_allocated_gib"]),
        traced_peak_bytes=peak_bytes,
        published_peak_bytes=_bytes(published["peak_allocated_gib"]),
        predicted_tokens_per_second=speed,
        published_tokens_per_second=published["tokens_per_second"],
        reason=reason,
        is_stock=named.get("loss") == "transformers_fp32",
    )


def workspace_bytes(gpu: Any) -> int:
    """Of one cuBLAS handle on a GPU by this name; an unknown one counts as what the rows are of, an A100."""
    is_hopper = isinstance(gpu, str) and gpu.upper().startswith(FROM_HOPPER_ON)
    return CUBLAS_WORKSPACE_HOPPER_BYTES if is_hopper else CUBLAS_WORKSPACE_BYTES


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else round(gib * GIB)
