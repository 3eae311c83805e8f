from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from qlora_trainer.data.rows import Reading
from qlora_trainer.errors import DivergedError, InterruptedAndSaved
from qlora_trainer.report.progress import show
from qlora_trainer.report.screen import printable
from qlora_trainer.run.records import Evaluated, Record, Resumed
from tests.report.run_records import RUN, answered, finished, prepared, step_done, whole_run


def shown(records: Iterable[Record], *, is_terminal: bool, width: int = 80) -> str:
    console = Console(file=io.StringIO(), record=True, force_terminal=is_terminal, width=width, color_system=None)
    show(records, console)
    return console.export_text()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_tells_what_it_is_does_and_reached(is_terminal: bool) -> None:
    text = shown(whole_run(), is_terminal=is_terminal)
    facts = [
        "  base       smollm2-135m in NF4, 134.5 M parameters, frozen",
        "  adapter    4.88 M parameters, 3.63 % of the base",
        "  compute    float32 on cpu",
        "  train      1,520 documents, 182,341 tokens (97,212 supervised)",
        "  lengths    104 tokens at the median, 90 %: 161, 99 %: 188, longest: 192",
        "  eval       180 documents held out",
        "  stops      a stop token is learned in 1,517 of 1,518 rows",
        "  repeated   2 rows like an earlier one",
        "  dropped    3 documents, too long or with nothing to train on",
        "  plan       100 steps of 16 documents",
        "  limits     192 tokens a document, 1,024 tokens at once",
        "  folder     runs/my run",
        "eval loss 2.9123 before training  (12,034 tokens, 9.7 s)",
        "eval loss 2.1000 at step 50, the best so far  (12,034 tokens, 9.7 s)",
        "saved runs/my run/checkpoints/step-00000050  (74.6 MiB, 0.21 s)",
        "What does `ast.parse` do?",
        " before                     after                      reference",
        "done: 100 steps",
        "  eval loss    2.9123 before, 1.8212 after  (-37.5 %)",
        "  speed        1,000 tokens/s",
        "  trained      200,000 tokens in 3:20",
        "  peak memory  1.42 GiB, 1.38 GiB predicted",
        "  adapter      runs/my run/adapter",
        "try it with",
        "  qlora-trainer generate 'runs/my run' --prompt 'What does `ast.parse` do?'",
    ]
    # On a terminal a recorded line may begin with the live line that it was drawn over.
    lines = iter(line.rstrip() for line in text.splitlines())
    for fact in facts:
        assert any(line.endswith(fact) for line in lines), fact  # in this order: `any` goes on where it stopped
    assert "loading the base and the data" in text


def test_a_stream_is_told_as_one() -> None:
    text = shown([replace(prepared(10), is_stream=True)], is_terminal=False, width=120)
    assert "  train      a stream; at its start 1,520 documents, 182,341 tokens (97,212 supervised)" in text


def test_reading_is_shown_before_and_between_the_steps() -> None:
    """A bar with its share before the first step; the next rows of a stream in place of the step's line.

    Mutation tried: `read` that starts the first line again below the second.
    """
    reading = [Reading("rows.jsonl", 1000, 0.25), Reading("rows.jsonl", 2000, 0.5)]
    checking, tokenising = (
        [replace(record, doing=doing) for record in reading] for doing in ("checking", "tokenising")
    )
    before = shown([*checking, *tokenising, prepared(2)], is_terminal=True, width=120)
    assert "checking rows.jsonl: 2,000 rows, 50% of the file" in before
    assert "tokenising rows.jsonl: 2,000 rows, 50% of the file" in before
    between: list[Record] = [prepared(2), step_done(1, 2), *reading, step_done(2, 2)]
    assert "reading rows.jsonl: 2,000 rows, 50% of the file" in shown(between, is_terminal=True, width=120)
    assert "reading rows" not in shown(between, is_terminal=False)


def test_a_log_file_gets_forty_step_lines_and_no_escape_codes() -> None:
    text = shown(whole_run(num_steps=400), is_terminal=False)
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(steps) == 41
    assert steps[0] == "step   1/400  loss 2.9975  lr 2.00e-04  1,000 tokens/s  memory 1.20 GiB (peak 1.42 GiB)"
    assert steps[1].endswith("  memory 1.20 GiB (peak 1.42 GiB)  12:58 left")
    assert steps[-1].startswith("step 400/400  loss 2.0000")
    assert "left" not in steps[-1]
    assert "\x1b" not in text


def test_a_slow_run_is_not_silent() -> None:
    records = [step_done(step, 1000, seconds=31.0) for step in range(1, 7)]
    text = shown(records, is_terminal=False)
    assert re.findall(r"step +(\d+)/1000", text) == ["1", "3", "5"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_gets_one_live_line(width: int) -> None:
    """Fails when the line wraps: the message of a signal handler below it would be drawn over."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)

    def records() -> Iterator[Record]:
        yield prepared(10)
        for step in (1, 2):
            yield step_done(step, 10)

    show(records(), console)
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    drawn = [re.sub(r"\x1b\[[0-9;?]*\w", "", line) for line in re.split(r"[\r\n]+", written)]
    live = [line for line in drawn if "step 2/10" in line]
    assert live
    assert all(len(line) <= width for line in live)
    assert "16 s" not in written
    assert ("━" in written) is (width >= 100)
    if width >= 80:
        assert "step 2/10 · 0:16 left · loss 2.8000 · 1,000 tok/s · 1.20 GiB, peak 1.42 GiB" in live[-1]
    assert written.count("\x1b[1A") <= 2  # the cursor goes up at the two ends of a live line only
    assert written.rstrip().endswith("\x1b[2K")
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is given back


def test_an_answer_is_never_markup_or_an_escape_code() -> None:
    text = shown(whole_run(), is_terminal=True)
    joined = " ".join(text.split())
    assert "[bold]parses[/bold]" in joined
    assert "\x1b[31m" not in text
    assert printable("a\x1b[31m\x07\n\tb\u202e", 50) == "a[31m b"
    assert printable("word " * 9, 10) == "word word…"


def test_a_resumed_run_shows_the_answers_it_has() -> None:
    _, after = answered()
    resumed = Resumed(
        step=20, path=RUN / "checkpoints/step-00000020", rejected=("step-00000030 (state.json: missing)",)
    )
    text = shown([prepared(30), resumed, step_done(21, 30), after, finished("stopped_early")], is_terminal=False)
    assert "resumed at step 20 from runs/my run/checkpoints/step-00000020" in text
    assert "passed over, damaged: step-00000030 (state.json: missing)" in text
    assert "stopped early at step 100: the eval loss no longer falls" in text
    header = next(line for line in text.splitlines() if "reference" in line)
    assert header.split() == ["after", "reference"]


def test_an_interrupted_run_says_how_to_go_on() -> None:
    text = shown([prepared(30), step_done(1, 30), finished("interrupted", steps=1)], is_terminal=True)
    lines = [line.rstrip() for line in text.splitlines()]
    assert "interrupted at step 1; everything is saved" in lines
    assert "  eval loss    2.9123 before" in lines
    assert lines[-2:] == ["go on with", "  qlora-trainer train 'runs/my run/config.yaml' --resume auto"]


def test_an_empty_answer_and_a_worse_evaluation_are_said() -> None:
    before, after = answered(after="")
    worse = Evaluated(step=5, eval_loss=3.5, eval_tokens=10, seconds=0.5, is_best=False)
    text = shown([before, worse, after], is_terminal=False)
    assert "(nothing)" in text
    assert "eval loss 3.5000 at step 5  (10 tokens, 0.50 s)" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_error_after_the_last_record_does_not_hide_the_table(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), record=True, force_terminal=is_terminal, width=80)

    def records() -> Iterator[Record]:
        yield step_done(1, 10)
        yield finished("interrupted", steps=1)
        raise InterruptedAndSaved(where="runs/a", found="SIGINT", expected="no signal", fix="Resume.")

    with pytest.raises(InterruptedAndSaved):
        show(records(), console)
    assert "interrupted at step 1; everything is saved" in console.export_text()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_error_passes_through_with_the_terminal_in_order(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)

    def records() -> Iterator[Record]:
        yield prepared(10)
        yield step_done(1, 10)
        raise DivergedError(where="step 2", found="a loss of NaN", expected="a number", fix="Lower it.")

    with pytest.raises(DivergedError):
        show(records(), console)
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")


def test_the_summary_is_handed_back() -> None:
    console = Console(file=io.StringIO())
    assert show([finished()], console) == finished().summary
    assert show([], console) is None


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    program = """
import sys
from qlora_trainer.report.progress import show
from qlora_trainer.report.screen import stdout_console
from tests.report.run_records import whole_run
seen = 0
def records():
    global seen
    for record in whole_run(2000):
        seen += 1
        yield record
summary = show(records(), stdout_console())
print(seen, summary.status, file=sys.stderr)
print("nobody reads this")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading the base and the data\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == "2007 done\n"
        assert process.wait() == 0
