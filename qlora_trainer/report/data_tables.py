"""What `data check` found, as tables, and samples coloured by what is learned of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qlora_trainer.data.check import Problem
from qlora_trainer.data.samples import Sample
from qlora_trainer.report.formats import counted
from qlora_trainer.report.screen import printable
from qlora_trainer.run.data_check import DataReport, SetReport

_BAR_WIDTH = 40
_MAX_EXAMPLE_CHARACTERS = 300
# Two shades each, in turn, so that the borders between tokens show.
_LEARNED_STYLES = ("black on green", "black on bright_green")
_READ_STYLES = ("dim", "")
_LEARNED_MARKS = ("⟦", "⟧")  # for a file or a terminal without colours


def data_report(report: DataReport, *, has_colours: bool) -> RenderableType:
    """Everything, the samples first and what would stop a run last.

    Args:
        report: of `run.data_check`.
        has_colours: otherwise what is learned stands between marks.
    """
    blocks: list[RenderableType] = []
    for number, sample in enumerate(report.samples, start=1):
        # Not the title of the rule, which would cut the line number off a long path; no markup: paths hold brackets.
        title = Text(f"sample {number}: {sample.where}", style="bold")
        blocks += [Rule(style="dim"), title, _sample(sample, has_colours)]
    if report.samples:
        what = "on green" if has_colours else f"between {' and '.join(_LEARNED_MARKS)}"
        blocks.append(Text(f"{what}: learned, token by token; the rest is read only\n", style="dim"))
    blocks.append(_set("train", report.train, report))
    if report.evaluation:
        blocks.append(_set("eval", report.evaluation, report))
    blocks += [Text(f"error: {error}", style="red") for error in report.errors]
    return Group(*blocks)


def _sample(sample: Sample, has_colours: bool) -> RenderableType:
    text = Text()
    was_learned = False
    for number, piece in enumerate(sample.pieces):
        if not has_colours and piece.is_learned != was_learned:
            text.append(_LEARNED_MARKS[was_learned])
        styles = _LEARNED_STYLES if piece.is_learned else _READ_STYLES
        text.append(_visible(piece.text), style=styles[number % 2] if has_colours else "")
        was_learned = piece.is_learned
    if was_learned and not has_colours:
        text.append(_LEARNED_MARKS[1])
    return Padding(text, (0, 0, 1, 0))


def _visible(text: str) -> str:
    """A line feed as a mark and a line feed, a tab as a mark; nothing that a terminal would obey."""
    marked = text.replace("\n", "↵\n").replace("\t", "→")
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "·" for c in marked)


def _set(name: str, found: SetReport, report: DataReport) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in _facts(found, report):
        table.add_row(label, Text(value))
    problems = [*_problems(found.bad, "red"), *_problems(found.warnings, "yellow")]
    return Padding(Group(Text(name, style="bold"), table, _histogram(found, report.seq_len), *problems), (0, 0, 1, 0))


def _facts(found: SetReport, report: DataReport) -> list[tuple[str, str]]:
    share = found.num_supervised_tokens / found.num_tokens if found.num_tokens else 0.0
    median, p90, p99, longest = found.percentiles
    beginning = "the first of a stream (--set data.streaming=false reads all), " if found.is_beginning else ""
    facts = [
        *(
            ("file", f"{file.path}: {counted(file.num_rows, 'row')} of the form {file.format_name}")
            for file in found.files
        ),
        ("rows", f"{found.num_rows:,}, {beginning}of which {found.num_bad:,} bad and {found.num_repeated:,} repeated"),
        (
            "documents",
            f"{found.num_documents:,}; {found.num_overlong:,} rows longer than {report.seq_len:,} tokens "
            f"({report.overlong}), {found.num_dropped_untrainable:,} dropped without a token to learn",
        ),
        ("tokens", f"{found.num_tokens:,}, {found.num_supervised_tokens:,} of them learned ({share:.1%})"),
        ("length", f"p50 {median:,}, p90 {p90:,}, p99 {p99:,}, longest {longest:,}"),
        ("seq_len", f"{report.seq_len:,} tokens, by the tokenizer of {report.base}"),
        ("stop token", f"learned in {found.num_with_stop:,} of {found.num_documents:,} documents"),
        ("double BOS", f"in {counted(found.num_double_bos, 'row')}"),
        ("empty answer", f"in {counted(found.num_empty_answers, 'row')}"),
        ("no question", f"in {counted(found.num_empty_questions, 'row')}"),
    ]
    if found.num_rewritten_turns:
        what = f"{found.num_rewritten_turns:,} earlier answers are read, not learned: the chat template rewrites them"
        facts.append(("not learned", what))
    if found.num_lost_names:
        what = f"of {counted(found.num_lost_names, 'message')}: the chat template does not render it"
        facts.append(("lost name", what))
    if found is report.train and report.num_held_out:
        facts.append(("held out", f"{counted(report.num_held_out, 'row')} of these, for evaluation"))
    return facts


def _histogram(found: SetReport, seq_len: int) -> RenderableType:
    """Bars, as long as there are rows of such a length; those that are too long are red."""
    if not found.num_good:
        return Text("")
    most = max(count for _, count in found.histogram)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column()
    table.add_column(justify="right")
    for end, count in found.histogram:
        bar = "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else "")
        table.add_row(f"≤ {end:,}", Text(bar, style="red" if end > seq_len else "cyan"), f"{count:,}")
    return Padding(table, (1, 0, 1, 2))


def _problems(problems: Sequence[Problem], style: str) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for problem in problems:
        lines.append(Text(f"{counted(problem.num_rows, 'row')}: {problem.kind}", style=style))
        lines += [Text(f"  {printable(example, _MAX_EXAMPLE_CHARACTERS)}") for example in problem.examples]
        if len(problem.examples) < problem.num_rows:
            lines.append(Text(f"  and {problem.num_rows - len(problem.examples):,} more", style="dim"))
    return lines
