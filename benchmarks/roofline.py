"""Our step over the time of its own matrix products: what all else costs.

    python -m benchmarks.roofline [--lengths 256 256 ...] [--rounds 5] [--dtype auto] [--json FILE]

The products of one real step (the base's, LoRA's, the output head's) are written down, then made again at their shapes
and layouts, with nothing between them, into tensors that are there already, in fp32 and in bf16; the faster of the two
is the floor. Each is called in the faster of two ways (`mm` and `linear` differ on a CPU), and reads tensors that have
left the caches. Real steps (forward, backward, clip, update) and both replays take turns. Attention is not part of the
floor, nor is dequantization. A process for each policy: activations kept, and all layers recomputed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, describe_in_words

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "roofline.md"
POLICIES = ("keep", "recompute")
DEFAULT_LENGTHS = (256,) * 8


def ratios(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of one policy: the best dtype of its floor, and the step over it: the median, least and most of the rounds."""
    floors = {dtype: statistics.median(seconds) for dtype, seconds in measured["floor_seconds"].items()}
    best = min(floors, key=lambda dtype: floors[dtype])
    over = {
        dtype: [step / floor for step, floor in zip(measured["step_seconds"], seconds, strict=True)]
        for dtype, seconds in measured["floor_seconds"].items()
    }
    step_seconds = statistics.median(measured["step_seconds"])
    return {
        "ratio": statistics.median(over[best]),
        "ratio_from": min(over[best]),
        "ratio_to": max(over[best]),
        "best_dtype": best,
        "ratio_in_own_dtype": statistics.median(over[measured["compute_dtype"]]),
        "step_seconds_median": step_seconds,
        "step_seconds_from": min(measured["step_seconds"]),
        "step_seconds_to": max(measured["step_seconds"]),
        "floor_seconds_median": floors,
        "floor_gflops": {dtype: measured["gflop"] / seconds for dtype, seconds in floors.items()},
        "tokens_per_second": measured["num_tokens"] / step_seconds,
        "floor_tokens_per_second": measured["num_tokens"] / floors[best],
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Our step over its own matrix products",
        "",
        report["machine_in_words"],
        "",
        f"{report['model']}, documents of {', '.join(map(str, report['lengths']))} tokens in micro-batches of "
        f"{report['micro_batch_tokens']:,}, rank {report['rank']}; medians of {report['rounds']} rounds "
        "[from the least to the most of them].",
        "",
        "| | step, s | in | tokens/s | products, s: fp32 | bf16 | GFLOP | step / floor | tokens/s of the floor |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for policy in POLICIES:
        if policy not in report:
            continue
        measured = report[policy]
        floors = measured["floor_seconds_median"]
        cells = (
            policy,
            f"{measured['step_seconds_median']:.3f} "
            f"[{measured['step_seconds_from']:.3f} to {measured['step_seconds_to']:.3f}]",
            measured["compute_dtype"],
            f"{measured['tokens_per_second']:,.0f}",
            f"{floors['float32']:.3f}",
            f"{floors['bfloat16']:.3f}",
            f"{measured['gflop']:,.0f}",
            f"{measured['ratio']:.2f} [{measured['ratio_from']:.2f} to {measured['ratio_to']:.2f}] "
            f"({measured['best_dtype']})",
            f"{measured['floor_tokens_per_second']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for policy in POLICIES:
        if policy in report:
            lines += ["", f"Products that take longest, {policy} (alone, in warm caches):", ""]
            lines += ["| rows x summed x columns | number | GFLOP | fp32, ms | bf16, ms |", "|---|---:|---:|---:|---:|"]
            for product in report[policy]["products"]:
                milliseconds = (1e3 * product["seconds"][dtype] for dtype in ("float32", "bfloat16"))
                numbers = " | ".join(f"{value:,.0f}" for value in milliseconds)
                lines.append(f"| {product['name']} | {product['count']} | {product['gflop']:,.1f} | {numbers} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Our step over its products.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(DEFAULT_LENGTHS), help="tokens of the documents")
    parser.add_argument("--supervised", type=float, default=0.59, help="share of each document; GSM8K's by default")
    parser.add_argument("--micro-batch-tokens", type=int, help="default: all documents at once")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loss-chunk", type=int, default=1024)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of our step")
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    from benchmarks.roofline_step import StepSpec

    report: dict[str, Any] = {"machine": describe(), "machine_in_words": describe_in_words()}
    with tempfile.TemporaryDirectory(prefix="roofline-") as temporary:
        for policy in chosen.policies:
            spec = StepSpec(
                model=chosen.model,
                lengths=tuple(chosen.lengths),
                supervised_share=chosen.supervised,
                micro_batch_tokens=chosen.micro_batch_tokens or sum(chosen.lengths),
                rank=chosen.rank,
                loss_chunk_tokens=chosen.loss_chunk,
                is_recomputed=policy == "recompute",
                dtype=chosen.dtype,
                adapter_dtype=chosen.adapter_dtype,
                rounds=chosen.rounds,
            )
            measured = _in_a_child(asdict(spec), Path(temporary))
            report |= {key: value for key, value in asdict(spec).items() if key != "is_recomputed"}
            report[policy] = measured | ratios(measured)
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    chosen.table.parent.mkdir(parents=True, exist_ok=True)
    chosen.table.write_text(table(report))
    print(table(report))
    return 0


def _in_a_child(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    spec_path, result = folder / "spec.json", folder / "result.json"
    spec_path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "benchmarks.roofline_step", str(spec_path), str(result)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


if __name__ == "__main__":
    sys.exit(main())
