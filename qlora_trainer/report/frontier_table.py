"""The frontier as a table: the largest micro-batch that fits for each rank and length, and its speed."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_trainer.planning.plan import FrontierCell, Plan
from qlora_trainer.report.bars import MARK, MAX_WIDTH

_RANK_WIDTH = 6
# What stands for a lever that a cell needs, and what it is.
LEVER_LETTERS = {
    "offload": ("o", "inputs offloaded"),
    "tile_tokens": ("t", "tiles"),
    "embedding_residency": ("e", "embedding on the host"),
    "optimizer_on_host": ("h", "optimizer on the host"),
    "nf4_head": ("n", "NF4 head"),
    "base_residency": ("s", "base streamed"),
}


def frontier_table(plan: Plan) -> RenderableType:
    """Rank by seq_len: the largest micro-batch that fits and its speed; the lengths go on below where they are many."""
    if not plan.frontier:
        return Text("no other ranks and lengths were looked at")
    title = Text("largest micro-batch by rank and seq_len", style="bold")
    pulled = levers_key(plan)
    key = "  in documents of seq_len, a global batch at most\n  below it tokens/s, estimated"
    key += f"\n  {MARK} this plan, - does not fit"
    key += f"\n  {pulled}" if pulled else ""
    return Constrain(Group(title, Text(key, style="dim"), _Frontier(plan)), MAX_WIDTH)


def length_label(seq_len: int) -> str:
    """ "512", "1k", "128k"; what is not a multiple of 1024 in full."""
    return f"{seq_len // 1024}k" if seq_len >= 1024 and seq_len % 1024 == 0 else str(seq_len)


def levers_key(plan: Plan) -> str:
    """What the letters of a frontier's cells stand for; empty where there are none."""
    pulled = {name for cell in plan.frontier for name in cell.levers}
    return ", ".join(f"{letter} {words}" for name, (letter, words) in LEVER_LETTERS.items() if name in pulled)


def levers_label(cell: FrontierCell) -> str:
    """ "os" for a cell that needs its inputs offloaded and its base streamed; empty for one that needs nothing."""
    return "".join(letter for name, (letter, _) in LEVER_LETTERS.items() if name in cell.levers)


def size_label(cell: FrontierCell) -> str:
    """The largest micro-batch in documents of `seq_len`: "4", "2.5"; "-" for none, "256 tok" below one."""
    if cell.micro_batch_tokens == 0:
        return "-"
    size = cell.micro_batch_tokens / cell.seq_len
    if size < 1:
        return f"{cell.micro_batch_tokens} tok"
    return f"{size:.0f}" if size == int(size) else f"{int(size * 10) / 10:.1f}"  # cut: half a document more may not fit


def speed_label(tokens_per_second: float) -> str:
    """Three digits: "7.31", "86.4", "913", "1.23k", "12.4k"."""
    for unit in ("", "k", "M"):
        if tokens_per_second < 999.5 or unit == "M":
            break
        tokens_per_second /= 1000
    decimals = 2 if tokens_per_second < 9.995 else 1 if tokens_per_second < 99.95 else 0
    return f"{tokens_per_second:.{decimals}f}{unit}"


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
        text = Text(f"{MARK} " if is_chosen else "", style="bold green" if is_chosen else "").append(size_label(cell))
        if cell.micro_batch_tokens:
            below = f"{speed_label(cell.tokens_per_second)} {levers_label(cell)}".rstrip()
            text.append(f"\n{below}", style="" if is_chosen else "dim")
        return text
