"""`report.html`: what a run did, on one page that needs no network: loss, memory, throughput. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from qlora_trainer.report.formats import format_bytes, format_loss, format_seconds
from qlora_trainer.report.line_chart import Line, line_chart
from qlora_trainer.report.tables import PLAN_TOLERANCE
from qlora_trainer.run.checkpoint.storage import write_atomically
from qlora_trainer.run.folder import RunFolder, read_lines
from qlora_trainer.run.records import Finished, Record, Summary

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6b7480; --grid: #e3e6ea; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --faint: #98a2ad; --grid: #343a41; --paper: #16191d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 800px;
  margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.4em; } h2 { font-size: 1.05em; margin: 1.6em 0 .2em; }
table { border-collapse: collapse; } td { padding: .1em 1.2em .1em 0; vertical-align: top; }
td:first-child, p { color: var(--faint); } .loud { color: #c92a2a; font-weight: bold; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--faint); }
svg .grid { stroke: var(--grid); } polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.first { stroke: #3b82f6; } circle.first { fill: #3b82f6; } .first-key { color: #3b82f6; }
polyline.second { stroke: #e8590c; } circle.second { fill: #e8590c; } .second-key { color: #e8590c; }
"""


def reported(records: Iterable[Record]) -> Iterator[Record]:
    """The same records; after the last one the run folder has its `report.html`.

    Raises:
        StorageError: the disk refused; the run itself is whole.
    """
    for record in records:
        yield record
        if isinstance(record, Finished):
            write_run_report(RunFolder(record.run_path), record.summary)


def write_run_report(folder: RunFolder, summary: Summary) -> None:
    """Write `report.html` from the run's logs; the same logs give the same bytes.

    Raises:
        StorageError: the disk refused.
    """
    steps, evals = read_lines(folder.metrics_path), read_lines(folder.evals_path)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(str(folder.path))}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(str(folder.path))}</h1>",
        _facts(folder, summary),
        *_loss(steps, evals),
        *_memory(steps, summary),
        *_throughput(steps),
        "</body></html>",
    ]
    write_atomically(folder.report_path, ("\n".join(parts) + "\n").encode())


def _facts(folder: RunFolder, summary: Summary) -> str:
    loss = f"{format_loss(summary.eval_loss_before)} before, {format_loss(summary.eval_loss_after)} after"
    facts = {
        "status": summary.status.replace("_", " "),
        "steps": f"{summary.steps:,}",
        "trained": f"{summary.tokens:,} tokens in {format_seconds(summary.train_seconds)}",
        "held-out loss": loss,
        "base": str(_read_plan(folder).get("model", "")),
        "device": summary.device,
        "versions": ", ".join(f"{name} {version}" for name, version in summary.versions.items()),
    }
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(fact)}</td></tr>" for name, fact in facts.items() if fact)
    return f"<table>{rows}</table>"


def _loss(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    lines = [
        Line(name="training, each step", points=_points(steps, "loss"), style="first"),
        Line(name="held out", points=_points(evals, "eval_loss"), style="second", is_dotted=True),
    ]
    yield from _section("Loss", lines, label="loss by step", y_text=lambda value: f"{value:,g}", from_zero=False)


def _memory(steps: Sequence[Mapping[str, Any]], summary: Summary) -> Iterator[str]:
    unit, unit_bytes = ("GiB", 2**30) if summary.measured_peak_bytes >= 2**30 else ("MiB", 2**20)
    measured = [(step, num_bytes / unit_bytes) for step, num_bytes in _points(steps, "peak_bytes")]
    lines = [Line(name="peak so far, measured", points=measured, style="first")]
    predicted = summary.predicted_peak_bytes
    if predicted is not None and measured:
        ends = [(step, predicted / unit_bytes) for step in (measured[0][0], measured[-1][0])]
        lines.append(Line(name="planned", points=ends, style="second"))
    yield from _section("Memory", lines, label="peak memory by step", y_text=lambda value: f"{value:,g} {unit}")
    if predicted is not None:
        off = summary.measured_peak_bytes / predicted - 1
        text = (
            f"Planned {format_bytes(predicted)}, measured {format_bytes(summary.measured_peak_bytes)} ({off:+.1%}). "
            f"The whole process, preparations included: {format_bytes(summary.process_peak_bytes)}."
        )
        yield f"<p{' class=loud' if off > PLAN_TOLERANCE else ''}>{text}</p>"


def _throughput(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    lines = [Line(name="tokens a second", points=_points(steps, "tokens_per_second"), style="first")]
    yield from _section("Throughput", lines, label="tokens a second by step", y_text=lambda value: f"{value:,g}")


def _section(
    title: str, lines: Sequence[Line], *, label: str, y_text: Callable[[float], str], from_zero: bool = True
) -> Iterator[str]:
    drawn = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not drawn:
        return
    keys = " &nbsp; ".join(f'<span class="{line.style}-key">&#9632;</span> {escape(line.name)}' for line in drawn)
    yield f"<h2>{title}</h2><p>{keys}</p>"
    yield line_chart(drawn, label=label, x_label="optimizer step", y_text=y_text, from_zero=from_zero)


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value); null, as a loss that was not finite is written, becomes NaN."""
    values = [(line["step"], line.get(key)) for line in lines]
    return [(step, float(value) if isinstance(value, int | float) else math.nan) for step, value in values]


def _read_plan(folder: RunFolder) -> Mapping[str, Any]:
    try:
        plan = json.loads(folder.plan_path.read_text())
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}
