"""Peak memory that other people measured on real GPUs, against our tracer, without a GPU.

    python benchmarks/published_memory.py [--rows FILE] [--peer-python PYTHON]... [--unsloth-line] [--json]

FILE holds a JSON object a line: a QLoRA run of transformers + PEFT + bitsandbytes on an A100, with torch's allocated
bytes after and at most during training; `published_memory.jsonl` if it is not given (source: foundation-model-stack/
fms-acceleration, scripts/benchmarks/refs; each row names its file there). A row is "traced" where PYTHON, of a virtual
environment made from `peer_requirements_*.txt`, has the release of transformers that it was measured with: the peer's
own code runs, only its GPU kernels are replaced. Else it is "modelled": the same step with the peer's layers written by
hand. Two shallow depths are traced and extrapolated, each phase by itself, and the maximum is taken last; a model whose
layers are not all alike is traced with all of them. A row that cannot be handled has null for figures, and a reason.

Added to what is traced: the two workspaces that cuBLAS gets from torch's allocator, one for each thread that multiplies
(forward, backward), and what the allocator counts in blocks it does not split (`peer_allocator.py`).

Exit code 1 if a row that could be handled, or a point of Unsloth's line, misses its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules beside it only: `benchmarks` is a folder further up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peer_allocator, peer_model, peer_rows, peer_skeleton, peer_unsloth
from benchmarks.published_prediction import GIB, Prediction, Tracing, finish

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_suffix(".jsonl")
Job = tuple[Mapping[str, Any], tuple[int, ...]]


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
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        error = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [{"error": f"{python}: {error}"} for _ in jobs]
    results: list[dict[str, Any]] = json.loads(lines[-1])
    return results


def release_in(python: str) -> str:
    """The release of transformers (4.48) that `python` has."""
    code = "from importlib.metadata import version; print(version('transformers'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return ".".join(found.stdout.strip().split(".")[:2])


def predict(rows: Sequence[Any], peer_pythons: Mapping[str, str]) -> list[Prediction]:
    """Every row's prediction, in order.

    Args:
        rows: of `peer_rows.read_rows`; by their place, for an id may be missing or come twice.
        peer_pythons: release of transformers -> the Python that has it.
    """
    reasons: dict[int, str] = {}
    possible: dict[int, Mapping[str, Any]] = {}
    for place, row in enumerate(rows):
        try:
            peer_rows.check(row)
            possible[place] = row
        except peer_rows.CannotHandle as error:
            reasons[place] = str(error)
    tracings: dict[int, Tracing] = {}
    for release, python in peer_pythons.items():
        own = [place for place, row in possible.items() if peer_rows.release_of(row) == release]
        if own:
            for place, outcome in zip(own, _trace_all(python, [possible[place] for place in own]), strict=True):
                if isinstance(outcome, str):
                    reasons[place] = outcome
                else:
                    tracings[place] = outcome
    for place, row in possible.items():
        if place not in tracings:
            why = None
            try:
                tracings[place] = _model(row)
                if row["config"]["model_type"] not in peer_skeleton.MATCHED:
                    why = "a model type whose modelled figures were never compared with the peer's own code"
            except peer_rows.CannotHandle as error:
                why = str(error)
            if why is not None:
                reasons[place] = f"{reasons[place]}; {why}" if place in reasons else why
    return [finish(place, row, tracings.get(place), reasons.get(place)) for place, row in enumerate(rows)]


def _trace_all(python: str, rows: Sequence[Mapping[str, Any]]) -> list[Tracing | str]:
    """The peer's own code, or why it did not run."""
    surveys: list[tuple[tuple[int, ...], int]] = []
    for row in rows:
        try:
            surveys.append((peer_skeleton.survey(row).depths, _unsplit_bytes(row)))
        except peer_rows.CannotHandle:  # unknown to the installed transformers, perhaps not to the peer's
            surveys.append(((row["config"]["num_hidden_layers"],), 0))
    jobs = [(row, depths) for row, (depths, _) in zip(rows, surveys, strict=True)]
    return [
        result["error"] if "error" in result else Tracing("traced", depths, result["traces"], unsplit_bytes)
        for result, (depths, unsplit_bytes) in zip(trace_with(python, jobs), surveys, strict=True)
    ]


def _model(row: Mapping[str, Any]) -> Tracing:
    with peer_rows.as_reason("it cannot be modelled"):
        depths = peer_skeleton.survey(row).depths
        traces = [peer_model.trace(row, num_layers).as_dict() for num_layers in depths]
        return Tracing("modelled", depths, traces, _unsplit_bytes(row))


def _unsplit_bytes(row: Mapping[str, Any]) -> int:
    return peer_allocator.unsplit_bytes(peer_skeleton.survey(row).weights, double_quant=row["double_quant"])


def print_table(predictions: Sequence[Prediction]) -> None:
    """A line a row."""
    from rich.console import Console
    from rich.markup import escape
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
        verdict = "; ".join(part for part in ("" if one.is_within_bounds() else "off", one.reason) if part)
        table.add_row(escape(str(one.id)), one.how or "-", *cells, escape(verdict))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="published_memory.py", description="Our tracer against published GPU memory.")
    parser.add_argument("--rows", type=Path, default=ROWS, help="published rows, a JSON object a line")
    parser.add_argument(
        "--peer-python", action="append", default=[], help="of peer_requirements_*.txt; may be repeated"
    )
    parser.add_argument("--unsloth-line", action="store_true", help="also Unsloth's line of stock transformers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    try:
        text = chosen.rows.read_text(encoding="utf-8-sig", errors="replace")
        # An absolute path, since the peer's code is started in the repository.
        pythons = [os.path.abspath(shutil.which(python) or python) for python in chosen.peer_python]
        releases = {release_in(python): python for python in pythons}
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except subprocess.CalledProcessError as error:
        parser.error(f"--peer-python {error.cmd[0]}: it has no transformers")
    predictions = predict(peer_rows.read_rows(text), releases)
    report: dict[str, Any] = {"rows": [asdict(one) for one in predictions]}
    is_right = all(one.is_within_bounds() for one in predictions)
    if chosen.unsloth_line:
        points = peer_unsloth.points()
        report["unsloth_line"] = [asdict(point) for point in points]
        is_right = is_right and all(point.is_within_bounds() for point in points)
    if chosen.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(predictions)
        for point in report.get("unsloth_line", []):
            print(json.dumps(point))
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
