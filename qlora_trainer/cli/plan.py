"""`qlora-trainer plan`: does it fit, with what choices, and how fast; no GPU and no weights needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.options import ConfigFile, Overrides
from qlora_trainer.config.data_files import HubDataset, data_files
from qlora_trainer.config.known_models import check_name
from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import require_plot_path
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.sizes import parse_size_bytes
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.hardware.gpu_catalogue import choose_gpu

_NO_DATA = "data.train=train.jsonl"  # a plan without data takes documents of full length


def plan(
    config_file: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Base: a well-known name (llama-3.1-8b), a folder or a hub id.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A card, such as rtx-4060; it need not be here.")] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="Memory of the GPU that may be used, such as 8GiB.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", help="Train on this machine's CPU in that much, say 4GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write the frontier as a PNG heat map.")] = None,
    overrides: Overrides = None,
) -> None:
    """Choose rank, micro-batch and recomputation for a memory budget, or say what is missing."""
    if ram is not None and (gpu is not None or vram is not None):
        raise ConfigError(
            where="plan", found="--ram with --gpu or --vram", expected="one device", fix="Leave one of them out."
        )
    if config_file is None and model is None:
        raise ConfigError(
            where="plan", found="neither a CONFIG nor --model", expected="one of them", fix="Give --model llama-3.1-8b."
        )
    if plot is not None:
        require_plot_path(plot)
    named = [] if model is None else [f"model.base={json.dumps(model)}"]
    data = [_NO_DATA] if config_file is None else []
    config = load_config(config_file, (*data, *(overrides or ()), *named))
    check_name(config.model.base)
    vram_bytes, ram_bytes = (_size(text, option=option) for text, option in ((vram, "--vram"), (ram, "--ram")))
    if gpu is not None or vram_bytes is not None:
        choose_gpu(gpu, vram_bytes)  # for its errors: what follows imports torch first

    from qlora_trainer.report.reading import watched
    from qlora_trainer.report.screen import stderr_console
    from qlora_trainer.run.plan_command import plan_on
    from qlora_trainer.run.planned import require_fit

    # A base that --model puts in place has other tokens: data counts with the config's own.
    with_data = model is None and _has_data(config)
    planning = plan_on(config, gpu=gpu, vram_bytes=vram_bytes, ram_bytes=ram_bytes, with_data=with_data)
    made, documents = watched(planning, stderr_console(), what="planning the memory")
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
    else:
        from qlora_trainer.report.frontier_table import frontier_table
        from qlora_trainer.report.lever_table import lever_table
        from qlora_trainer.report.plan_tables import plan_report
        from qlora_trainer.report.screen import stdout_console

        console = stdout_console()
        console.print(documents, markup=False)
        console.print(plan_report(made))
        console.print()
        console.print(frontier_table(made))
        if made.lever_gains:
            console.print()
            console.print(lever_table(made))
    if plot is not None:
        from qlora_trainer.report.frontier_plot import write_frontier_plot

        write_frontier_plot(made, plot)
    require_fit(made, config)


def _size(text: str | None, *, option: str) -> int | None:
    if text is None:
        return None
    try:
        return parse_size_bytes(text)
    except ValueError as error:
        raise ConfigError(where=option, found=f'"{text}"', expected=str(error), fix=f"Correct {option}.") from error


def _has_data(config: RunConfig) -> bool:
    """Whether there is data here to count tokens in: a plan can be asked for before there is, and downloads none."""
    try:
        return not any(isinstance(source, HubDataset) for source in data_files(config.data.train, key="data.train"))
    except DataError:
        return False
