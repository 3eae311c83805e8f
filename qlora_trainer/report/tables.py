"""Records as blocks and lines of text; no state, no printing.

Everything that came from a user, a model or a file is put into `Text`, never into markup.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_trainer.data.rows import Reading
from qlora_trainer.report.formats import counted, format_bytes, format_change, format_clock, format_loss, format_seconds
from qlora_trainer.report.screen import printable
from qlora_trainer.run.records import (
    Answered,
    Evaluated,
    Finished,
    Planned,
    PlanRevised,
    Prepared,
    Resumed,
    RowsSkipped,
    Saved,
    StepDone,
    StepSkipped,
    StreamRead,
)

_MAX_QUESTION_CHARACTERS = 200
_MAX_ANSWER_CHARACTERS = 400
PLAN_TOLERANCE = 0.02  # by which a run may exceed its plan without a word


def prepared_table(record: Prepared) -> RenderableType:
    """What is about to be trained, on what, and for how long."""
    share_percent = record.trainable_parameters / record.base_parameters * 100
    documents = counted(record.num_train_documents, "document")
    if record.is_stream:
        documents = f"a stream; at its start {documents}"
    facts = [
        ("base", f"{record.base} in NF4, {record.base_parameters / 1e6:,.1f} M parameters, frozen"),
        ("adapter", f"{record.trainable_parameters / 1e6:,.2f} M parameters, {share_percent:.2f} % of the base"),
        ("compute", f"{record.compute_dtype} on {record.device}"),
        ("train", f"{documents}, {record.num_tokens:,} tokens ({record.num_supervised_tokens:,} supervised)"),
        (
            "lengths",
            "{:,} tokens at the median, 90 %: {:,}, 99 %: {:,}, longest: {:,}".format(*record.length_percentiles),
        ),
        ("eval", counted(record.num_eval_documents, "document") + " held out"),
    ]
    stops = f"a stop token is learned in {record.num_stopping_rows:,} of {counted(record.num_kept_rows, 'row')}"
    facts.append(("stops", stops))
    if record.num_repeated_rows:
        facts.append(("repeated", f"{counted(record.num_repeated_rows, 'row')} like an earlier one"))
    if record.num_dropped_documents:
        dropped = counted(record.num_dropped_documents, "document")
        facts.append(("dropped", f"{dropped}, too long or with nothing to train on"))
    if not record.packs:
        why = "" if record.can_pack else "; packed ones would read each other in this architecture"
        facts.append(("rows", f"one document each, padded{why}"))
    facts += [
        ("plan", f"{counted(record.num_steps, 'step')} of {counted(record.global_batch_size, 'document')}"),
        ("limits", f"{record.seq_len:,} tokens a document, {record.micro_batch_tokens:,} tokens at once"),
        ("folder", str(record.run_path)),
    ]
    return _facts(*facts)


def reading_line(record: Reading) -> str:
    """How far a file is read, checked or tokenised."""
    return f"{record.doing} {record.path}: {counted(record.num_rows, 'row')}, {record.share:.0%} of the file"


def step_line(record: StepDone, *, seconds_left: float | None) -> Text:
    """One step as a plain line, for a log file."""
    width = len(str(record.num_steps))
    parts = (
        f"step {record.step:>{width}}/{record.num_steps}",
        f"loss {format_loss(record.loss)}",
        f"lr {record.lr:.2e}" + ("" if record.lr_b is None else f" (B {record.lr_b:.2e})"),
        f"{record.tokens_per_second:,.0f} tokens/s",
        f"memory {format_bytes(record.memory_bytes)} (peak {format_bytes(record.peak_bytes)})",
        "" if seconds_left is None else f"{format_clock(seconds_left)} left",
    )
    return Text("  ".join(part for part in parts if part))


Event = Evaluated | Saved | RowsSkipped | StreamRead | StepSkipped | Planned | PlanRevised | Resumed


def event_line(record: Event) -> Text:
    """What happened, as a line or a few."""
    match record:
        case Evaluated():
            return eval_line(record)
        case Saved():
            return saved_line(record)
        case RowsSkipped():
            return rows_skipped_lines(record)
        case StreamRead():
            return stream_line(record)
        case StepSkipped():
            return skipped_line(record)
        case Planned():
            return planned_line(record)
        case PlanRevised():
            return revised_line(record)
        case Resumed():
            return resumed_lines(record)


def stream_line(record: StreamRead) -> Text:
    """The rows of a stream that are trained on next, as a line."""
    last = record.first_row + record.num_rows - 1
    line = Text(f"stream: rows {record.first_row:,} to {last:,}, {counted(record.num_documents, 'document')}")
    for count, what in ((record.num_dropped, "dropped"), (record.num_changed, "cut or split")):
        if count:
            line.append(f", {counted(count, 'row')} {what}")
    return line


def planned_line(record: Planned) -> Text:
    """What the plan decided, as a line."""
    knobs, predicted = record.plan.knobs, record.plan.predicted
    line = Text(f"plan: {format_bytes(predicted.process_peak_bytes)} of {format_bytes(record.plan.budget_bytes)}, ")
    line.append(f"{knobs.micro_batch_tokens:,} tokens at once, {counted(knobs.activation_keep_layers, 'layer')} kept, ")
    line.append(f"{knobs.activation_recompute_layers} recomputed, loss in chunks of {knobs.loss_chunk}, ")
    return line.append(f"{knobs.optimizer}; about {predicted.tokens_per_second:,.0f} tokens/s")


def revised_line(record: PlanRevised) -> Text:
    """That memory ran out, and how it goes on."""
    where = {
        "rehearsal": "in the rehearsal",
        "step": f"at step {record.step}",
        "evaluation": f"in the evaluation at step {record.step}",
    }[record.phase]
    cut = f"{record.micro_batch_tokens_before:,} to {record.micro_batch_tokens:,} tokens"
    return Text(f"out of memory {where}: the same documents again, micro-batches cut from {cut}", style="yellow")


def eval_line(record: Evaluated) -> Text:
    """One evaluation as a line."""
    where = "before training" if record.step == 0 else f"at step {record.step}"
    line = Text(f"eval loss {format_loss(record.eval_loss)} {where}")
    if record.is_best and record.step:
        line.append(", the best so far", style="green")
    line.append(f"  ({record.eval_tokens:,} tokens, {format_seconds(record.seconds)})", style="dim")
    return line


def saved_line(record: Saved) -> Text:
    """One committed checkpoint as a line."""
    size = f"{format_bytes(record.num_bytes)}, {format_seconds(record.seconds)}"
    return Text(f"saved {record.path}  ({size})", style="dim")


def rows_skipped_lines(record: RowsSkipped) -> Text:
    """How many rows were passed over, and why the first of them were."""
    lines = Text(f"{counted(record.num_rows, 'bad row')} of {record.path} skipped", style="yellow")
    for reason in record.reasons:
        lines.append(f"\n  {printable(reason, 300)}")
    if record.num_rows > len(record.reasons):
        lines.append(f"\n  and {record.num_rows - len(record.reasons):,} more")
    return lines


def skipped_line(record: StepSkipped) -> Text:
    """That a step changed nothing, and the rows it was about."""
    rows = printable(", ".join(map(str, record.rows)), 200)
    found = f"loss {record.loss}, gradient norm {record.grad_norm} on rows {rows}"
    if record.is_overflow:
        found = f"gradients beyond fp16 at a loss scale of {record.loss_scale:,.0f}, which is halved"
    return Text(f"step {record.step} skipped, no weight was changed: {found}", style="yellow")


def resumed_lines(record: Resumed) -> Text:
    """Where a run goes on, and what it had to pass over."""
    lines = Text(f"resumed at step {record.step} from {record.path}")
    for reason in record.rejected:
        lines.append(f"\npassed over, damaged: {printable(reason, 500)}", style="yellow")
    for change in record.changes:
        lines.append(f"\nchanged: {printable(change, 500)}", style="yellow")
    for note in record.notes:
        lines.append(f"\nnote: {printable(note, 500)}", style="yellow")
    return lines


def answers_table(before: Sequence[Answered], after: Sequence[Answered]) -> RenderableType:
    """Each held-out question with the answers before and after training, side by side.

    Args:
        before: may lack questions (a resumed run did not ask them before).
        after: decides which questions are shown, and their order.
    """
    earlier = {record.question: record.answer for record in before}
    blocks: list[RenderableType] = []
    for record in after:
        table = Table(box=box.HORIZONTALS, expand=True, show_edge=False, header_style="dim", border_style="dim")
        if earlier:
            table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_column("reference", ratio=1, style="dim")
        answers = [earlier.get(record.question, "")] if earlier else []
        cells = [*answers, record.answer, record.reference]
        table.add_row(*(Text(printable(cell, _MAX_ANSWER_CHARACTERS) or "(nothing)") for cell in cells))
        question = Text(printable(record.question, _MAX_QUESTION_CHARACTERS), style="bold")
        blocks += [question, Padding(table, (0, 0, 1, 0))]
    return Group(*blocks)


def finished_table(record: Finished, *, question: str | None) -> RenderableType:
    """What a run reached and took, and what to do next.

    Args:
        record: the last record.
        question: one to try the adapter with; None where the run asked none.
    """
    summary = record.summary
    headline, style = {
        "done": (f"done: {counted(summary.steps, 'step')}", "bold green"),
        "stopped_early": (f"stopped early at step {summary.steps}: the eval loss no longer falls", "bold green"),
        "interrupted": (f"interrupted at step {summary.steps}; everything is saved", "bold yellow"),
    }[record.status]
    facts = [
        ("eval loss", _loss_fact(summary.eval_loss_before, summary.eval_loss_after)),
        ("speed", f"{summary.tokens_per_second:,.0f} tokens/s"),
        ("trained", f"{summary.tokens:,} tokens in {format_seconds(summary.train_seconds)}"),
        ("peak memory", _peak_fact(summary.measured_peak_bytes, summary.predicted_peak_bytes)),
        ("device", summary.device),
    ]
    if record.adapter_path is not None:
        facts.append(("adapter", str(record.adapter_path)))
    warning = _excess(summary.measured_peak_bytes, summary.predicted_peak_bytes)
    return Group(Text(headline, style=style), _facts(*facts), *warning, *_next_command(record, question))


def _next_command(record: Finished, question: str | None) -> tuple[RenderableType, ...]:
    """The command to give next, on a line of its own: copied as it stands, it works."""
    run = shlex.quote(str(record.run_path))
    if record.status == "interrupted":
        config = shlex.quote(str(record.run_path / "config.yaml"))
        title, command = "go on with", f"qlora-trainer train {config} --resume auto"
    else:
        prompt = shlex.quote(printable(question or "Hello", _MAX_QUESTION_CHARACTERS))
        title, command = "try it with", f"qlora-trainer generate {run} --prompt {prompt}"
    return (Text(title, style="dim"), Text(f"  {command}", no_wrap=True, overflow="ignore"))


def _loss_fact(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return "not measured: nothing is held out"
    if before is None:
        return f"{format_loss(after)} after"
    if after is None:
        return f"{format_loss(before)} before"
    return f"{format_loss(before)} before, {format_loss(after)} after  ({format_change(before, after)})"


def _peak_fact(measured_bytes: int, predicted_bytes: int | None) -> str:
    predicted = "" if predicted_bytes is None else f", {format_bytes(predicted_bytes)} predicted"
    return f"{format_bytes(measured_bytes)}{predicted}"


def _excess(measured_bytes: int, predicted_bytes: int | None) -> tuple[RenderableType, ...]:
    """Said loudly: a plan that a run exceeds is a wrong number."""
    if predicted_bytes is None or measured_bytes <= predicted_bytes * (1 + PLAN_TOLERANCE):
        return ()
    percent = 100 * (measured_bytes / predicted_bytes - 1)
    text = f"  This run took {percent:.1f} % more memory than its plan said. Please report it, with plan.json."
    return (Text(text, style="bold red"),)


def _facts(*rows: tuple[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=11)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(f"  {name}"), Text(value))
    return table
