"""`qlora-trainer doctor`: what this machine is, what works on it and what does not."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from qlora_trainer.config.paths import require_new_file
from qlora_trainer.errors import ConfigError

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Train something tiny: measured beside predicted, about a minute.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Of the self test, write this file: JSON, nothing personal.")
    ] = None,
) -> None:
    """Examine the machine: versions, device, memory, dtypes; or test it."""
    if self_test:
        _test(report, as_json=as_json)
        return
    if report is not None:
        raise ConfigError(where="doctor", found="--report without --self-test", expected="both", fix="Add --self-test.")
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


def _test(path: Path | None, *, as_json: bool) -> None:
    target = None if path is None else require_new_file(path, key="--report")
    # Kineto, which counts a CPU's allocations, reads this when torch is imported; else it prints lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    from qlora_trainer.report.screen import stdout_console
    from qlora_trainer.report.self_test_lines import bytes_table, check_line
    from qlora_trainer.run.self_test.command import require_passed, self_test, write_report
    from qlora_trainer.run.self_test.report import to_json

    console, testing = stdout_console(), self_test()
    while True:
        try:
            check = next(testing)
        except StopIteration as end:
            made = end.value
            break
        if not as_json:
            console.print(check_line(check), soft_wrap=True)  # one line, however long
    if as_json:
        typer.echo(to_json(made), nl=False)
    else:
        console.print()
        console.print(bytes_table(made))
    if target is not None:
        write_report(made, target)
        if not as_json:
            console.print(f"\nThe report is in {target.name}.", markup=False)
    require_passed(made)
