"""SIGTERM and Ctrl+C ask a run to stop after its step, Ctrl+C an answer after its token; a second one stops at once.

Imports no torch, and is to be entered before tokenising and loading, so that a signal there is not lost either.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

WATCHED_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2
_SHOW_CURSOR = "\x1b[?25h"  # a live progress display hides it, and would not be asked to give it back


class Interruption:
    """Whether the user, or the machine's owner, asked for an end; read by the loop between its units of work."""

    __slots__ = ("_signal",)

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self._signal is not None

    @property
    def signal_name(self) -> str | None:
        """ "SIGTERM" or "SIGINT" once requested."""
        return self._signal.name if self._signal else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread: sets a flag, and says so without touching Python's streams."""
        if self._signal is not None:
            if os.isatty(_STDERR):
                _tell(_SHOW_CURSOR)
            os._exit(128 + number)  # no clean-up: the last commit is intact, whatever was going on
        self._signal = signal.Signals(number)
        name = "Ctrl+C" if self._signal is signal.SIGINT else self._signal.name
        # The line feed first leaves the line that a live progress display is on.
        _tell(f"\n{name}: finishing this step, then saving. Once more stops at once, without saving.\n")


@contextmanager
def watch_signals() -> Iterator[Interruption]:
    """Turn the first SIGTERM or SIGINT into a flag and let the second exit with 128 + its number.

    Yields:
        The flag. The handlers before are put back at the end.

    Raises:
        ValueError: not called from the main thread, which is the one that Python gives signals to.
    """
    interruption = Interruption()
    previous = {number: signal.getsignal(number) for number in WATCHED_SIGNALS}
    try:
        for number in WATCHED_SIGNALS:
            signal.signal(number, interruption._receive)
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


@contextmanager
def watch_interrupt() -> Iterator[Event]:
    """Turn the first Ctrl+C into a flag; the second is Python's own again.

    Yields:
        The flag. The handler before is put back at the end.

    Raises:
        ValueError: not called from the main thread, which is the one that Python gives signals to.
        KeyboardInterrupt: a second one.
    """
    flag = Event()
    previous = signal.getsignal(signal.SIGINT)

    def receive(number: int, frame: FrameType | None) -> None:
        flag.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, receive)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


def _tell(text: str) -> None:
    try:
        os.write(_STDERR, text.encode())
    except OSError:  # the terminal is gone; the run still ends in order
        return
