"""`qlora-trainer eval`: how well adapters predict held-out rows, beside their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.allocator import expand_segments
from qlora_trainer.cli.options import Overrides
from qlora_trainer.config.adapter_names import name_of_folder
from qlora_trainer.config.data_files import require_data
from qlora_trainer.run.eval_config import eval_config


def evaluate(
    targets: Annotated[list[Path], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run folders, adapter folders.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="File, pattern or data set to judge on; without it, the run's own held-out rows."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--model", help="Base model, when it is not the one the adapters name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overrides: Overrides = None,
) -> None:
    """Loss, perplexity and token accuracy of adapters on the same rows, and of their base without any."""
    named: dict[str, Path] = {}
    for target in targets:
        named[name_of_folder(target, taken=named)] = target
    judged_on = eval_config(named, data or [], overrides=overrides or [])
    require_data(judged_on.config.data)  # before what follows, which imports torch

    expand_segments()
    from qlora_trainer.report.reading import watched
    from qlora_trainer.report.screen import stderr_console, stdout_console
    from qlora_trainer.run.adapted_base import find_adapters
    from qlora_trainer.run.evaluation import evaluate_adapters, require_finite

    found = find_adapters(named, base=base)
    evaluation = watched(evaluate_adapters(judged_on, found, named), stderr_console(), what="looking for the data")
    if as_json:
        typer.echo(json.dumps(evaluation.as_json(), indent=2, allow_nan=False))
    else:
        from qlora_trainer.report.eval_tables import evaluation_table

        stdout_console().print(evaluation_table(evaluation))
    require_finite(evaluation)
