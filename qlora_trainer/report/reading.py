"""What is being done, and how far data has been read, as one line that goes when it is done."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from qlora_trainer.data.rows import Reading
from qlora_trainer.report.tables import reading_line
from qlora_trainer.run.records import Preparing

T = TypeVar("T")


def working(console: Console, what: str) -> AbstractContextManager[object]:
    """Shows on a terminal that something takes a while; a file or a pipe sees nothing of it."""
    return console.status(Text(what, style="dim")) if console.is_terminal else nullcontext()


def watched(
    reading: Generator[Reading | Preparing, None, T] | Generator[Reading, None, T],
    console: Console,
    *,
    what: str = "reading the data",
) -> T:
    """Drives `reading` to its end, shown on a terminal; a file or a pipe sees nothing of it.

    Args:
        reading: yields how far it is, or what it does now.
        console: over stderr where stdout is the result.
        what: is being done before and beside the reading.

    Returns:
        What `reading` returns.
    """
    words = TextColumn("{task.description}", markup=False, style="dim")
    bar = BarColumn(bar_width=16)
    with Progress(
        bar, words, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=1.0)
        while True:
            try:
                item = next(reading)
            except StopIteration as end:
                found: T = end.value
                return found
            if isinstance(item, Reading):
                progress.update(task, completed=item.share, description=reading_line(item))
            else:
                progress.update(task, completed=0.0, description=item.what)
