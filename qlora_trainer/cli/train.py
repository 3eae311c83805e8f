"""`qlora-trainer train`: everything that can be wrong is told before torch is imported, then the run is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.options import ConfigFile, Overrides
from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import check_inputs
from qlora_trainer.data.rows import read_rows
from qlora_trainer.run.trackers import check_trackers


def train(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH", help="Go on from the newest good checkpoint of the run folder, or from PATH."
        ),
    ] = None,
) -> None:
    """Fine-tune a 4-bit base with LoRA adapters."""
    config = load_config(config_file, overrides or ())
    check_inputs(config, resume=resume is not None)
    for name in (config.data.train, config.data.eval):
        if name is not None:
            read_rows(Path(name))

    check_trackers(config.output.trackers)

    from qlora_trainer.report.progress import show
    from qlora_trainer.report.screen import stdout_console
    from qlora_trainer.run.loop import train as run

    show(run(config, resume=resume), stdout_console())
