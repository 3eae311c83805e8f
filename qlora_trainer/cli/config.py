"""`qlora-trainer config`: every key with its value, default and meaning, or the JSON schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qlora_trainer.cli.options import ConfigFile, Overrides
from qlora_trainer.config.load import load_config
from qlora_trainer.config.show import json_schema, render_yaml
from qlora_trainer.errors import ConfigError

# Stand-ins for the two keys without a default, so that `config --print > run.yaml` gives a file to start from.
_EXAMPLE = ("model.base=smollm2-135m", "data.train=train.jsonl")


def config(
    config_file: ConfigFile = None,
    print_yaml: Annotated[bool, typer.Option("--print", help="Print every key as commented YAML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config file.")] = False,
    overrides: Overrides = None,
) -> None:
    """Show the config as it will be used, or its schema."""
    if print_yaml == schema or (schema and (config_file or overrides)):
        raise ConfigError(
            where="config",
            found="a mixture" if schema else "neither --print nor --schema",
            expected="--print [CONFIG] [--set KEY=VALUE], or --schema alone",
            fix="See `qlora-trainer config --help`.",
        )
    if schema:
        text = json.dumps(json_schema(), indent=2)
    else:
        example = _EXAMPLE if config_file is None else ()
        text = render_yaml(load_config(config_file, (*example, *(overrides or ()))))
    typer.echo(text.rstrip("\n"))
