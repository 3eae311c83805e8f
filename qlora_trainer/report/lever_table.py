"""What each lever buys, as a table: the least memory, the longest document and the speed, a line for each."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from qlora_trainer.planning.plan import LeverGain, Plan
from qlora_trainer.report.bars import MAX_WIDTH
from qlora_trainer.report.formats import counted, format_bytes
from qlora_trainer.report.frontier_table import LEVER_LETTERS, speed_label


def lever_table(plan: Plan) -> RenderableType:
    """A line without levers, one for each alone, one for all together."""
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", "least memory", "longest", "tokens/s", style="dim")
    for gain in plan.lever_gains:
        is_within = gain.least_bytes <= plan.budget_bytes
        table.add_row(
            f"  {gain_label(gain)}",
            Text(format_bytes(gain.least_bytes), style="" if is_within else "red"),
            f"{gain.longest_tokens:,}" if gain.longest_tokens else "-",
            speed_label(gain.tokens_per_second) if gain.tokens_per_second else "-",
        )
    title = Text("what each lever buys", style="bold")
    return Constrain(Group(title, Text(f"  {gains_note(plan)}", style="dim"), table), MAX_WIDTH)


def gain_label(gain: LeverGain) -> str:
    """ "no lever", the one lever's words, or "all of them"."""
    if not gain.levers:
        return "no lever"
    return LEVER_LETTERS[gain.levers[0]][1] if len(gain.levers) == 1 else "all of them"


def gains_note(plan: Plan) -> str:
    """What the figures are of."""
    knobs = plan.knobs
    return f"at rank {knobs.rank} and {counted(knobs.seq_len, 'token')}; - does not fit. Priced, not traced whole"
