"""A conversation on a terminal, or through pipes: there nothing but the answers is on stdout."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TextIO

from rich.console import Console
from rich.text import Text

from qlora_trainer.report.screen import printable
from qlora_trainer.run.chat import Chat, ChatEvent, Ended, Note, Piece, Ready, Speaking

_MAX_NOTE_CHARACTERS = 500


class TypedLines(Iterator[str]):
    """Lines of `stream`; a person is asked for each with `prompt`, and may press Ctrl+C at it without ending anything.

    Args:
        stream: stdin, or what stands for it.
        is_terminal: whether somebody sits there, and sees what is printed.
    """

    def __init__(self, stream: TextIO, *, is_terminal: bool) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        if is_terminal:
            with suppress(ImportError):  # not in every Python; it gives `input` arrow keys and a history
                import readline  # noqa: F401
        self._stream = stream
        self._is_terminal = is_terminal
        self.prompt = ""

    def __next__(self) -> str:
        while self._is_terminal:
            try:
                return input(self.prompt)
            except KeyboardInterrupt:
                print("\n(Ctrl+D or /quit ends)")
            except EOFError:
                print()
                raise StopIteration from None
        line = self._stream.readline()
        if not line:
            raise StopIteration
        return line


def show_greeting(chat: Chat, notes: Console) -> None:
    """Who is there."""
    there = f"{chat.named.base.name} with {', '.join(chat.speakers)}. /help tells the commands."
    notes.print(Text(_note(there), style="dim"), soft_wrap=True)


def show_chat(events: Iterable[ChatEvent], lines: TypedLines, console: Console, notes: Console) -> None:
    """Shows a conversation while it is held.

    Args:
        events: of `run.chat.converse`.
        lines: whose prompt names who answers next.
        console: for what the model says.
        notes: for what we say.
    """
    for event in events:
        if console.quiet:  # its reader is gone
            return
        match event:
            case Ready():
                lines.prompt = f"{event.speaker}> "
            case Speaking():
                console.print(Text(f"[{event.speaker}]", style="bold"), soft_wrap=True)
            case Piece():
                _write(console, _visible(event.text))
            case Ended():
                console.print(Text("" if event.answer.text else "(nothing)", style="dim"))
            case Note():
                notes.print(Text(_note(event.text), style="dim"), soft_wrap=True)


def _write(console: Console, text: str) -> None:
    """As it is: rich would put spaces for tabs, and wrap or strip what is longer than a line."""
    try:
        console.file.write(text)
        console.file.flush()
    except BrokenPipeError:
        console.on_broken_pipe()


def _note(text: str) -> str:
    return text if text.isprintable() else printable(text, _MAX_NOTE_CHARACTERS)


def _visible(text: str) -> str:
    """Words of a model, safe to show: their lines stay, control and escape characters go."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character)[0] != "C")


def is_held_by_a_person() -> bool:
    """Whether stdin and stdout are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()
