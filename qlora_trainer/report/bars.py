"""Bars of parts of a total, as wide as their column, and what the blocks of a plan's report have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

MAX_WIDTH = 100  # columns; longer bars say no more
MARK = "►"  # before the one of many that counts


class Fill(NamedTuple):
    """What a group of categories is drawn with."""

    character: str
    style: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts of a total, side by side, over the whole width.

    Attributes:
        parts: bytes, and what they are drawn with.
        total_bytes: what the width stands for.
        limit_bytes: the budget; what lies beyond it is red.
        label: written below, pointing at the limit; nothing if empty.
    """

    parts: tuple[tuple[int, Fill], ...]
    total_bytes: int
    limit_bytes: int
    label: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        bar = Text(no_wrap=True)
        end_bytes = 0
        for num_bytes, fill in self.parts:
            end_bytes += max(0, num_bytes)
            # Ends are rounded, not lengths: the errors of many parts do not add up.
            bar.append(fill.character * (self._cells(end_bytes, width) - len(bar)), style=fill.style)
        limit = self._cells(self.limit_bytes, width)
        bar.stylize("red", limit)
        yield bar
        if self.label:
            before, after = f"{self.label} ▲", f"▲ {self.label}"
            below = before.rjust(limit) if len(before) <= limit else " " * max(0, limit - 1) + after
            yield Text(below, style="dim", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, options.max_width), options.max_width)

    def _cells(self, num_bytes: int, width: int) -> int:
        return round(width * num_bytes / self.total_bytes)
