"""How adapters were judged, as a table."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_trainer.report.formats import counted, format_change, format_loss
from qlora_trainer.report.screen import printable
from qlora_trainer.run.evaluation import Evaluation, Judged


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """What was judged on, and a line for the base and for each adapter."""
    table = Table(box=None, pad_edge=False)
    table.add_column("adapter", overflow="fold")
    for name in ("loss", "of base", "perplexity", "token accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    base, best = evaluation.judged[0], min((line.loss for line in evaluation.judged), default=math.nan)
    for line in evaluation.judged:
        table.add_row(
            Text("base" if line.path is None else printable(line.path, 200)),
            Text(format_loss(line.loss)),
            Text("" if line is base else format_change(base.loss, line.loss)),
            Text(_perplexity(line)),
            Text(f"{line.accuracy:.1%}"),
            style="bold" if line.loss == best else "",
        )
    notes = [Text(f"{line.name}: {line.note}", style="yellow") for line in evaluation.judged if line.note is not None]
    return Group(_judged_on(evaluation), table, *notes)


def _judged_on(evaluation: Evaluation) -> Text:
    documents = counted(evaluation.num_documents, "document")
    tokens = counted(evaluation.num_supervised_tokens, "supervised token")
    line = Text(f"{evaluation.base} on {printable(evaluation.data, 200)}: {documents}, {tokens}")
    for number, what in ((evaluation.num_dropped, "dropped"), (evaluation.num_bad, "bad")):
        if number:
            line.append(f", {counted(number, 'row')} {what}", style="yellow")
    return line


def _perplexity(line: Judged) -> str:
    return f"{line.perplexity:.2f}" if line.perplexity < 1e4 else f"{line.perplexity:.1e}"
