"""`qlora-trainer doctor`: what this machine is, what works on it and what does not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Examine the machine: versions, device, memory, dtypes."""
    from qlora_trainer.hardware.doctor import examine
    from qlora_trainer.report.screen import stdout_console

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    table = Table("", "what", "found", "note", box=None, pad_edge=False)
    for finding in findings:
        mark = Text(finding.verdict, style=_COLOURS[finding.verdict])
        table.add_row(mark, Text(finding.name), Text(finding.value), Text(finding.note))
    console = stdout_console()
    console.print(table)
    verdicts = [finding.verdict for finding in findings]
    if set(verdicts) == {"ok"}:
        console.print("\nEverything works here.")
    else:
        console.print(f"\n{verdicts.count('bad')} bad, {verdicts.count('warn')} to know about: see the notes.")
