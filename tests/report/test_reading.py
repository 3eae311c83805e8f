"""The bar over data that is being read: on a terminal it moves and goes; a pipe sees nothing of it."""

from __future__ import annotations

import io
import time
from collections.abc import Generator

import pytest
from rich.console import Console

from qlora_trainer.data.rows import Reading
from qlora_trainer.report.reading import watched
from qlora_trainer.run.records import Preparing

PATIENCE_SECONDS = 20.0  # it is drawn ten times a second


def read(out: io.StringIO, *, is_watched: bool) -> Generator[Reading | Preparing, None, int]:
    """Goes on when what it last said is drawn."""
    yield Preparing(what="reading [b]notes[/b]")
    _wait_for("[b]notes[/b]", out, is_watched)
    for share in (0.25, 0.75):
        yield Reading("rows [v2].jsonl", round(4000 * share), share)
        _wait_for(f"{round(4000 * share):,} rows", out, is_watched)
    return 4000


def _wait_for(text: str, out: io.StringIO, is_watched: bool) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while is_watched and text not in out.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_shows_how_far_data_is_on_a_terminal_only(is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100, _environ={"TERM": "xterm"})
    assert watched(read(out, is_watched=is_terminal), console) == 4000
    shown = out.getvalue()
    if not is_terminal:
        assert shown == ""
        return
    for text in ("[b]notes[/b]", "1,000 rows", "3,000 rows", "rows [v2].jsonl", "━"):
        assert text in shown, text
    assert shown.endswith("\x1b[2K"), "the bar stays"
