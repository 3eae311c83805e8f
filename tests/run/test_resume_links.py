"""After a resume `last` and `best` are what the resumed state says, and the adapter of the best step is exported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.run import attempts
from qlora_trainer.run.checkpoint import save
from qlora_trainer.run.checkpoint.listing import point
from qlora_trainer.run.checkpoint.storage import Storage
from qlora_trainer.run.loop import train
from qlora_trainer.run.records import Evaluated, Finished, Resumed
from qlora_trainer.run.session import Progress, Session
from qlora_trainer.step.train_step import evaluate
from tests.run.faulty_storage import Crash
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once")

OPTIONS = ("training.eval_every=1", "training.save_every=1")  # every step is evaluated and saved


@pytest.fixture(autouse=True, scope="module")
def step_6_is_worse() -> Iterator[None]:
    """Than step 5, and until then each is better than the one before; on every processor."""
    evaluated = attempts._evaluate

    def judged(session: Session, progress: Progress) -> tuple[Progress, Evaluated]:
        # In nats: all real losses together are below 1e3.
        penalty = 1e5 if progress.step == 6 else 1e4 * (6 - progress.step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attempts, "evaluate", lambda *args, **kwargs: evaluate(*args, **kwargs) + penalty)
            return evaluated(session, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "_evaluate", judged)
        yield


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory, plans_made_once: None) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(tiny_config(folder, base, *OPTIONS))
    assert links(folder / "run") == {"last": "step-00000006", "best": "step-00000005"}
    return folder / "run"


def links(run: Path) -> dict[str, str]:
    return {name: os.readlink(run / "checkpoints" / name) for name in ("last", "best")}


@pytest.mark.parametrize("link_name, step", [("last", 5), ("best", 5), ("last", 6)])
def test_a_kill_between_the_commit_and_a_link_changes_nothing(
    link_name: str, step: int, tmp_path: Path, base: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: without `relink` in `rewind` the best of step 5 may be rotated away, and `last` stays at step 5;
    where `_final_weights` goes by the link too, step 4 is exported.
    """

    def dying(folder: Path, name: str, linked_step: int, storage: Storage) -> None:
        if (name, linked_step) == (link_name, step):
            raise Crash
        point(folder, name, linked_step, storage)

    config = tiny_config(tmp_path, base, *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(save, "point", dying)
        with pytest.raises(Crash):
            run_to_end(config)
    assert links(tmp_path / "run")[link_name] == f"step-{step - 1:08d}"  # it is there, but nothing points at it
    finished = run_to_end(config, resume="auto")[-1]
    assert course(tmp_path / "run") == course(undisturbed)
    assert links(tmp_path / "run") == links(undisturbed)
    assert isinstance(finished, Finished)
    assert finished.summary.eval_loss_after == min(line["eval_loss"] for line in course(undisturbed)["evals"][1:])


def copied(undisturbed: Path, folder: Path, base: Path) -> tuple[Path, RunConfig]:
    """The finished run, as one that may be resumed from any of its steps."""
    run = Path(shutil.copytree(undisturbed, folder / "run", symlinks=True))
    return run, tiny_config(folder, base, *OPTIONS, f"data.train={undisturbed.parent / 'rows.jsonl'}")


def test_a_step_before_the_best_can_be_resumed_from(tmp_path: Path, base: Path, undisturbed: Path) -> None:
    """Mutation tried: a `rewind` that removes `best` instead of pointing it at step 4."""
    run, config = copied(undisturbed, tmp_path, base)
    run_until_step(config, 5, resume=str(run / "checkpoints" / "step-00000004"))
    assert links(run) == {"last": "step-00000004", "best": "step-00000004"}
    run_to_end(config, resume="auto")
    assert course(run) == course(undisturbed)
    assert links(run) == links(undisturbed)


def test_a_best_step_that_is_damaged_is_refused_and_given_up_only_when_asked(
    tmp_path: Path, base: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: without `with_best` the run goes on, and fails only where the adapter is exported."""
    run, config = copied(undisturbed, tmp_path, base)
    (run / "checkpoints" / "step-00000005" / "state.json").unlink()
    shutil.rmtree(run / "adapter")
    assert train_command(config, "--resume", "auto") == 5
    told = complaint(capsys)
    assert "step-00000005: found the best step so far damaged: state.json: missing" in told
    assert f"remove the link {run / 'checkpoints' / 'best'}" in told
    assert not (run / "adapter").exists()
    (run / "checkpoints" / "best").unlink()
    records: list[Any] = list(train(config, resume="auto"))
    (resumed,) = [record for record in records if isinstance(record, Resumed)]
    assert resumed.notes == (
        "step-00000005, the best step so far, is not whole: the best from here on is exported (state.json: missing)",
    )
    assert records[-1].summary.eval_loss_after is None
    assert course(run)["adapter"] != course(undisturbed)["adapter"]
