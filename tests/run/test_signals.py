from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from qlora_trainer.run.signals import watch_signals

WATCH = """
import sys, time
from qlora_trainer.run.signals import watch_signals
assert "torch" not in sys.modules
with watch_signals() as interruption:
    print("ready", flush=True)
    while not interruption.requested:
        time.sleep(0.01)
    print(interruption.signal_name, flush=True)
    if sys.argv[1] == "stay":
        time.sleep(60)
print("saved", flush=True)
"""


def start(argument: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH, argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_a_flag_and_says_so(number: signal.Signals) -> None:
    with start("go") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert out == f"{number.name}\nsaved\n"
    assert "finishing this step, then saving" in err
    assert process.returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_exits_at_once(second: signal.Signals) -> None:
    with start("stay") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "SIGTERM\n"
        process.send_signal(second)
        out, _ = process.communicate(timeout=20)
    assert out == ""
    assert process.returncode == 128 + second


def test_the_handlers_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with watch_signals() as interruption:
        assert signal.getsignal(signal.SIGINT) != before[1]
        assert not interruption.requested
        assert interruption.signal_name is None
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        assert interruption.signal_name == "SIGINT"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_terminal_that_is_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_trainer.run.signals._STDERR", 10**6)
    with watch_signals() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested


def test_only_the_main_thread_may_watch() -> None:
    problems: list[str] = []

    def watch() -> None:
        try:
            with watch_signals():
                problems.append("entered")
        except ValueError as error:
            problems.append(str(error))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert len(problems) == 1
    assert "main thread" in problems[0]
