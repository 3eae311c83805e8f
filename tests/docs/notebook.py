"""Runs a notebook's code cells, as far as ours need it: Python, lines of `!command {VARIABLE}`, and tags.

Cells with the tag `install` are run only if they are asked for: what they install is there. After the one with the tag
`parameters` come other values (papermill's convention).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """A code cell."""

    name: str
    source: str
    tags: frozenset[str]


def code_cells(path: Path) -> list[Cell]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        Cell(cell["id"], "".join(cell["source"]), frozenset(cell["metadata"].get("tags", ())))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def as_python(cell: Cell) -> str:
    """The cell with each command as a call of `run_command`."""
    return re.sub(r"^( *)!(.+)$", lambda match: f"{match[1]}run_command({match[2]!r})", cell.source, flags=re.M) + "\n"


def run(
    path: Path,
    folder: Path,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    is_installing: bool = False,
) -> None:
    """Run the cells one after the other in `folder`; raises what a cell raises, or what its command exits with.

    Args:
        path: of the notebook.
        folder: where it is run.
        parameters: names and values that take the place of its own.
        environment: of its commands, beside this process's.
        is_installing: run the cells that install, and only those.
    """
    names: dict[str, Any] = {}

    def run_command(command: str) -> None:
        filled = re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), command)
        done = subprocess.run(
            filled, shell=True, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{filled}\n{done.stdout}\n{done.stderr}"

    names["run_command"] = run_command
    before = Path.cwd()
    os.chdir(folder)
    try:
        for cell in code_cells(path):
            if is_installing == ("install" in cell.tags):
                exec(compile(as_python(cell), cell.name, "exec"), names)
            if "parameters" in cell.tags:
                names |= parameters
                names["run_command"] = run_command
    finally:
        os.chdir(before)
