"""The kill test, three kills of a tiny run here; thirty of a real one are in docs/log.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.kill import TENSOR_FILES, compare

ROOT = Path(__file__).parents[2]


def kill(work: Path, *arguments: str, kills: int) -> list[str]:
    """Run the script on the tiny base; its lines, once it has found no difference."""
    command = [sys.executable, "-m", "tests.soak.kill", "--base=tiny", f"--kills={kills}", f"--work={work}", *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path: Path) -> None:
    """Several micro-batches a step (eight of documents of full length); the third kill comes after a SIGTERM.

    Mutations tried: without `rewind` in prepare, metrics.jsonl has lines of lost steps twice; a script that sends no
    SIGTERM is found by its last line.
    """
    lines = kill(tmp_path, "--steps=12", "--seed=1", "--dropout=0.1", "--micro-batch-tokens=96", kills=3)
    assert lines[0].endswith(" 8 micro-batches of 96 tokens a step")
    assert sum(line.startswith("kill ") for line in lines) == 3
    assert any("exit -9" in line for line in lines)
    assert lines[-1].startswith("3 kills in ")
    assert lines[-1].endswith(" 1 after a SIGTERM, 0 differences")


@pytest.mark.soak
@pytest.mark.parametrize(
    "arguments",
    [
        ("--padded",),
        ("--optimizer=adamw_8bit",),
        ("--optimizer=paged_adamw_32bit",),
        ("--dropout=0.1", "--micro-batch-tokens=96"),
        ("--padded", "--optimizer=paged_adamw_8bit", "--dropout=0.1", "--micro-batch-tokens=128"),
        ("--dropout=0.1", "--micro-batch-tokens=96", "--resume-micro-batch-tokens=256", "--resume-budget=3GiB"),
    ],
    ids=" ".join,
)
def test_thirty_kills_change_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    lines = kill(tmp_path, "--steps=24", *arguments, kills=30)
    assert lines[-1].endswith(" 0 differences")
    assert " 0 after a SIGTERM" not in lines[-1]
    if "--micro-batch-tokens=96" in arguments:
        assert " 4 micro-batches of " in lines[0]


def write_run(path: Path, *, losses: list[float]) -> Path:
    for name in TENSOR_FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"tensors")
    lines = [{"step": step, "loss": loss, "seconds": id(path)} for step, loss in enumerate(losses, 1)]
    for name in ("metrics.jsonl", "evals.jsonl"):
        (path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_differences_are_found(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", losses=[3.0, 2.0])
    same = write_run(tmp_path / "same", losses=[3.0, 2.0])
    near = write_run(tmp_path / "near", losses=[3.0, 2.00001])
    longer = write_run(tmp_path / "longer", losses=[3.0, 2.0, 1.0])
    assert compare(whole, same, exactly=True) == []
    assert compare(whole, near, exactly=True) == [
        f"{name} differs from line 1 on (2 and 2 lines)" for name in ("metrics.jsonl", "evals.jsonl")
    ]
    assert compare(whole, near, exactly=False) == []
    assert "the end on (2 and 3 lines)" in compare(whole, longer, exactly=True)[0]
    assert compare(whole, longer, exactly=False) == ["other steps"]
    assert "losses differ by" in compare(whole, write_run(tmp_path / "far", losses=[3.0, 2.1]), exactly=False)[0]
    (same / "checkpoints" / ".tmp-removed-step-00000002").mkdir()
    assert compare(whole, same, exactly=True) == [".tmp-removed-step-00000002 was left over"]
    (same / "checkpoints" / ".tmp-removed-step-00000002").rmdir()
    (same / TENSOR_FILES[1]).write_bytes(b"tensorz")
    assert compare(whole, same, exactly=True) == [f"{TENSOR_FILES[1]} differs"]
