"""What `runs` tells of a folder: steps, sizes, damage, and what a resume would do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_trainer.cli.app import main
from qlora_trainer.config.strict_json import decode, encode, read_capped
from qlora_trainer.data.order import ORDER_VERSION
from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.report.formats import format_bytes
from qlora_trainer.run.checkpoint.load import newest_verified
from qlora_trainer.run.checkpoint.manifest import MANIFEST_NAME
from qlora_trainer.run.folder import open_run_folder
from qlora_trainer.run.inventory import examine_run, find_runs, require_whole
from tests.run.small_run import save


def write_run(path: Path, *, steps: tuple[int, ...], status: str | None = None, logged: int = 6) -> Path:
    """A run folder with checkpoints, a log of `logged` steps and, with a status, a summary."""
    (path / "checkpoints").mkdir(parents=True)
    for step in steps:
        save(path / "checkpoints", step)
    lines = [{"step": step, "loss": 3.0 - step / 4} for step in range(1, logged + 1)]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (path / "plan.json").write_text(json.dumps({"in_force": {"num_steps": 6}}))
    if status:
        (path / "summary.json").write_text(json.dumps({"status": status, "steps": 6}))
    return path


def damage(run: Path, step: int, name: str = "optimizer.safetensors") -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_finished_run(tmp_path: Path) -> None:
    run = examine_run(write_run(tmp_path / "a", steps=(4, 6), status="done"))
    assert (run.status, run.step, run.num_steps, run.last_loss) == ("done", 6, 6, 1.5)
    assert [(checkpoint.step, checkpoint.reasons) for checkpoint in run.checkpoints] == [(4, ()), (6, ())]
    assert run.num_bytes > sum(checkpoint.num_bytes for checkpoint in run.checkpoints) > 0
    assert (run.can_resume, run.resumable) == (True, "goes on at step 6")
    require_whole(run)


def test_a_run_that_died_after_its_summary_is_unfinished(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", steps=(4,), status="interrupted", logged=5)
    assert examine_run(path).status == "unfinished"
    write_run(tmp_path / "b", steps=(6,), status="interrupted")
    assert examine_run(tmp_path / "b").status == "interrupted"


def test_damage_is_named_and_the_older_step_is_where_it_goes_on(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", steps=(4, 6))
    damage(path, 6)
    run = examine_run(path)
    assert run.checkpoints[1].reasons[0].startswith("optimizer.safetensors: its sha256 is")
    assert (run.can_resume, run.resumable) == (True, "goes on at step 4")
    with pytest.raises(
        StorageError, match=r"1 of 2 checkpoints not whole: step-00000006 \(optimizer.*goes on at step 4"
    ):
        require_whole(run)
    damage(path, 4, "state.json")
    run = examine_run(path)
    assert (run.can_resume, run.resumable) == (False, "no, none of its checkpoints is whole")


@pytest.mark.parametrize("newer, damaged, answer", [(6, None, 6), (4, 6, 4), (4, None, None), (2, 6, None)])
def test_what_is_said_of_a_newer_version_is_what_a_resume_does(
    newer: int, damaged: int | None, answer: int | None, tmp_path: Path
) -> None:
    """Mutation tried: to look at the newest checkpoint only says "goes on at step 2" where a resume is refused."""
    path = write_run(tmp_path / "a", steps=(2, 4, 6))
    manifest = path / "checkpoints" / f"step-{newer:08d}" / MANIFEST_NAME
    manifest.write_bytes(encode({**decode(read_capped(manifest)), "schema_version": 2}))
    if damaged is not None:
        damage(path, damaged)
    run = examine_run(path)
    if answer is None:
        loaded = newest_verified(path / "checkpoints")
        assert loaded is not None
        assert (run.can_resume, run.resumable) == (True, f"goes on at step {loaded.step}")
        return
    assert run.resumable == f"no, step-{answer:08d} was made by a newer version of this program"
    assert not run.can_resume
    with pytest.raises(StorageError, match=f"step-{answer:08d}: found a checkpoint made by a newer version"):
        newest_verified(path / "checkpoints")


def test_a_run_in_another_order_of_documents_cannot_go_on(tmp_path: Path) -> None:
    """Its resume is refused (`run.resume.require_same_order`), also where an older step is whole."""
    path = write_run(tmp_path / "a", steps=(4,))
    save(path / "checkpoints", 6, order=1)
    run = examine_run(path)
    assert not run.can_resume
    assert run.resumable == f"no, its documents come in order 1, this version knows only {ORDER_VERSION}"
    damage(path, 6)
    assert examine_run(path).resumable == "goes on at step 4"


def test_a_run_without_checkpoints_begins_again(tmp_path: Path) -> None:
    run = examine_run(write_run(tmp_path / "a", steps=(), logged=0))
    assert (run.step, run.last_loss, run.checkpoints) == (0, None, ())
    assert (run.can_resume, run.resumable) == (True, "begins again: nothing was saved")


def test_a_run_that_is_running_is_not_disturbed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", steps=(4,))
    with open_run_folder(path, resume=True):
        before = sorted(os.listdir(path))
        run = examine_run(path)
        assert run.status == "running"
        assert not run.can_resume
        assert sorted(os.listdir(path)) == before
        with pytest.raises(StorageError, match=f"pid {os.getpid()}"), open_run_folder(path, resume=True):
            pass  # the lock is still held


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "deep/er/c", "a"):
        write_run(tmp_path / name, steps=())
    (tmp_path / "no run").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "rows.jsonl").touch()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b", tmp_path / "deep" / "er" / "c"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "no run") == []
    for name in ("rows.jsonl", "nothing"):
        with pytest.raises(ConfigError, match="a folder with runs in it"):
            find_runs(tmp_path / name)
    with pytest.raises(ConfigError, match="found no run; expected a run folder"):
        examine_run(tmp_path / "no run")


def test_the_command_lists_and_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    whole = write_run(tmp_path / "whole", steps=(4, 6), status="done")
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["runs", "verify", str(whole)]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if str(whole) in line)
    size = format_bytes(examine_run(whole).num_bytes)
    assert line.split(None, 1)[1].split() == f"done 6/6 1.5000 2 whole {size} goes on at step 6".split()
    assert out.count("verified") == 2
    damage(whole, 6)
    assert main(["runs", str(tmp_path)]) == 0
    assert "step-00000006  (1 reason: optimizer.safetensors: its sha256 is" in capsys.readouterr().out
    assert main(["runs", "verify", str(whole)]) == 5
    captured = capsys.readouterr()
    assert captured.out.count("verified") == 1
    assert captured.err.count("\n") == 1
    assert "optimizer.safetensors: its sha256 is" in captured.err
