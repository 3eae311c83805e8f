"""`qlora-trainer train`: everything that can be wrong is told before torch is imported, then the run is shown."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_trainer.cli.allocator import expand_segments
from qlora_trainer.cli.options import ConfigFile, Overrides
from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import check_inputs
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.named import iter_named
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.config_changes import check_allowed
from qlora_trainer.run.folder import RunFolder, named_checkpoint
from qlora_trainer.run.trackers import check_trackers

_DATA_KEYS: tuple[Literal["train", "eval"], ...] = ("train", "eval")


def train(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH", help="Go on from the newest good checkpoint of the run folder, or from PATH."
        ),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Let the resumed run go on with another value of KEY, such as training.learning_rate."
        ),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check the data and plan the memory; load and write nothing.")
    ] = False,
) -> None:
    """Fine-tune a 4-bit base with LoRA adapters."""
    if dry and resume is not None:
        raise ConfigError(
            where="train", found="--dry-run with --resume", expected="one of them", fix="Leave --resume out."
        )
    check_allowed(allow_change or (), resume=resume is not None)
    config = load_config(config_file, overrides or ())
    check_inputs(config, resume=resume is not None)
    if resume is not None:
        named_checkpoint(RunFolder(Path(config.output.dir)), resume)
    keys = ("eval",) if config.data.streaming else _DATA_KEYS  # a stream is looked at when it is trained on
    for key in keys:
        deque(iter_named(config.data, key, files_only=True), maxlen=0)  # every row is looked at, none is kept
    check_trackers(config.output.trackers)

    if dry:
        _dry_run(config)
        return

    expand_segments()
    from qlora_trainer.report.progress import show
    from qlora_trainer.report.run_report import reported
    from qlora_trainer.report.screen import stdout_console
    from qlora_trainer.run.loop import train as run

    show(reported(run(config, resume=resume, allow_change=allow_change or ())), stdout_console())


def _dry_run(config: RunConfig) -> None:
    from qlora_trainer.planning.plan import Plan
    from qlora_trainer.report.plan_tables import plan_report
    from qlora_trainer.report.screen import stdout_console
    from qlora_trainer.report.tables import rows_skipped_lines
    from qlora_trainer.run.dry_run import dry_run
    from qlora_trainer.run.planned import require_fit
    from qlora_trainer.run.records import Preparing, RowsSkipped

    console = stdout_console()
    for told in dry_run(config):
        if isinstance(told, Preparing):
            console.print(told.what)
        elif isinstance(told, RowsSkipped):
            console.print(rows_skipped_lines(told))
        elif isinstance(told, Plan):
            console.print(plan_report(told))
            require_fit(told, config)
