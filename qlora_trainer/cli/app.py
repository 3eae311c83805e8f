"""The command `qlora-trainer`: its verbs, and the one place where a failure becomes a line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from qlora_trainer.cli.chat import chat
from qlora_trainer.cli.config import config
from qlora_trainer.cli.data import data
from qlora_trainer.cli.doctor import doctor
from qlora_trainer.cli.evaluate import evaluate
from qlora_trainer.cli.export import export
from qlora_trainer.cli.generate import generate
from qlora_trainer.cli.merge import merge
from qlora_trainer.cli.plan import plan
from qlora_trainer.cli.quickstart_data import quickstart_data
from qlora_trainer.cli.runs import runs
from qlora_trainer.cli.train import train
from qlora_trainer.errors import QloraTrainerError

PROGRAM = "qlora-trainer"
EXIT_USAGE = 2
EXIT_KEYBOARD_INTERRUPT = 130  # 128 + SIGINT, as shells report it


def build_app() -> typer.Typer:
    """The verbs; plain text everywhere, so that an error is a line and not a box."""
    app = typer.Typer(
        name=PROGRAM,
        help="QLoRA fine-tuning that fits the memory you have and loses nothing when it is interrupted.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for verb in (plan, train, runs, generate, export, merge, chat, doctor, config, quickstart_data):
        app.command(verb.__name__.replace("_", "-"))(verb)
    app.command("eval")(evaluate)  # whose own name is Python's
    app.add_typer(data, name="data")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; None takes them from the command line.

    Returns:
        The exit code: 0 done, 2 config or usage, 3 does not fit, 4 data, 5 checkpoint or storage, 6 diverged, 7 a self
        test failed, 75 interrupted and saved, 130 interrupted before there was anything to save.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        exit_code = build_app()(words, prog_name=PROGRAM, standalone_mode=False)
    except QloraTrainerError as error:
        _complain(str(error))
        return error.exit_code
    except typer.TyperException as error:
        _complain(f"{error.format_message().rstrip('.')}. See `{PROGRAM} --help`.")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_KEYBOARD_INTERRUPT
    return int(exit_code or 0)


def _complain(text: str) -> None:
    print(f"{PROGRAM}: error: {' '.join(text.split())}", file=sys.stderr)
