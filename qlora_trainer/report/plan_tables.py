"""A plan as blocks of text; no state, no printing.

Shares are of the budget, and a bar as wide as its column is the whole budget. Groups of categories differ in fill as
well as in colour, so that a log file says what a terminal does. The fills are in every font with box characters (WGL4).
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_trainer.planning.plan import Plan, PlanKnobs
from qlora_trainer.report.bars import MARK, MAX_WIDTH, Bar, Fill
from qlora_trainer.report.formats import counted, format_bytes
from qlora_trainer.report.screen import printable

_NO_LIMIT_BYTES = 2**60  # a host budget of this size means that nothing is known of the host

_FROZEN = Fill("█", "blue")
_TRAINED = Fill("▓", "magenta")
_ACTIVATIONS = Fill("▒", "green")
_WORKING = Fill("░", "yellow")
_PROCESS = Fill("▄", "cyan")
_FREE = Fill("·", "bright_black")
_MISSING = Fill("!", "red")
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
        (f"allocated peak of each phase, {MARK} the highest", _phases(plan)),
    ]
    if plan.gave_up:
        blocks.append((f"given up{' to fit' if plan.fits else ''}, the least first", _items(*plan.gave_up)))
    if plan.would_fit:
        blocks.append(("any one of these changes would make it fit", _would_fit(plan)))
    titled: list[RenderableType] = [Group(Text(), Text(title, style="bold"), block) for title, block in blocks]
    if not plan.fits and not plan.would_fit:
        titled.append(Text("\nno single change would make it fit", style="bold"))
    return Constrain(Group(_headline(plan), _knobs(plan), *titled), MAX_WIDTH)


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
    if knobs.tile_tokens:
        facts.append(("tiles", f"recomputed layers take {counted(knobs.tile_tokens, 'token')} at a time"))
    if knobs.nf4_head:
        facts.append(("head", "stored in NF4"))
    if knobs.embedding_residency != "device":
        facts.append(("embedding", f"on the {knobs.embedding_residency}"))
    if knobs.base_residency == "streamed":
        how = "mapped from the disk, a layer" if plan.device == "cpu" else "streamed from the host, two layers"
        facts.append(("weights", f"{how} in memory at a time"))
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
    keep, offload = knobs.activation_keep_layers, knobs.activation_offload_layers
    offloaded = f" (the input of {offload} on the host)" if offload else ""
    return f"kept in {counted(keep, 'layer')}, recomputed in {knobs.num_recomputed}{offloaded}"


def _optimizer(knobs: PlanKnobs) -> str:
    where = {"paged": "paged out where memory is short", "host": "on the host"}.get(
        knobs.optimizer_residency, "on the device"
    )
    return f"AdamW, state of {knobs.optimizer_bits} bits, {where}"


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
    reserved = predicted.reserved_peak_bytes
    if reserved is not None:
        in_pieces = Text(f"reserved by the allocator, {predicted.fragmentation:.0%} in pieces")
        table.add_row("", in_pieces, Text(format_bytes(reserved)), _percent(reserved, budget_bytes), "", style="dim")
    # What is judged is the expected peak: under pressure an allocator gives back what it holds in plenty.
    worst = predicted.worst_peak_bytes
    table.add_row("", Text("worst case"), Text(format_bytes(worst)), _percent(worst, budget_bytes), "", style="dim")
    whole = Bar(
        parts=tuple((num_bytes, fill) for _, fill, num_bytes in (*named, process, ("free", _FREE, left_bytes))),
        total_bytes=max(budget_bytes, predicted.process_peak_bytes),
        limit_bytes=budget_bytes,
        label=f"budget {format_bytes(budget_bytes)}",
    )
    is_told = predicted.process_peak_bytes <= budget_bytes < worst
    why = [Text("     (free pieces are given back before it is passed)", style="dim")] if is_told else []
    return Group(Padding(whole, (0, 2)), table, *why)


def _phases(plan: Plan) -> Table:
    table = _share_table()
    for name, num_bytes in plan.predicted.phases.items():
        is_peak = name == plan.predicted.peak_phase
        fill = Fill("█", "bold" if is_peak else "dim")
        _add_part(table, _words(name), fill, num_bytes, plan.budget_bytes, key=MARK if is_peak else "")
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
    table: Table, label: str, fill: Fill, num_bytes: int, budget_bytes: int, *, key: str | None = None
) -> None:
    bar = Bar(parts=((min(num_bytes, budget_bytes), fill),), total_bytes=budget_bytes, limit_bytes=budget_bytes)
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
