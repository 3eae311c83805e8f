from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from qlora_trainer.run.checkpoint.listing import list_steps, point
from qlora_trainer.run.checkpoint.load import newest_verified
from qlora_trainer.run.checkpoint.rotate import discard_after, relink, rotate
from qlora_trainer.run.checkpoint.storage import LOCAL
from tests.run.faulty_storage import Crash, CrashAt
from tests.run.small_run import save


def steps(folder: Path) -> list[int]:
    return [step for step, _ in list_steps(folder, LOCAL)]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """Fails when `best` is not exempt, or the oldest are not the ones that go."""
    for step in range(10, 80, 10):
        save(tmp_path, step, is_best=step == 20)
    assert steps(tmp_path) == [20, 50, 60, 70]
    assert os.readlink(tmp_path / "best") == "step-00000020"
    assert os.readlink(tmp_path / "last") == "step-00000070"
    save(tmp_path, 80, is_best=True)
    assert steps(tmp_path) == [60, 70, 80]
    assert not list(tmp_path.glob(".tmp-*"))


def test_last_stays_even_where_it_is_not_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.remove(tmp_path / "last")
    os.symlink("step-00000001", tmp_path / "last")
    assert rotate(tmp_path, keep_checkpoints=2, run_id="run-1") == ()
    assert steps(tmp_path) == [1, 2, 3]


def test_the_best_that_a_newest_one_knew_of_stays(tmp_path: Path) -> None:
    """Mutation tried: without `_best_name` step 2 goes with step 5, and a resume from step 4 lacks its best."""
    for step in (2, 3, 4):
        save(tmp_path, step, is_best=step == 2, best_step=2)
    save(tmp_path, 5, is_best=True)
    assert steps(tmp_path) == [2, 3, 4, 5]
    save(tmp_path, 6, best_step=5)
    save(tmp_path, 7, best_step=5)
    assert steps(tmp_path) == [5, 6, 7]


def test_links_are_set_right_after_a_crash_at_any_operation(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, is_best=step < 3)
    for k in range(12):
        point(tmp_path, "last", 1, LOCAL)
        point(tmp_path, "best", 1, LOCAL)
        with suppress(Crash):
            relink(tmp_path, last=3, best=2, storage=CrashAt(k))
        relink(tmp_path, last=3, best=2)
        assert [os.readlink(tmp_path / name) for name in ("last", "best")] == ["step-00000003", "step-00000002"]
        assert not list(tmp_path.glob(".tmp-*"))
    relink(tmp_path, last=3, best=None)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001", "step-00000002", "step-00000003"]


def test_two_stay_whatever_is_asked(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == [2, 3]


def test_another_runs_checkpoints_are_not_touched(tmp_path: Path) -> None:
    for step in (5, 6, 7):
        save(tmp_path, step, run_id="run-0")
    for step in (1, 2, 3):
        save(tmp_path, step, run_id="run-1", keep=2)
    assert steps(tmp_path) == [2, 3, 5, 6, 7]


def test_what_is_beyond_the_resumed_step_is_discarded(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9, is_best=step == 3)
    (tmp_path / "step-00000004" / "state.json").unlink()
    (tmp_path / ".tmp-removed-step-00000000").mkdir()  # a rotation was killed, and no save may follow
    (tmp_path / ".tmp-removed-step-00000000" / "state.json").touch()
    relink(tmp_path, last=2, best=None)
    assert discard_after(tmp_path, step=2, run_id="run-1") == (3, 4)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001", "step-00000002"]
    assert os.readlink(tmp_path / "last") == "step-00000002"
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    assert discard_after(tmp_path, step=2, run_id="run-1") == ()


def test_a_resume_leaves_later_steps_of_another_run(tmp_path: Path) -> None:
    """Mutation tried: without the run id in `discard_after` step 5 goes too."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 5, run_id="run-0")
    (save(tmp_path, 6, run_id="run-0").path / "manifest.json").write_bytes(b"{}")
    assert discard_after(tmp_path, step=2, run_id="run-1") == (3, 6)
    assert steps(tmp_path) == [1, 2, 5]
