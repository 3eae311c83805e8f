"""A self test on a terminal: a line a check, and then what each phase of each tiny run took."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qlora_trainer.run.self_test.check import Check
from qlora_trainer.run.self_test.report import Report

_MARKS = {"ok": ("ok", "green"), "failed": ("failed", "red"), "not on this device": ("-", "dim")}


def check_line(check: Check) -> Text:
    """Verdict, name, what was found and, where that is not all, what was expected."""
    mark, colour = _MARKS[check.verdict]
    line = Text.assemble((f"{mark:<7}", colour), f"{check.name}: {check.found}")
    if check.verdict == "failed":
        line.append(f" (expected {check.expected})")
        if check.reason:
            line.append(f": {check.reason}")
    elif check.verdict == "not on this device":
        line.append(f", not on this device: it takes {check.expected}")
    return line


def bytes_table(report: Report) -> Table:
    """A row a phase: MiB as predicted and as measured, for each run."""
    table = Table("allocated, MiB", *(run.name for run in report.levers), box=None, pad_edge=False)
    phases = [entry.phase for entry in report.levers[0].phases] if report.levers else []
    for number, phase in enumerate(phases):
        cells = [
            f"{entry.predicted_bytes / 2**20:.1f} / {entry.measured_bytes / 2**20:.1f}"
            for entry in (run.phases[number] for run in report.levers)
        ]
        table.add_row(phase, *cells)
    return table
