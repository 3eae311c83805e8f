"""`qlora-trainer quickstart-data`: questions and answers made from the docstrings of Python's standard library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for train.jsonl and eval.jsonl.")],
    shuffle_answers: Annotated[
        bool,
        typer.Option("--shuffle-answers", help="Give each training question the answer of another: the control run."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --shuffle-answers.")] = 0,
) -> None:
    """Write the data of the quickstart."""
    from qlora_trainer.data.stdlib_docs import write_quickstart_data

    written = write_quickstart_data(folder, shuffle_answers=shuffle_answers, seed=seed)
    typer.echo(f"{written.train_path}: {written.num_train_rows:,} rows")
    typer.echo(f"{written.eval_path}: {written.num_eval_rows:,} rows, of modules that are not in the other file")
