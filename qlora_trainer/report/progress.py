"""A run as it goes, on a terminal (one live line below what has happened) or in a log file (plain lines)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from qlora_trainer.data.rows import Reading
from qlora_trainer.report.formats import format_bytes, format_clock, format_loss
from qlora_trainer.report.tables import (
    answers_table,
    event_line,
    finished_table,
    prepared_table,
    reading_line,
    step_line,
)
from qlora_trainer.run.records import (
    Answered,
    Evaluated,
    Finished,
    Planned,
    PlanRevised,
    Prepared,
    Preparing,
    Record,
    Resumed,
    RowsSkipped,
    Saved,
    StepDone,
    StepSkipped,
    StreamRead,
    Summary,
)

_MAX_LINES_PER_RUN = 40  # step lines in a log file
_MAX_SILENT_SECONDS = 60.0  # ... but a slow run shows more often that it lives
_MIN_WIDTH_WITH_BAR = 100  # columns; below, the numbers need the room
_PACE_STEPS = 20  # steps that the time left is judged by


def show(records: Iterable[Record], console: Console) -> Summary | None:
    """Drive a run to its end and show what it yields.

    Args:
        records: the generator `run.loop.train`; what it raises is passed on, with the terminal put in order, and below
            the final table where a `Finished` came before it (an interrupted run ends so).
        console: where to show; `screen.stdout_console()` in production.

    Returns:
        What the run took; None when the records ended without telling.
    """
    with ExitStack() as stack:
        live_line = _start_live_line(console)
        view = _View(console, live_line)
        stack.callback(view.show_end)  # called last, when the live line is gone
        if live_line:
            stack.callback(live_line.close)
        for record in records:
            view.show(record)
    return view.finished.summary if view.finished else None


class _LiveLine:
    """The last line of a terminal: a clock until the first step is done, then how far the run is and how it goes.

    It is one line only: the message that a signal handler writes below it must not be drawn over.
    """

    def __init__(self, console: Console) -> None:
        words = TextColumn("{task.description}", markup=False, style="dim")
        facts = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        bar = (BarColumn(bar_width=16),) if console.width >= _MIN_WIDTH_WITH_BAR else ()
        self._waiting = Progress(
            *bar, words, TimeElapsedColumn(), console=console, transient=True, refresh_per_second=2
        )
        self._stepping = Progress(*bar, facts, console=console, transient=True, refresh_per_second=4)
        self._waiting_task = self._waiting.add_task("loading the base and the data", total=None)
        self._reading_task: TaskID | None = None
        self._stepping_task: TaskID | None = None
        self._waiting.start()

    def wait(self, what_for: str) -> None:
        if self._reading_task is not None:
            self._waiting.remove_task(self._reading_task)
            self._reading_task = None
        self._waiting.update(self._waiting_task, visible=True, description=what_for)

    def read(self, record: Reading) -> None:
        if self._stepping_task is not None:  # the next rows of a stream
            self._stepping.update(self._stepping_task, description=reading_line(record), refresh=True)
            return
        if self._reading_task is None:  # a total cannot be taken from a task again
            self._waiting.update(self._waiting_task, visible=False)
            self._reading_task = self._waiting.add_task("", total=1.0)
        line = reading_line(record)
        self._waiting.update(self._reading_task, completed=record.share, description=line, refresh=True)

    def move(self, record: StepDone, seconds_left: float | None) -> None:
        if self._stepping_task is None:
            self._waiting.stop()
            self._stepping_task = self._stepping.add_task("")
            self._stepping.start()
        parts = (
            f"step {record.step}/{record.num_steps}",
            "" if seconds_left is None else f"{format_clock(seconds_left)} left",
            f"loss {format_loss(record.loss)}",
            f"{record.tokens_per_second:,.0f} tok/s",
            f"{format_bytes(record.memory_bytes)}, peak {format_bytes(record.peak_bytes)}",
        )
        self._stepping.update(
            self._stepping_task,
            completed=record.step,
            total=record.num_steps,
            description=" · ".join(part for part in parts if part),
        )

    def close(self) -> None:
        self._waiting.stop()
        self._stepping.stop()


class _View:
    """What has been seen so far, as far as later records need it."""

    def __init__(self, console: Console, live_line: _LiveLine | None) -> None:
        self.finished: Finished | None = None
        self._console = console
        self._live_line = live_line
        self._answers: list[Answered] = []
        self._recent_seconds: deque[float] = deque(maxlen=_PACE_STEPS)
        self._last_line_step: int | None = None
        self._last_reading_time = time.monotonic()
        self._silent_seconds = 0.0

    def show(self, record: Record) -> None:
        match record:
            case Preparing():
                if self._live_line:
                    self._live_line.wait(record.what)
                else:
                    self._print(record.what)
            case Reading():
                self._show_reading(record)
            case Prepared():
                self._print(Padding(prepared_table(record), (0, 0, 1, 0)))
                if self._live_line:
                    self._live_line.wait("before the first step")
            case StepDone():
                self._show_step(record)
            case Answered():
                self._answers.append(record)
            case Finished():
                self.finished = record
            case (
                Evaluated()
                | Saved()
                | RowsSkipped()
                | StreamRead()
                | StepSkipped()
                | Planned()
                | PlanRevised()
                | Resumed()
            ):
                self._print(event_line(record))

    def _show_reading(self, record: Reading) -> None:
        if self._live_line:
            self._live_line.read(record)
        elif time.monotonic() - self._last_reading_time >= _MAX_SILENT_SECONDS:
            self._last_reading_time = time.monotonic()
            self._print(reading_line(record))

    def show_end(self) -> None:
        """The answers and the final table, below all else and with no live line left."""
        after = [record for record in self._answers if record.when == "after"]
        if after:
            before = [record for record in self._answers if record.when == "before"]
            self._print("")
            self._print(answers_table(before, after))
        if self.finished:
            question = after[0].question if after else None
            if not after:
                self._print("")
            # Not wrapped: a command that is broken into lines cannot be copied.
            self._console.print(finished_table(self.finished, question=question), highlight=False, crop=False)

    def _show_step(self, record: StepDone) -> None:
        self._recent_seconds.append(record.seconds)
        seconds_left = self._seconds_left(record)
        if self._live_line:
            self._live_line.move(record, seconds_left)
            return
        self._silent_seconds += record.seconds
        last = self._last_line_step
        is_due = last is None or (record.step - last) * _MAX_LINES_PER_RUN >= record.num_steps
        if is_due or record.step == record.num_steps or self._silent_seconds >= _MAX_SILENT_SECONDS:
            self._last_line_step = record.step
            self._silent_seconds = 0.0
            self._print(step_line(record, seconds_left=seconds_left))

    def _seconds_left(self, record: StepDone) -> float | None:
        """None after the last step, and the first one seen, which is slower than any other (caches, allocator)."""
        if len(self._recent_seconds) < 2 or record.step == record.num_steps:
            return None
        recent = sorted(self._recent_seconds)
        return recent[len(recent) // 2] * (record.num_steps - record.step)

    def _print(self, renderable: RenderableType) -> None:
        # On a terminal lines wrap; in a log file one record stays one line.
        self._console.print(renderable, highlight=False, soft_wrap=self._live_line is None and _is_line(renderable))


def _is_line(renderable: RenderableType) -> bool:
    return isinstance(renderable, Text | str)


def _start_live_line(console: Console) -> _LiveLine | None:
    if console.is_terminal:
        return _LiveLine(console)
    console.print("loading the base and the data", highlight=False)
    return None
