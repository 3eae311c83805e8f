"""`qlora-trainer generate`: one answer from a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.allocator import expand_segments
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.folder import find_adapter


def generate(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run folder or PEFT adapter folder.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    *,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    base: Annotated[
        str | None, typer.Option("--model", help="Base model, when it is not the one the adapter names.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws when the temperature is above 0.")] = 0,
) -> None:
    """Answer a question with a trained adapter."""
    if not prompt.strip():
        raise ConfigError(
            where="generate --prompt", found="an empty question", expected="some text", fix="Ask something."
        )
    find_adapter(target)

    expand_segments()
    from qlora_trainer.run.answer import answer

    said = answer(target, prompt, base=base, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    typer.echo(said.text)
    if said.note is not None:
        typer.echo(said.note, err=True)
