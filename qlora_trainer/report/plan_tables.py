"""A plan as blocks of text; no state, no printing.

Shares are of the budget, and a bar as wide as its column is the whole budget. Groups of categories differ in fill as
well as in colour, so that a log file says what a terminal does. The fills are in every font with box characters (WGL4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_trainer.planning.plan import FrontierCell, Plan, PlanKnobs
from qlora_trainer.report.formats import counted, format_bytes
from qlora_trainer.report.frontier_plot import length_label, size_label, speed_label
from qlora_trainer.report.screen import printable

_MAX_WIDTH = 100  # columns; longer bars say no more
_NO_LIMIT_BYTES = 2**60  # a host budget of this size means that nothing is known of the host
_RANK_WIDTH = 6
_CHOSEN = "►"


class _Fill(NamedTuple):
    """What a group of categories is drawn with."""

    character: str
    style: str


_FROZEN = _Fill("█", "blue")
_TRAINED = _Fill("▓", "magenta")
_ACTIVATIONS = _Fill("▒", "green")
_WORKING = _Fill("░", "yellow")
_PROCESS = _Fill("▄", "cyan")
_FREE = _Fill("·", "bright_black")
_MISSING = _Fill("!", "red")
_CATEGORIES = {
    "base": ("base weights in NF4", _FROZEN),
    "quant_state": ("scales of the NF4", _FROZEN),
    "embedding": ("embedding and head", _FROZEN),
    "adapter": ("adapters", _TRAINED),
    "gradient": ("gradients", _TRAINED),
    "optimizer": ("optimizer state", _TRAINED),
    "saved_activation": ("saved activations", _ACTIVATIONS),
    "recompute": ("recomputed layer", _ACTIVATIONS),
    "logits": ("logits", _WORKING),
    "dequant_workspace": ("dequantized weights", _WORKING),
    "other": ("other", _WORKING),
}


def plan_report(plan: Plan) -> RenderableType:
    """What a plan decided, what that takes and from whom, and what it gave up or lacks."""
    predicted = plan.predicted
    phase = _words(predicted.peak_phase)
    blocks: list[tuple[str, RenderableType]] = [
        (f"memory at the peak ({phase}), in shares of {format_bytes(plan.budget_bytes)}", _memory(plan)),
        (f"allocated peak of each phase, {_CHOSEN} the highest", _phases(plan)),
    ]
    if plan.gave_up:
        blocks.append((f"given up{' to fit' if plan.fits else ''}, the least first", _items(*plan.gave_up)))
    if plan.would_fit:
        blocks.append(("any one of these changes would make it fit", _would_fit(plan)))
    titled: list[RenderableType] = [Group(Text(), Text(title, style="bold"), block) for title, block in blocks]
    if not plan.fits and not plan.would_fit:
        titled.append(Text("\nno single change would make it fit", style="bold"))
    return Constrain(Group(_headline(plan), _knobs(plan), *titled), _MAX_WIDTH)


def frontier_table(plan: Plan) -> RenderableType:
    """Rank by seq_len: the largest micro-batch that fits and its speed; the lengths go on below where they are many."""
    if not plan.frontier:
        return Text("no other ranks and lengths were looked at")
    title = Text("largest micro-batch by rank and seq_len", style="bold")
    key = f"  in documents of seq_len; below it tokens/s, estimated\n  {_CHOSEN} this plan, - does not fit"
    return Constrain(Group(title, Text(key, style="dim"), _Frontier(plan)), _MAX_WIDTH)


@dataclass(frozen=True, slots=True)
class _Bar:
    """Parts of a total, side by side, over the whole width.

    Attributes:
        parts: bytes, and what they are drawn with.
        total_bytes: what the width stands for.
        limit_bytes: the budget; what lies beyond it is red.
        label: written below, pointing at the limit; nothing if empty.
    """

    parts: tuple[tuple[int, _Fill], ...]
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


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The grid of a frontier, in as many tables as the width asks for."""

    plan: Plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = {(cell.rank, cell.seq_len): self._text(cell) for cell in self.plan.frontier}
        ranks = sorted({rank for rank, _ in texts})
        lengths = sorted({seq_len for _, seq_len in texts})
        column_width = max(7, *(line.cell_len for text in texts.values() for line in text.split())) + 2
        most_columns = max(1, (options.max_width - _RANK_WIDTH) // column_width)
        num_tables = -(-len(lengths) // most_columns)
        num_columns = -(-len(lengths) // num_tables)  # 3 and 3 rather than 5 and 1
        for first in range(0, len(lengths), num_columns):
            table = Table.grid(padding=(0, 0, 0, 0))
            table.add_column(justify="right", style="dim", width=_RANK_WIDTH)
            some = lengths[first : first + num_columns]
            for _ in some:
                table.add_column(justify="right", no_wrap=True, width=column_width)
            table.add_row("rank", *(Text(length_label(seq_len), style="dim") for seq_len in some))
            for rank in ranks:
                table.add_row(str(rank), *(texts.get((rank, seq_len), Text("-")) for seq_len in some))
            yield Padding(table, (1, 0, 0, 0))

    def _text(self, cell: FrontierCell) -> Text:
        is_chosen = (cell.rank, cell.seq_len) == (self.plan.knobs.rank, self.plan.knobs.seq_len)
        text = Text(f"{_CHOSEN} " if is_chosen else "", style="bold green" if is_chosen else "").append(
            size_label(cell)
        )
        if cell.micro_batch_tokens:
            text.append(f"\n{speed_label(cell.tokens_per_second)}", style="" if is_chosen else "dim")
        return text


def _headline(plan: Plan) -> Text:
    device, missing = printable(plan.device, 40), format_bytes(plan.missing_bytes)
    on_device = f"on {'the CPU' if device == 'cpu' else device}"
    where = f"{on_device} in {format_bytes(plan.budget_bytes)}"
    spare_bytes = plan.budget_bytes - plan.predicted.process_peak_bytes
    if plan.fits:
        return Text(f"fits {where}, {format_bytes(spare_bytes)} to spare", style="bold green")
    if spare_bytes >= 0:  # then it is the host's memory that is too small
        return Text(f"does not fit {on_device}, {missing} of host memory missing", style="bold red")
    return Text(f"does not fit {where}, {missing} missing", style="bold red")


def _knobs(plan: Plan) -> Table:
    knobs = plan.knobs
    num_micro_batches = knobs.micro_batches_per_step
    facts = [
        ("base", plan.model),
        ("adapters", f"rank {knobs.rank}, alpha {knobs.alpha:g}, {plan.trainable_parameters / 1e6:,.2f} M parameters"),
        ("document", f"{counted(knobs.seq_len, 'token')} at most (seq_len)"),
        ("micro-batch", _micro_batch(knobs)),
        ("step", f"{num_micro_batches:,} micro-batch{'' if num_micro_batches == 1 else 'es'}"),
        ("activations", _activations(knobs)),
        ("loss chunk", f"logits of {counted(knobs.loss_chunk, 'position')} at a time"),
        ("optimizer", _optimizer(knobs)),
    ]
    if knobs.embedding_residency != "device":
        facts.append(("embedding", f"on the {knobs.embedding_residency}"))
    if plan.device != "cpu":
        host, budget = format_bytes(plan.predicted.host_peak_bytes), format_bytes(plan.host_budget_bytes)
        facts.append(("host memory", host if plan.host_budget_bytes >= _NO_LIMIT_BYTES else f"{host} of {budget}"))
    facts.append(("speed", f"about {plan.predicted.tokens_per_second:,.0f} tokens/s (an estimate)"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(f"  {name}"), Text(value))
    return table


def _micro_batch(knobs: PlanKnobs) -> str:
    size, tokens = knobs.micro_batch_size, f"{counted(knobs.micro_batch_tokens, 'token')} at most"
    if size < 1:
        return tokens
    return f"{counted(int(size), 'document') if size == int(size) else f'{size:.1f} documents'}, {tokens}"


def _activations(knobs: PlanKnobs) -> str:
    keep, recompute, offload = (
        knobs.activation_keep_layers,
        knobs.activation_recompute_layers,
        knobs.activation_offload_layers,
    )
    offloaded = f", the input of {offload} in host memory" if offload else ""
    return f"kept in {counted(keep, 'layer')}, recomputed in {recompute}{offloaded}"


def _optimizer(knobs: PlanKnobs) -> str:
    bits = 8 if knobs.optimizer.endswith("8bit") else 32
    where = "paged out where memory is short" if knobs.optimizer_residency == "paged" else "on the device"
    return f"AdamW, state of {bits} bits, {where}"


def _memory(plan: Plan) -> RenderableType:
    """The sum from the categories to the budget, with the whole of it as one bar on top."""
    predicted, budget_bytes = plan.predicted, plan.budget_bytes
    named = [
        (*_CATEGORIES.get(name, (_words(name), _WORKING)), predicted.breakdown[name])
        for name in sorted(predicted.breakdown, key=_position)
    ]
    process_bytes = predicted.process_peak_bytes - predicted.allocated_peak_bytes
    left_bytes = budget_bytes - predicted.process_peak_bytes
    on_cpu = plan.device == "cpu"
    process = ("program and libraries" if on_cpu else "driver and allocator", _PROCESS, process_bytes)
    left = ("free", _FREE, left_bytes) if left_bytes >= 0 else ("missing", _MISSING, -left_bytes)

    table = _share_table()
    for parts, total, total_bytes in (
        (named, "allocated peak", predicted.allocated_peak_bytes),
        ([process], f"expected {'RSS' if on_cpu else 'driver'} peak", predicted.process_peak_bytes),
        ([left], "budget", budget_bytes),
    ):
        for label, fill, num_bytes in parts:
            if num_bytes > 0:
                _add_part(table, label, fill, num_bytes, budget_bytes)
        _add_total(table, total, total_bytes, budget_bytes)
    # What is judged is the expected peak: under pressure an allocator gives back what it holds in plenty.
    worst = predicted.worst_peak_bytes
    table.add_row("", Text("worst case"), Text(format_bytes(worst)), _percent(worst, budget_bytes), "", style="dim")
    whole = _Bar(
        parts=tuple((num_bytes, fill) for _, fill, num_bytes in (*named, process, ("free", _FREE, left_bytes))),
        total_bytes=max(budget_bytes, predicted.process_peak_bytes),
        limit_bytes=budget_bytes,
        label=f"budget {format_bytes(budget_bytes)}",
    )
    return Group(Padding(whole, (0, 2)), table)


def _phases(plan: Plan) -> Table:
    table = _share_table()
    for name, num_bytes in plan.predicted.phases.items():
        is_peak = name == plan.predicted.peak_phase
        fill = _Fill("█", "bold" if is_peak else "dim")
        _add_part(table, _words(name), fill, num_bytes, plan.budget_bytes, key=_CHOSEN if is_peak else "")
    return table


def _share_table() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=3, justify="right")
    table.add_column(min_width=22, no_wrap=True, overflow="ellipsis")
    table.add_column(min_width=8, no_wrap=True, justify="right")
    table.add_column(min_width=5, no_wrap=True, justify="right")
    table.add_column(ratio=1)
    return table


def _add_part(
    table: Table, label: str, fill: _Fill, num_bytes: int, budget_bytes: int, *, key: str | None = None
) -> None:
    bar = _Bar(parts=((min(num_bytes, budget_bytes), fill),), total_bytes=budget_bytes, limit_bytes=budget_bytes)
    key_text = Text(fill.character if key is None else key, style=fill.style)
    table.add_row(key_text, Text(label), Text(format_bytes(num_bytes)), _percent(num_bytes, budget_bytes), bar)


def _add_total(table: Table, label: str, num_bytes: int, budget_bytes: int) -> None:
    row = (Text(label), Text(format_bytes(num_bytes)), _percent(num_bytes, budget_bytes))
    table.add_row("", *row, "", style="bold")


def _percent(num_bytes: int, budget_bytes: int) -> Text:
    percent = 100 * num_bytes / budget_bytes
    return Text("<1 %" if 0 < percent < 1 else f"{percent:.0f} %", style="bold red" if percent > 100 else "")


def _would_fit(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for change in plan.would_fit:
        peak = f"allocated peak {format_bytes(change.allocated_peak_bytes)}"
        table.add_row(Text(f"  {change.knob}"), Text(f"{change.before} → {change.after}"), Text(peak, style="dim"))
    return table


def _items(*lines: str) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        table.add_row(Text("  -"), Text(line))
    return table


def _position(category: str) -> int:
    names = list(_CATEGORIES)
    return names.index(category) if category in names else len(names)


def _words(name: str) -> str:
    return name.replace("_", " ")
