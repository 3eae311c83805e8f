"""`qlora-trainer merge`: an adapter becomes part of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_trainer.cli.allocator import expand_segments
from qlora_trainer.config.paths import require_new_folder
from qlora_trainer.run.folder import find_adapter


def merge(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run folder or PEFT adapter folder.")],
    *,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New transformers folder.")],
    base: Annotated[
        Literal["original", "dequantized"],
        typer.Option(help="Merge into the base as it was published, or into its NF4 form, unpacked."),
    ] = "original",
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of the merged weights.")] = "bf16",
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Measure on these rows; else on those that the run held out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Keep it even if it is worse, or cannot be measured.")] = False,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Measure on about so many tokens.")] = 8192,
    model: Annotated[str | None, typer.Option(help="Base model, when it is not the one the adapter names.")] = None,
) -> None:
    """Write base and adapter as one model, and refuse it where it is worse than the two on held-out rows."""
    folder = require_new_folder(to, key="--to")
    find_adapter(target)

    expand_segments()
    from qlora_trainer.export.merge import merge as merge_adapter
    from qlora_trainer.report.export_tables import merged_lines, without_tables
    from qlora_trainer.report.reading import watched
    from qlora_trainer.report.screen import stderr_console, stdout_console

    console = stdout_console()
    merging = merge_adapter(
        target,
        to=folder,
        base=base,
        dtype=dtype,
        data=data,
        force=force,
        max_tokens=eval_tokens,
        model=model,
    )
    merged = watched(without_tables(merging, console), stderr_console(), what="reading the adapter and its base")
    console.print(merged_lines(merged), soft_wrap=True)
