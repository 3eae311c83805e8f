"""What was exported and merged, and how far a merged model is from what was trained."""

from __future__ import annotations

from collections.abc import Generator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_trainer.data.rows import Reading
from qlora_trainer.export.adapter import Exported
from qlora_trainer.export.compare import Comparison
from qlora_trainer.export.measure import Measured
from qlora_trainer.export.merge import Merged
from qlora_trainer.report.formats import counted, format_bytes, format_loss
from qlora_trainer.run.records import Preparing


def exported_lines(exported: Exported) -> RenderableType:
    """What was written."""
    settings = exported.settings
    kind = "DoRA" if settings.use_dora else "rsLoRA" if settings.use_rslora else "LoRA"
    about = f"{kind} of rank {settings.rank}, alpha {settings.alpha:g}, on {counted(len(settings.targets), 'linear')}"
    if not settings.targets:
        about = "no LoRA on a linear"
    for name in settings.modules_to_save:
        about += f", {name} whole"
    if settings.norms:
        about += f", {counted(len(settings.norms), 'norm')} whole"
    if num_biases := len(settings.biases) + len(settings.targets) * settings.lora_bias:
        about += f", {counted(num_biases, 'bias vector')}"
    lines = [Text(f"wrote {path}") for path in exported.paths]
    lines.append(Text(f"{about}; {format_bytes(exported.num_bytes)}, read back and compared", style="dim"))
    return Group(*lines, *([] if exported.trouble is None else [Text(exported.trouble, style="yellow")]))


def measured_table(measured: Measured) -> RenderableType:
    """Two comparisons, side by side: what merging changed, and what quantizing had changed before."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out rows")
    for name in ("loss", "difference", "KL", "top-1 agreement"):
        table.add_column(name, justify="right")
    merged, quantized = measured.merged, measured.quantized
    table.add_row(Text("base in NF4 and adapter"), format_loss(merged.reference_loss), "", "", "")
    table.add_row(Text(f"merged ({measured.base}, {measured.dtype})"), *_figures(merged))
    table.add_row(Text("original base"), format_loss(quantized.reference_loss), "", "", "")
    table.add_row(Text("base in NF4"), *_figures(quantized))
    documents = counted(measured.num_documents, "document")
    if measured.num_documents < measured.num_held_out:
        documents = f"{documents} of {measured.num_held_out:,}"
    note = f"{merged.num_tokens:,} tokens of {documents}, computed in {measured.compute_dtype}; {measured.where}"
    return Group(table, Text(note, style="dim"))


def merged_lines(merged: Merged) -> RenderableType:
    """What was written."""
    shards = counted(merged.num_shards, "file")
    line = Text(f"wrote {merged.path}: {format_bytes(merged.num_bytes)} in {shards}, read back and compared")
    if not merged.is_worse:
        return line
    return Group(line, Text("kept by --force, though it is worse than base and adapter", style="yellow"))


def without_tables(
    merging: Generator[Preparing | Reading | Measured, None, Merged], console: Console
) -> Generator[Preparing | Reading, None, Merged]:
    """The same, with what was measured shown as soon as it is: before a merged model is refused for it."""
    while True:
        try:
            item = next(merging)
        except StopIteration as end:
            merged: Merged = end.value
            return merged
        if isinstance(item, Measured):
            console.print(measured_table(item))
        else:
            yield item


def _figures(comparison: Comparison) -> tuple[str, ...]:
    difference = comparison.loss - comparison.reference_loss
    return (
        format_loss(comparison.loss),
        f"{round(difference, 4) + 0.0:+.4f}",  # no minus before a zero
        f"{max(comparison.kl, 0.0):.4f}",  # sums of rounded terms may come out a little below
        f"{100 * comparison.agreement:.1f} %",
    )
