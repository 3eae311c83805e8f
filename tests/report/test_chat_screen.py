"""A conversation as a person sees it on a terminal, and as a program reads it from a pipe."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from qlora_trainer.cli.app import main
from qlora_trainer.report.chat_screen import TypedLines, show_chat
from qlora_trainer.report.screen import OutlivingConsole
from qlora_trainer.run.chat import ChatEvent, Ended, Note, Piece, Ready, Speaking
from qlora_trainer.run.streamed_answer import Streamed
from tests.run.tiny_adapters import write_adapter
from tests.run.tiny_run import write_base


def events(*texts: str) -> list[ChatEvent]:
    return [Ready("a"), *map(Piece, texts), Ended(Streamed("".join(texts), 3, "stop"))]


def test_through_a_pipe_there_are_the_answers_alone() -> None:
    out, notes = io.StringIO(), io.StringIO()
    lines = TypedLines(io.StringIO("Hi\nHello"), is_terminal=False)
    long = "word " * 100 + "\n\tnext  "
    shown = [*events("Four", ".", " "), Note("cut"), Speaking("b"), *events(long), *events()]
    show_chat(shown, lines, Console(file=out, width=40), Console(file=notes, width=40))
    assert out.getvalue() == f"Four. \n[b]\n{long}\n(nothing)\n"
    assert notes.getvalue() == "cut\n"
    assert list(lines) == ["Hi\n", "Hello"]


def test_a_model_cannot_write_to_the_terminal() -> None:
    out, notes = io.StringIO(), io.StringIO()
    lines = TypedLines(io.StringIO(), is_terminal=False)
    show_chat(
        [*events("[b]red\x1b[31m\a\u202e[/b]\r\n"), Note("a\x1b[31m")], lines, Console(file=out), Console(file=notes)
    )
    assert out.getvalue() == "[b]red[31m[/b]\n\n"
    assert notes.getvalue() == "a[31m\n"


def test_a_reader_that_is_gone_ends_it() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    seen = []

    def told() -> Iterator[ChatEvent]:
        for event in events("a", "b"):
            seen.append(event)
            yield event

    console = Console(file=Gone())
    console.on_broken_pipe = lambda: setattr(console, "quiet", True)  # type: ignore[method-assign]
    show_chat(told(), TypedLines(io.StringIO(), is_terminal=False), console, Console(file=io.StringIO()))
    assert seen == events("a", "b")[:3]
    assert OutlivingConsole.on_broken_pipe is not Console.on_broken_pipe


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.master, slave = pty.openpty()
        # A handler becomes the default one in a child, but what is ignored stays so: all of a script's background is.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "qlora_trainer.cli", *arguments],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "dumb"},
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 120.0) -> str:
        """What is shown up to `text`, which has to come."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1.0)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press_ctrl_c_until(self, text: str) -> str:
        """As a person does: again where nothing happens. Just before it reads, Python only notes the signal."""
        for _ in range(30):
            os.kill(self.child.pid, signal.SIGINT)
            with suppress(AssertionError):
                return self.until(text, seconds=4.0)
        return self.until(text, seconds=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        base = write_base(folder / "base")
        write_adapter(folder / "sums", base, seed=1)
        write_adapter(folder / "other", base, seed=2)
    return folder


def test_a_person_talks_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    terminal = Terminal("chat", "sums", "--adapter", "b=other", "--max-new-tokens", "5", cwd=folder)
    try:
        assert "with base, sums, b. /help tells the commands." in terminal.until("sums> ")
        terminal.press_ctrl_c_until("(Ctrl+D or /quit ends)")  # at the prompt: a hint, and the prompt again
        terminal.until("sums> ")
        terminal.type("What is 2 + 2?\n")
        assert "cut after 5 tokens" in terminal.until("sums> ")
        terminal.type("/use b\n")
        assert "b goes on with this conversation" in terminal.until("b> ")
        terminal.type("/compare\n")
        compared = terminal.until("b> ")
        assert [compared.index(f"[{name}]") for name in ("base", "sums", "b")] == sorted(
            compared.index(f"[{name}]") for name in ("base", "sums", "b")
        )
        terminal.type("\x04")
        assert terminal.child.wait(timeout=60) == 0
    finally:
        terminal.child.kill()
        terminal.child.wait()
        os.close(terminal.master)


def test_a_program_talks_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    typed = io.TextIOWrapper(io.BytesIO(b"What is 2 + 2?\n/frob\n\xff\xfe\n/use base\nHi"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["chat", str(folder / "sums"), "--max-new-tokens", "5"]) == 0
    out, err = capfd.readouterr()
    assert "sums>" not in out
    assert out.endswith("\n")
    cut = "cut after 5 tokens (--max-new-tokens)"
    said = ["no command /frob. See /help.", cut, "base goes on with this conversation", cut]
    assert err.splitlines()[-5:] == [cut, *said]
