"""Step time and memory against the tokens of a micro-batch, the length of its documents, the rank and the model's size.

    python -m benchmarks.scaling [--sweeps micro_batch_tokens seq_len rank model] [--steps 3] [--json FILE]

Each point is a process of its own. SmolLM2-135M is the packaged base; 1.1B (TinyLlama's sizes) and 7B (Llama 2's) have
random NF4 weights that are made on the fly, and one micro-batch of 256 tokens, all layers recomputed. The 7B step must
stay within 6 GiB of resident memory, imports and making the weights included: exit code 1 if it does not. Plots go to
benchmarks/results/scaling_*.png, figures to scaling.md beside them. Memory is the process's peak in a step, less what
the imports left resident.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, describe_in_words
from benchmarks.scaling_plot import GIB, LABELS, write_plot

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MIB = 2**20
LIMIT_7B_BYTES = 6 * GIB
SWEEPS: dict[str, tuple[Any, ...]] = {
    "micro_batch_tokens": (256, 512, 1024, 2048, 4096),
    "seq_len": (128, 256, 512, 1024, 2048, 4096),
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "model": ("135m", "1.1b", "7b"),
}


def points(sweep: str, *, num_steps: int, dtype: str, values: Sequence[Any] | None = None) -> list[Any]:
    """The `PointSpec`s of a sweep: everything but what varies is pinned.

    Args:
        sweep: of `SWEEPS`.
        num_steps, dtype: of each point.
        values: of what varies, in place of the sweep's own.
    """
    from benchmarks.scaling_point import PointSpec

    base = PointSpec(model="135m", micro_batch_tokens=1024, seq_len=256, dtype=dtype, num_steps=num_steps)
    found = []
    for value in SWEEPS[sweep] if values is None else values:
        if sweep == "micro_batch_tokens":
            found += [replace(base, micro_batch_tokens=value, is_recomputed=policy) for policy in (False, True)]
        elif sweep == "seq_len":
            tokens = max(4096, value)
            found.append(replace(base, micro_batch_tokens=tokens, seq_len=value, is_recomputed=True))
        elif sweep == "rank":
            found.append(replace(base, rank=value))
        else:
            limit = LIMIT_7B_BYTES if value == "7b" else None
            small = replace(base, model=value, micro_batch_tokens=256, is_recomputed=True, limit_bytes=limit)
            found.append(replace(small, num_steps=1) if value == "7b" else small)
    return found


def point_json(spec: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, what came, and what follows from it."""
    seconds = statistics.median(measured["step_seconds"])
    return {
        **spec,
        **measured,
        "seconds": seconds,
        "tokens_per_second": spec["micro_batch_tokens"] / seconds,
        "taken_bytes": measured["peak_bytes"] - measured["import_bytes"],
    }


def is_within_limits(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no process took more than it may."""
    return all(point["limit_bytes"] is None or point["process_peak_bytes"] <= point["limit_bytes"] for point in found)


def table(report: Mapping[str, Any]) -> str:
    """Markdown, one table a sweep."""
    lines = ["# Step time and memory against size", "", report["machine_in_words"]]
    for sweep, found in report["sweeps"].items():
        lines += ["", f"## {LABELS[sweep].capitalize()}", ""]
        heading = ("model", "micro-batch", "seq_len", "rank", "layers", "s a step", "tokens/s")
        lines.append(f"| {' | '.join(heading)} | MiB | MiB, blocks kept | process's peak, GiB |")
        lines.append("|---|---:|---:|---:|---|---:|---:|---:|---:|---:|")
        for point in found:
            cells = (
                point["model"],
                f"{point['micro_batch_tokens']:,}",
                f"{point['seq_len']:,}",
                str(point["rank"]),
                "recomputed" if point["is_recomputed"] else "kept",
                f"{point['seconds']:.2f}",
                f"{point['tokens_per_second']:,.0f}",
                f"{point['taken_bytes'] / MIB:,.0f}",
                f"{(point['timed_peak_bytes'] - point['import_bytes']) / MIB:,.0f}",
                f"{point['process_peak_bytes'] / GIB:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Step time and memory by size.")
    parser.add_argument("--sweeps", nargs="+", choices=tuple(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--models", nargs="+", help="of the sweep over models: 135m, or a size of benchmarks.load")
    parser.add_argument("--steps", type=int, default=3, help="timed ones of each point; of 7b one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and the plots")
    chosen = parser.parse_args(arguments)

    chosen.results.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe(), "machine_in_words": describe_in_words(), "sweeps": {}}
    for sweep in chosen.sweeps:
        found: list[dict[str, Any]] = []
        values = chosen.models if sweep == "model" else None
        for spec in points(sweep, num_steps=chosen.steps, dtype=chosen.dtype, values=values):
            asked = asdict(spec)
            found.append(point_json(asked, _in_a_child(asked)))
            print(_in_words(found[-1]), file=sys.stderr, flush=True)
        report["sweeps"][sweep] = found
        write_plot(sweep, found, chosen.results / f"scaling_{sweep}.png")
        if chosen.json:
            chosen.json.write_text(json.dumps(report, indent=1) + "\n")
        (chosen.results / "scaling.md").write_text(table(report))
    print(table(report))
    return 0 if all(map(is_within_limits, report["sweeps"].values())) else 1


def _in_a_child(spec: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        spec_path, result = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_path.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "benchmarks.scaling_point", str(spec_path), str(result)]
        subprocess.run(command, cwd=REPOSITORY, check=True)
        measured: dict[str, Any] = json.loads(result.read_text())
    return measured


def _in_words(point: Mapping[str, Any]) -> str:
    policy = "recomputed" if point["is_recomputed"] else "kept"
    return (
        f"{point['model']}, {point['micro_batch_tokens']:,} tokens in documents of {point['seq_len']:,}, "
        f"rank {point['rank']}, {policy}, {point['compute_dtype']}: {point['seconds']:.2f} s a step, "
        f"{point['taken_bytes'] / MIB:,.0f} MiB above imports, {point['process_peak_bytes'] / GIB:.2f} GiB at most"
    )


if __name__ == "__main__":
    sys.exit(main())
