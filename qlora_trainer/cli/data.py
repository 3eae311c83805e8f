"""`qlora-trainer data check`: what a run would learn from its data, before step 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.options import Overrides
from qlora_trainer.config.data_files import require_data
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig

CONFIG_SUFFIXES = (".yaml", ".yml")
DEFAULT_BASE = "smollm2-135m"

data = typer.Typer(help="Look at data before it is trained on.", rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """A group even while it has one verb."""


@data.command()
def check(
    source: Annotated[str, typer.Argument(metavar="CONFIG|FILE", help="A config (.yaml), or a data file or pattern.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"Base whose tokenizer counts, for a FILE; {DEFAULT_BASE} if not given."),
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Samples to show, token by token.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    overrides: Overrides = None,
) -> None:
    """Count rows, tokens and what is wrong with them; exit code 4 if a run would stop at this data."""
    config = _config(source, model, overrides or [])
    require_data(config.data)  # before what follows, which imports torch

    from qlora_trainer.report.reading import watched
    from qlora_trainer.report.screen import stderr_console, stdout_console
    from qlora_trainer.run.data_check import check_data, require_good

    report = watched(check_data(config, num_samples=show), stderr_console())
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        from qlora_trainer.report.data_tables import data_report

        console = stdout_console()
        console.print(data_report(report, has_colours=console.color_system is not None))
    require_good(report)


def _config(source: str, model: str | None, overrides: list[str]) -> RunConfig:
    """The config; or one made of a data file and defaults, whose batch is what the file gives."""
    base = [] if model is None else [f"model.base={json.dumps(model)}"]
    if source.lower().endswith(CONFIG_SUFFIXES):
        return load_config(Path(source), [*overrides, *base])
    named = [f"data.train={json.dumps(source)}", "training.global_batch_size=1"]
    return load_config(None, [*named, *(base or [f"model.base={DEFAULT_BASE}"]), *overrides])
