"""`qlora-trainer runs`: what is there, and whether it can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.errors import ConfigError

VERIFY = "verify"


def runs(
    folder: Annotated[str, typer.Argument(metavar="[DIR]", help="A folder with runs, or a run.")] = "runs",
    run: Annotated[Path | None, typer.Argument(metavar="| verify RUN", help="The run to verify.")] = None,
) -> None:
    """List the runs below DIR and verify their checkpoints; `verify RUN` ends with exit code 5 if one is damaged."""
    from qlora_trainer.report.run_tables import run_table, runs_table
    from qlora_trainer.report.screen import stdout_console
    from qlora_trainer.run.inventory import examine_run, find_runs, require_whole

    if (run is None) is (folder == VERIFY):
        raise ConfigError(
            where="runs",
            found=f"{VERIFY} without a run" if run is None else f"two folders, {folder} and {run}",
            expected="`runs`, `runs DIR` or `runs verify RUN`",
            fix="Give the run folder after `verify` (a folder of that name is ./verify).",
        )
    console = stdout_console()
    if run is None:
        console.print(runs_table([examine_run(path) for path in find_runs(Path(folder))]), soft_wrap=True)
        return
    found = examine_run(run)
    console.print(run_table(found), soft_wrap=True)
    require_whole(found)
