"""`qlora-trainer export`: an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.config.paths import require_new_file, require_new_folder
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.folder import find_adapter

MODELFILE_NAME = "Modelfile"


def export(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run folder or PEFT adapter folder.")],
    *,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="New PEFT folder with a model card.")] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Fold scales into the weights, for vLLM, SGLang and older PEFT.")
    ] = False,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="New LoRA file for llama.cpp.")] = None,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile beside the GGUF file, too.")] = False,
    model: Annotated[str | None, typer.Option(help="Base model, when it is not the one the adapter names.")] = None,
) -> None:
    """Write an adapter as a PEFT folder, as a GGUF file, or both; read it back and compare."""
    if to is None and (gguf is None or portable):
        raise ConfigError(
            where="export",
            found="--portable without --to" if portable else "neither --to nor --gguf",
            expected="--to DIR, --gguf FILE, or both",
            fix="Say where the adapter goes.",
        )
    if ollama and gguf is None:
        raise ConfigError(
            where="export --ollama", found="no --gguf", expected="--gguf FILE as well", fix="Ollama reads GGUF only."
        )
    folder = None if to is None else require_new_folder(to, key="--to")
    file = None if gguf is None else require_new_file(gguf, key="--gguf", suffix=".gguf")
    if ollama and file is not None:
        require_new_file(file.with_name(MODELFILE_NAME), key="--ollama")
    if folder is not None and file is not None and folder in (file, file.with_name(MODELFILE_NAME)):
        raise ConfigError(
            where=f"--to {to}",
            found="the name of a file that is written",
            expected="another",
            fix="Choose another name.",
        )
    find_adapter(target)

    from qlora_trainer.export.adapter import export as export_adapter
    from qlora_trainer.report.export_tables import exported_lines
    from qlora_trainer.report.reading import working
    from qlora_trainer.report.screen import stderr_console, stdout_console

    with working(stderr_console(), "reading the adapter and its base"):
        exported = export_adapter(target, to=folder, portable=portable, gguf=file, ollama=ollama, model=model)
    stdout_console().print(exported_lines(exported), soft_wrap=True)
