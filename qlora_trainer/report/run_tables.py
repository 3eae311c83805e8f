"""The runs of a folder, and the checkpoints of one run, as tables. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_trainer.report.formats import counted, format_bytes, format_loss
from qlora_trainer.report.screen import printable
from qlora_trainer.run.inventory import CheckpointFound, RunFound

_MAX_REASON_CHARACTERS = 300
_STATUS_STYLES = {"done": "green", "stopped_early": "green", "running": "cyan"}


def runs_table(runs: Sequence[RunFound]) -> RenderableType:
    """One line a run, and below it a line for each checkpoint that is not whole."""
    if not runs:
        return Text("no runs here")
    table = Table("run", "status", "step", "loss", "checkpoints", "size", "--resume auto", box=None, pad_edge=False)
    for run in runs:
        table.add_row(
            Text(printable(str(run.path), 200), overflow="fold"),
            Text(run.status, style=_STATUS_STYLES.get(run.status, "yellow")),
            Text(_steps(run)),
            Text(format_loss(run.last_loss)),
            _checkpoints(run.checkpoints),
            Text(format_bytes(run.num_bytes)),
            Text(run.resumable, style="" if run.can_resume else "red"),
        )
    damaged = [_verdict(checkpoint) for run in runs for checkpoint in run.checkpoints if checkpoint.reasons]
    return Group(table, *damaged)


def run_table(run: RunFound) -> RenderableType:
    """One run, and every checkpoint of it with its verdict."""
    head = Text(f"{run.path}: {run.status}, step {_steps(run)}, loss {format_loss(run.last_loss)}")
    if not run.checkpoints:
        return Group(head, Text("no checkpoints"))
    return Group(head, *(_verdict(checkpoint) for checkpoint in run.checkpoints))


def _steps(run: RunFound) -> str:
    return f"{run.step}/{run.num_steps}" if run.num_steps is not None else str(run.step)


def _checkpoints(checkpoints: Sequence[CheckpointFound]) -> Text:
    num_whole = sum(not checkpoint.reasons for checkpoint in checkpoints)
    if num_whole < len(checkpoints):
        return Text(f"{num_whole} of {len(checkpoints)} whole", style="red")
    return Text(f"{num_whole} whole")


def _verdict(checkpoint: CheckpointFound) -> Text:
    name = printable(str(checkpoint.path), 300)
    if not checkpoint.reasons:
        return Text(f"verified  {name}  ({format_bytes(checkpoint.num_bytes)})")
    reasons = printable("; ".join(checkpoint.reasons), _MAX_REASON_CHARACTERS)
    return Text(f"damaged   {name}  ({counted(len(checkpoint.reasons), 'reason')}: {reasons})", style="red")
