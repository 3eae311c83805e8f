"""Peak memory that other people measured on real GPUs, against our tracer, without a GPU.

    python -m benchmarks.published_memory --rows FILE [--peer-python PYTHON]... [--unsloth-line] [--json]

FILE holds a JSON object a line: a QLoRA run of transformers + PEFT + bitsandbytes on an A100, with torch's allocated
bytes after and at most during training (source: foundation-model-stack/fms-acceleration, scripts/benchmarks/refs). A
row is "traced" where PYTHON, of a virtual environment made from `peer_requirements_*.txt`, has the release of
transformers that it was measured with: the peer's own code runs, only its GPU kernels are replaced. Else it is
"modelled": the same step with the peer's layers written by hand. Two shallow depths are traced and extrapolated, each
phase by itself, and the maximum is taken last.

Added to what is traced: the two workspaces that cuBLAS gets from torch's allocator, one for each thread that multiplies
(forward, backward), and what the allocator counts in blocks it does not split (`peer_allocator.py`).

Exit code 1 if a row that could be handled misses its bound.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.hardware.device_memory import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_HOPPER_BYTES,
    NUM_CUBLAS_WORKSPACES,
)

REPOSITORY = Path(__file__).parents[1]
GIB = 2**30
DEPTHS = (2, 3)
PHASES = ("forward_bytes", "backward_bytes", "optimizer_bytes")
WORKSPACE_BYTES = {"A100-80GB": CUBLAS_WORKSPACE_BYTES, "H100-80GB": CUBLAS_WORKSPACE_HOPPER_BYTES}
# A prediction's error as a fraction: (at least, at most).
STATIC_BOUND, SPEED_BOUND = (-0.005, 0.005), (-0.25, 0.25)
PEAK_BOUNDS = {"stock": (-0.01, 0.02), "fused": (-0.05, 0.05)}

OF_SKELETON = ("peer_kernels", "target_modules")  # what `peer_model.build_skeleton` looks at besides the config

Job = tuple[Mapping[str, Any], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row's figures, predicted and published; None where there is none.

    Attributes:
        how: "traced" (the peer's own code) or "modelled" (its step written by hand).
        reason: why there is no prediction, or why the row was modelled though it could be traced.
    """

    id: str
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


def extrapolate(traces: Sequence[Mapping[str, float]], num_layers: int) -> dict[str, float]:
    """Each figure at the model's depth, from traces at `DEPTHS`: affine in layers."""
    shallow, deep = traces
    layers = (num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return {key: shallow[key] + layers * (deep[key] - shallow[key]) for key in shallow}


def trace_with(python: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Each job's `{"traces": [...]}` or `{"error": why}`, from the peer's own code in `python`."""
    child = subprocess.run(
        [python, "-m", "benchmarks.peer_traced"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        error = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [{"error": f"{python}: {error}"} for _ in jobs]
    results: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return results


def release_in(python: str) -> str:
    """The release of transformers (4.48) that `python` has."""
    code = "from importlib.metadata import version; print(version('transformers'))"
    found = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return ".".join(found.stdout.strip().split(".")[:2])


def predict(rows: Sequence[Mapping[str, Any]], peer_pythons: Sequence[str]) -> list[Prediction]:
    """Every row's prediction, in order."""
    from benchmarks import peer_model, peer_rows

    reasons: dict[str, str] = {}
    traces: dict[str, tuple[str, list[Mapping[str, float]]]] = {}
    possible = []
    for row in rows:
        try:
            peer_rows.check(row)
            possible.append(row)
        except peer_rows.CannotHandle as error:
            reasons[row["id"]] = str(error)
    for python in peer_pythons:
        release = release_in(python)
        own = [row for row in possible if peer_rows.release_of(row) == release and row["id"] not in traces]
        for row, result in zip(own, trace_with(python, [(row, DEPTHS) for row in own]), strict=True):
            if "error" in result:
                reasons[row["id"]] = result["error"]
            else:
                traces[row["id"]] = "traced", result["traces"]
    for row in possible:
        if row["id"] not in traces:
            try:
                modelled = [peer_model.trace(row, num_layers).as_dict() for num_layers in DEPTHS]
                traces[row["id"]] = "modelled", list(modelled)
            except peer_rows.CannotHandle as error:
                reasons.setdefault(row["id"], str(error))
    return [_finish(row, traces.get(row["id"]), reasons.get(row["id"])) for row in rows]


def _finish(
    row: Mapping[str, Any], traced: tuple[str, list[Mapping[str, float]]] | None, reason: str | None
) -> Prediction:
    from benchmarks import peer_speed

    static_bytes = peak_bytes = speed = None
    if traced is not None:
        figures = extrapolate(traced[1], row["config"]["num_hidden_layers"])
        workspace_bytes = WORKSPACE_BYTES.get(row["gpu"], WORKSPACE_BYTES["A100-80GB"])
        beside = NUM_CUBLAS_WORKSPACES * workspace_bytes + _unsplit_bytes(row)
        static_bytes = round(figures["static_bytes"]) + beside
        peak_bytes = round(max(figures[phase] for phase in PHASES)) + beside
        speed = peer_speed.tokens_per_second(row["gpu"], row["micro_batch"] * row["seq_len"], figures)
    return Prediction(
        id=row["id"],
        how=None if traced is None else traced[0],
        traced_static_bytes=static_bytes,
        published_static_bytes=_bytes(row.get("static_allocated_gib")),
        traced_peak_bytes=peak_bytes,
        published_peak_bytes=_bytes(row.get("peak_allocated_gib")),
        predicted_tokens_per_second=speed,
        published_tokens_per_second=row.get("tokens_per_second"),
        reason=reason,
        is_stock=row["loss"] == "transformers_fp32",
    )


def _unsplit_bytes(row: Mapping[str, Any]) -> int:
    return _unsplit_bytes_of(json.dumps({key: row[key] for key in ("config", "double_quant", *OF_SKELETON)}))


@functools.cache
def _unsplit_bytes_of(base: str) -> int:
    from benchmarks import peer_allocator, peer_model, peer_rows

    row = json.loads(base)
    try:
        return peer_allocator.unsplit_bytes(peer_model.base_weights(row), double_quant=row["double_quant"])
    except peer_rows.CannotHandle:  # traced, but unknown to the installed transformers
        return 0


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else round(gib * GIB)


def print_table(predictions: Sequence[Prediction]) -> None:
    """A line a row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "row", "how", "static GiB", "", "peak GiB", "", "tokens/s", "", "", title="Predicted / published", box=None
    )
    for one in predictions:
        errors = one.errors()
        pairs = (
            ("static", one.traced_static_bytes, one.published_static_bytes, GIB, ".3f"),
            ("peak", one.traced_peak_bytes, one.published_peak_bytes, GIB, ".3f"),
            ("tokens_per_second", one.predicted_tokens_per_second, one.published_tokens_per_second, 1, ",.0f"),
        )
        cells = []
        for key, predicted, published, unit, form in pairs:
            cells.append(" / ".join("-" if x is None else format(x / unit, form) for x in (predicted, published)))
            error = errors[key]
            cells.append("" if error is None else f"{error:+.2%}")
        verdict = one.reason or ("" if one.is_within_bounds() else "off")
        table.add_row(one.id, one.how or "-", *cells, verdict)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_memory", description="Our tracer against published GPU memory."
    )
    parser.add_argument("--rows", type=Path, required=True, help="published rows, a JSON object a line")
    parser.add_argument(
        "--peer-python", action="append", default=[], help="of peer_requirements_*.txt; may be repeated"
    )
    parser.add_argument("--unsloth-line", action="store_true", help="also Unsloth's line of stock transformers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    rows = [json.loads(line) for line in chosen.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    predictions = predict(rows, chosen.peer_python)
    report: dict[str, Any] = {"rows": [asdict(one) for one in predictions]}
    if chosen.unsloth_line:
        from benchmarks import peer_unsloth

        report["unsloth_line"] = [asdict(point) for point in peer_unsloth.points()]
    if chosen.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(predictions)
        for point in report.get("unsloth_line", []):
            print(json.dumps(point))
    return 0 if all(one.is_within_bounds() for one in predictions) else 1


if __name__ == "__main__":
    sys.exit(main())
