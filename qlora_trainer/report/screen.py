"""The console that a run writes to: it outlives the terminal, and shows nothing that a model or a file made up."""

from __future__ import annotations

import io
import os
import sys
import unicodedata

from rich.console import Console


class OutlivingConsole(Console):
    """A console that falls silent when its reader is gone; rich's own would end the program, and so the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What Python still flushes at exit must not fail either.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def stdout_console() -> Console:
    """A console over stdout for `progress.show`; a character that stdout cannot encode is shown as "?"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return OutlivingConsole(highlight=False)


def stderr_console() -> Console:
    """A console for how far something is, so that stdout holds the result alone."""
    return Console(stderr=True, highlight=False)


def printable(text: str, max_characters: int) -> str:
    """Text from a model or a data set, safe to show: one paragraph, no control or escape characters, cut to a length.

    Args:
        text: anything.
        max_characters: at least 1; a cut is marked with "…".
    """
    one_line = " ".join(text.split())
    kept = "".join(character for character in one_line if unicodedata.category(character)[0] != "C")
    return kept if len(kept) <= max_characters else kept[: max_characters - 1].rstrip() + "…"
