"""`qlora-trainer chat`: a conversation with a base and its adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.allocator import expand_segments
from qlora_trainer.config.adapter_names import BASE, name_of_folder, parse_named_folders
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.folder import find_adapter


def chat(
    target: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder or PEFT adapter folder.")] = None,
    *,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=FOLDER", help="Another one, for /use NAME.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--model", help="Base model, when it is not the one the adapters name.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws when the temperature is above 0.")] = 0,
) -> None:
    """Talk with trained adapters, all over one base; /help tells what can be said."""
    others = parse_named_folders(adapter or [])
    own = {} if target is None else {name_of_folder(target, taken=others): target}
    targets = own | others
    if not targets and base is None:
        raise ConfigError(
            where="chat",
            found="neither a run, nor --adapter, nor --model",
            expected="something to talk with",
            fix="Give the output.dir of a run, such as runs/quickstart.",
        )
    for folder in targets.values():
        find_adapter(folder)

    expand_segments()
    from qlora_trainer.report.chat_screen import TypedLines, is_held_by_a_person, show_chat, show_greeting
    from qlora_trainer.report.reading import working
    from qlora_trainer.report.screen import stderr_console, stdout_console
    from qlora_trainer.run.chat import AnswerSettings, converse, open_chat

    console, notes = stdout_console(), stderr_console()
    with working(notes, "loading the base"):
        opened = open_chat(targets, base=base)
    is_terminal = is_held_by_a_person()
    if is_terminal:
        show_greeting(opened, notes)
    lines = TypedLines(sys.stdin, is_terminal=is_terminal)
    settings = AnswerSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    events = converse(opened, lines, speaker=next(iter(targets), BASE), settings=settings)
    show_chat(events, lines, console, notes)
