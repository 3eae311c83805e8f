"""The arguments that more than one verb takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="YAML file; without one, the defaults and --set are the config."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as training.learning_rate=1e-4."),
]
