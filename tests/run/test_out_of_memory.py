"""Memory runs out at the k-th operation of each phase: the same documents again with the same draws, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.errors import DoesNotFitError
from qlora_trainer.model import acceptance
from qlora_trainer.model import base as base_module
from qlora_trainer.run import attempts, inputs, loop, prepare
from qlora_trainer.run.folder import open_run_folder
from qlora_trainer.run.knobs import Knobs
from qlora_trainer.run.next_documents import next_documents
from qlora_trainer.run.records import Evaluated, PlanRevised, StepDone
from qlora_trainer.run.rehearsal import rehearse
from qlora_trainer.run.session import Progress, Session
from qlora_trainer.step.optimizer import AdapterOptimizer
from qlora_trainer.step.train_step import evaluate
from tests.out_of_memory_at import OutOfMemoryAt, spread
from tests.returned import returned
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once")

OPTIONS = ("memory.micro_batch_tokens=512", "lora.dropout=0.1")


@pytest.fixture(scope="module")
def session(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, base, *OPTIONS)
    with open_run_folder(folder / "run", resume=False) as run_folder:
        yield returned(prepare.prepare(config, run_folder, resume=None))


def state_of(session: Session) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in session.optimizer.state_dict().items()}


def first_step(session: Session) -> Iterator[Any]:
    documents = returned(next_documents(session, Progress()))
    return attempts.step_or_revise(session, Progress(), documents)


def follow(records: Iterator[Any]) -> list[Any]:
    with closing(records):  # type: ignore[type-var]
        return list(records)


def test_a_step_survives_it_at_every_kth_operation(session: Session) -> None:
    """In the forward, the backward and the update. Mutation tried: without `zero_gradients` in `_accumulate` the
    gradients of both tries add up.
    """
    before = state_of(session)
    with OutOfMemoryAt(-1) as counting:
        (expected,) = follow(first_step(session))
    after = state_of(session)
    assert counting.num_operations > 100
    for k in spread(counting.num_operations, 15):
        session.optimizer.load_state_dict(before)
        with OutOfMemoryAt(k):
            revised, done = follow(first_step(session))
        assert isinstance(revised, PlanRevised)
        assert (revised.step, revised.phase, revised.micro_batch_tokens) == (1, "step", 256)
        assert isinstance(done, StepDone)
        assert done.loss == pytest.approx(expected.loss, rel=1e-5), k
        assert done.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4), k
        for name, tensor in state_of(session).items():
            if name.endswith("state1"):  # the first moment: a tenth of the gradient
                torch.testing.assert_close(tensor, after[name], rtol=1e-3, atol=1e-7)
    session.optimizer.load_state_dict(before)


def test_an_evaluation_survives_it_at_every_kth_operation(session: Session) -> None:
    """Mutation tried: without the retry in `_evaluate_or_revise` the first place already ends the run."""
    with OutOfMemoryAt(-1) as counting:
        (expected,) = follow(attempts.evaluate_or_revise(session, Progress()))
    for k in spread(counting.num_operations, 8):
        with OutOfMemoryAt(k):
            revised, evaluated = follow(attempts.evaluate_or_revise(session, Progress()))
        assert isinstance(revised, PlanRevised)
        assert (revised.step, revised.phase) == (0, "evaluation")
        assert isinstance(evaluated, Evaluated)
        assert evaluated.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        assert session.model.module.training


def test_an_update_goes_on_where_it_failed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what an update in one go is: the gradients are those of the first try.

    Mutation tried: the whole step again in half the micro-batch, whose sums are others.
    """
    before = state_of(session)
    working = AdapterOptimizer.update
    follow(first_step(session))
    after = state_of(session)
    session.optimizer.load_state_dict(before)
    loss_and_norm = torch.tensor([2.5, 0.5])
    with OutOfMemoryAt(-1) as counting:
        session.optimizer.update(1e-4, loss_and_norm)
    for k in spread(counting.num_operations, 8):
        session.optimizer.load_state_dict(before)
        out_of_memory = OutOfMemoryAt(k)

        def failing(optimizer: AdapterOptimizer, *given: Any, out_of_memory: OutOfMemoryAt = out_of_memory) -> None:
            with out_of_memory:
                working(optimizer, *given)

        monkeypatch.setattr(AdapterOptimizer, "update", failing)
        revised, _ = follow(first_step(session))
        assert (revised.step, revised.phase, revised.micro_batch_tokens) == (1, "step", 256)
        assert all(torch.equal(tensor, after[name]) for name, tensor in state_of(session).items()), k
    monkeypatch.undo()
    session.optimizer.load_state_dict(before)


def test_an_update_that_never_finds_memory_is_told(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be half updated then; the last checkpoint is what counts."""
    before = state_of(session)

    def failing(optimizer: AdapterOptimizer, *given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AdapterOptimizer, "update", failing)
    said = (
        r"the optimizer's update of step 1: found no memory left, in micro-batches of .*, one document.*--resume auto"
    )
    with pytest.raises(DoesNotFitError, match=said):
        follow(first_step(session))
    session.optimizer.load_state_dict(before)


def rehearsed(session: Session) -> Generator[PlanRevised, None, Knobs]:
    return prepare._rehearse(
        session.config,
        session.model,
        session.optimizer,
        session.scaler,
        session.lora,
        session.knobs,
        packing=session.packs,
    )


def test_a_rehearsal_survives_it_at_every_kth_operation(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: without the `finally` in `rehearse` the optimizer keeps what was rehearsed."""
    working = rehearse
    with OutOfMemoryAt(-1) as counting:
        follow(rehearsed(session))
    fresh = state_of(session)
    for k in spread(counting.num_operations, 8):
        out_of_memory = OutOfMemoryAt(k)

        def failing(*args: Any, out_of_memory: OutOfMemoryAt = out_of_memory, **kwargs: Any) -> None:
            with out_of_memory:
                working(*args, **kwargs)

        monkeypatch.setattr(prepare, "rehearse", failing)
        (revised,) = follow(rehearsed(session))
        assert (revised.step, revised.phase, revised.micro_batch_tokens) == (0, "rehearsal", 256)
        for name, tensor in state_of(session).items():
            assert torch.equal(tensor, fresh[name])


@pytest.fixture(scope="module")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory, plans_made_once: None) -> Path:
    """A run that may be resumed at its last step but one."""
    folder = tmp_path_factory.mktemp("stopped")
    run_until_step(tiny_config(folder, base, *OPTIONS, "training.save_every=1", "training.max_steps=3"), 3)
    return folder


PHASES: dict[str, tuple[Any, str]] = {
    "find_base": (inputs, "loading and rehearsing: found no memory left"),
    "load_quantized": (prepare, "loading and rehearsing: found no memory left"),
    "attach_new_adapters": (prepare, "loading and rehearsing: found no memory left"),
    "restore": (prepare, "loading and rehearsing: found no memory left"),
    "save_checkpoint": (loop, "saving step 3: found no memory left"),
    "finish": (loop, "exporting the adapter: found no memory left"),
}


def watched(working: Callable[..., Any], k: int, counted: Callable[[int], None]) -> Callable[..., Any]:
    """The same, but memory runs out at its operation `k`; how many there were is told."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with OutOfMemoryAt(k) as mode:
            try:
                return working(*args, **kwargs)
            finally:
                counted(mode.num_operations)

    return call


def resumed(stopped: Path, base: Path, name: str) -> int:
    """The exit code of a resume of a copy of the run."""
    run = stopped / name
    if run.exists():
        shutil.rmtree(run)
    shutil.copytree(stopped / "run", run, symlinks=True)
    options = (*OPTIONS, "training.save_every=1", "training.max_steps=3", f"output.dir={run}")
    return train_command(tiny_config(stopped, base, *options), "--resume", "auto")


@pytest.fixture(autouse=True, scope="module")
def accepted_each_time(accepted_once: None) -> Iterator[None]:
    """Here the operations of an acceptance count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "require_accepted", acceptance.require_accepted)
        yield


@pytest.fixture(scope="module")
def num_operations(stopped: Path, base: Path) -> dict[str, int]:
    """Of each phase, at most, in a resume that goes well."""
    found = dict.fromkeys(PHASES, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, (where, _) in PHASES.items():

            def count(number: int, name: str = name) -> None:
                found[name] = max(found[name], number)

            patch.setattr(where, name, watched(getattr(where, name), -1, count))
        assert resumed(stopped, base, "counted") == 0
    assert min(found.values()) > 0
    return found


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_with_nothing_smaller_to_try_ends_in_one_line(
    name: str,
    stopped: Path,
    num_operations: dict[str, int],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the first, the last and some operations between; each is a resume of its own.

    Mutation tried: `finish` outside of `lack_of_memory_told` ends with a traceback.
    """
    where, said = PHASES[name]
    working = getattr(where, name)
    # Not at all of them: where safetensors maps a file, which allocates nothing, it turns any error into a ValueError.
    for k in spread(num_operations[name], 2):
        monkeypatch.setattr(where, name, watched(working, k, lambda _: None))
        capsys.readouterr()
        assert resumed(stopped, base, name) == 3, k
        assert said in complaint(capsys), k


def test_a_revised_plan_is_written_and_kept_by_the_next_checkpoint(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(attempts, "evaluate", failing)
    records = run_to_end(tiny_config(tmp_path, base, *OPTIONS, "training.max_steps=3"))
    (revised,) = [record for record in records if isinstance(record, PlanRevised)]
    assert (revised.step, revised.phase) == (3, "evaluation")
    run = tmp_path / "run"
    assert json.loads((run / "plan.json").read_text())["in_force"]["plan"]["micro_batch_tokens"] == 256
    saved = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert saved["plan"]["plan"]["micro_batch_tokens"] == 256
    assert saved["plan_at_start"]["plan"]["micro_batch_tokens"] == 512
