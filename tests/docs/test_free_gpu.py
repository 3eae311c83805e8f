"""The notebook for a free GPU is whole, says nothing that it has not run, and its cells run here on the CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from qlora_trainer.run.self_test.report import read_report
from tests.docs.notebook import as_python, code_cells, run
from tests.run.tiny_run import write_base

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "free_gpu.ipynb"
STEPS = ["install", "parameters", "plan-command", "train-command", "self-test"]


def test_its_cells_are_code_that_nobody_has_run() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    for cell in code_cells(NOTEBOOK):
        compile(as_python(cell), cell.name, "exec")
    assert [cell.name for cell in code_cells(NOTEBOOK) if cell.name in STEPS] == STEPS


def test_only_the_cell_that_says_so_installs() -> None:
    installing = [cell for cell in code_cells(NOTEBOOK) if "pip" in cell.source or "git" in cell.source]
    assert [sorted(cell.tags) for cell in installing] == [["install"]]


@pytest.fixture
def tools(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """In the place of git and pip, programs that note what they are asked for; git makes its folder."""
    bin_folder, notes = tmp_path / "bin", tmp_path / "notes"
    bin_folder.mkdir()
    for name in ("git", "pip"):
        program = bin_folder / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {notes}\n[ {name} = pip ] || mkdir "$6"\n')
        program.chmod(0o755)
    return {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}, notes


@pytest.mark.parametrize("inside", [".", "docs"])
def test_in_a_copy_of_the_repository_that_copy_is_installed(
    inside: str, tmp_path: Path, tools: tuple[dict[str, str], Path]
) -> None:
    copy = tmp_path / "copy"
    (copy / "docs").mkdir(parents=True)
    for name in ("configs/quickstart.yaml", "constraints.txt", "pyproject.toml"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())

    run(NOTEBOOK, copy / inside, {}, tools[0], is_installing=True)

    assert tools[1].read_text() == f"pip install --quiet -c {copy}/constraints.txt {copy}\n"


def test_elsewhere_the_address_is_asked_for_and_cloned(tmp_path: Path, tools: tuple[dict[str, str], Path]) -> None:
    """Without the address git told nothing that helps, and the next cell did not know the command."""
    with pytest.raises(RuntimeError, match="Set REPOSITORY"):
        run(NOTEBOOK, tmp_path, {}, tools[0], is_installing=True)
    assert not tools[1].exists()
    named = tmp_path / "named.ipynb"
    named.write_text(NOTEBOOK.read_text().replace('REPOSITORY = \\"\\"', 'REPOSITORY = \\"https://host/q.git\\"'))

    run(named, tmp_path, {}, tools[0], is_installing=True)

    source = tmp_path / "qlora_trainer_source"
    assert tools[1].read_text().splitlines() == [
        f"git clone --quiet --depth 1 https://host/q.git {source}",
        f"pip install --quiet -c {source}/constraints.txt {source}",
    ]


@pytest.mark.slow
def test_its_cells_run_on_a_cpu(tmp_path: Path) -> None:
    """Under another model, as small as can be: six processes that import torch, one of which tests the machine."""
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    run(NOTEBOOK, work, {"MODEL": base, "MAX_STEPS": 2}, environment)

    assert not read_report(work / "self-test.json").has_failed
    assert (work / "runs" / "free_gpu" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_cell_that_fails_is_seen(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": ["CODE = 3\n", "!exit {CODE}\n"]}
    (tmp_path / "broken.ipynb").write_text(json.dumps({"cells": [cell]}))

    with pytest.raises(AssertionError, match="exit 3"):
        run(tmp_path / "broken.ipynb", tmp_path, {}, {})
