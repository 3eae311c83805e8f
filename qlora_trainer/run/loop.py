"""One training run as a generator of records: prepare, then evaluate, save and step until it is done.

The state between two steps is `Progress` and what `Session` points at; a checkpoint holds both, so the loop below is
entered the same way by a new run and by one that goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.show import to_yaml
from qlora_trainer.data.order import ORDER_VERSION
from qlora_trainer.data.tokenized import length_percentiles
from qlora_trainer.errors import InterruptedAndSaved, QloraTrainerError
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.run.answer import answer_all
from qlora_trainer.run.attempts import evaluate_or_revise, step_or_revise
from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.finish import finish, plan_json, resolved_config
from qlora_trainer.run.folder import (
    open_run_folder,
    sync_logs,
    write_config,
    write_plan,
)
from qlora_trainer.run.next_documents import next_documents
from qlora_trainer.run.planned import lack_of_memory_told
from qlora_trainer.run.prepare import prepare
from qlora_trainer.run.records import (
    Answered,
    Evaluated,
    Finished,
    Prepared,
    Preparing,
    Record,
    Resumed,
    Saved,
    Status,
    StepDone,
)
from qlora_trainer.run.resume import saved_progress
from qlora_trainer.run.session import Progress, Session
from qlora_trainer.run.signals import Interruption, watch_signals
from qlora_trainer.run.trackers import open_trackers

ANSWER_TOKENS = 64  # of a sample answer, at most


def train(config: RunConfig, *, resume: str | None, allow_change: Collection[str] = ()) -> Iterator[Record]:
    """Run `config` to its end.

    Args:
        config: validated, its paths checked (`config.paths.check_inputs`).
        resume: "auto" or the path of a checkpoint to go on from, None to begin.
        allow_change: keys that may differ from the run that is resumed (see `run.config_changes`).

    Yields:
        What happens, as it happens; `Finished` last.

    Raises:
        InterruptedAndSaved: a signal asked for an end, and the state is saved.
        QloraTrainerError: anything else that the user can act on.
    """
    run_path = Path(config.output.dir)
    with watch_signals() as interruption, open_run_folder(run_path, resume=resume is not None) as folder:
        with lack_of_memory_told("loading and rehearsing"):
            session = yield from prepare(config, folder, resume=resume, allow_change=allow_change)
        write_config(folder, to_yaml(resolved_config(session)))
        if session.plan is not None:
            write_plan(folder, plan_json(session))
        yield _prepared(session)
        trackers = open_trackers(config.output.trackers, run_dir=run_path, config=session.asked)
        with closing(trackers):
            for record in _train(session, interruption):
                match record:
                    case StepDone():
                        values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
                        values |= {} if record.lr_b is None else {"lr_b": record.lr_b}
                        values |= {} if record.loss_scale is None else {"loss_scale": record.loss_scale}
                        trackers.log(values | {"tokens_per_second": record.tokens_per_second}, record.step)
                    case Evaluated():
                        trackers.log({"eval_loss": record.eval_loss}, record.step)
                yield record


def _train(session: Session, interruption: Interruption) -> Iterator[Record]:
    progress = Progress()
    if session.resumed is not None:
        progress = saved_progress(session.resumed)
        rejected = tuple(str(reason) for reason in session.resumed.rejected)
        changes = tuple(str(change) for change in session.changes)
        path, notes = session.resumed.path, session.notes
        yield Resumed(step=progress.step, path=path, rejected=rejected, changes=changes, notes=notes)
    elif not interruption.requested:
        yield from _answer(session, "before")
    saved_step = progress.step if session.resumed is not None else -1
    while True:
        is_best = False
        if _is_evaluation_due(session, progress) and not interruption.requested:
            session, progress, is_best = yield from evaluate_or_revise(session, progress)
        is_last = _is_last(session, progress)
        is_save_due = progress.step > 0 and (progress.step % session.knobs.save_every == 0 or is_last or is_best)
        if (is_save_due or interruption.requested) and (progress.step != saved_step or is_best):
            yield _save(session, progress, is_best=is_best)
            saved_step = progress.step
        if interruption.requested:
            yield _finish(session, progress, "interrupted")
            raise _interrupted(session, interruption.signal_name or "a signal", progress.step)
        if is_last:
            break
        try:
            documents = yield from next_documents(session, progress)
        except QloraTrainerError:  # of a stream: what was learned until here stays
            if progress.step > 0 and progress.step != saved_step:
                yield from _saved_if_possible(session, progress)
            raise
        session, progress = yield from step_or_revise(session, progress, documents)
    yield from _answer(session, "after")
    yield _finish(session, progress, "done" if progress.step >= session.knobs.num_steps else "stopped_early")


def _finish(session: Session, progress: Progress, status: Status) -> Finished:
    with lack_of_memory_told("exporting the adapter", session.knobs):
        return finish(session, progress, status=status)


def _save(session: Session, progress: Progress, *, is_best: bool) -> Saved:
    with lack_of_memory_told(f"saving step {progress.step}", session.knobs):
        sync_logs(session.folder)
        return save_checkpoint(
            session.folder.checkpoints_path,
            step=progress.step,
            adapter={name: parameter.data for name, parameter in trainable_parameters(session.model).items()},
            optimizer=session.optimizer.state_dict(),
            state={
                "run_id": session.run_id,
                "samples_seen": session.batches.samples_seen(progress.step),
                "epoch": session.batches.epoch(progress.step),
                "seed": session.config.training.seed,
                "order": ORDER_VERSION,
                "stream": session.batches.state(progress.step),
                "loss_scaler": None if session.scaler is None else session.scaler.state_dict(),
                "best_step": None if progress.best_eval_loss is None else progress.best_step,
                "progress": progress.as_json(),
                "plan": session.knobs.as_json(),
                "plan_at_start": session.knobs_at_start.as_json(),
                "config": dict(session.asked),
            },
            fingerprints=session.fingerprints,
            keep_checkpoints=session.config.output.keep_checkpoints,
            is_best=is_best,
        )


def _saved_if_possible(session: Session, progress: Progress) -> Iterator[Saved]:
    """A save on the way out of an error, which is what is told, whatever becomes of the save."""
    saved = None
    with suppress(QloraTrainerError):
        saved = _save(session, progress, is_best=False)
    if saved is not None:
        yield saved


def _answer(session: Session, when: str) -> Iterator[Answered | Preparing]:
    if not session.questions:
        return
    yield Preparing(what=f"answering {len(session.questions)} held-out questions")
    with lack_of_memory_told(f"answering held-out questions {when} training", session.knobs):
        answers = answer_all(
            session.model,
            session.tokenizer,
            session.base,
            [question.messages for question in session.questions],
            max_new_tokens=ANSWER_TOKENS,
        )
    for question, answer in zip(session.questions, answers, strict=True):
        yield Answered(
            when="before" if when == "before" else "after",
            question=question.messages[-1].content,
            answer=answer,
            reference=question.reference,
        )


def _is_evaluation_due(session: Session, progress: Progress) -> bool:
    is_at_step = progress.step % session.knobs.eval_every == 0 or progress.step == session.knobs.num_steps
    return bool(session.eval_data.documents) and is_at_step and progress.evaluated_step != progress.step


def _is_last(session: Session, progress: Progress) -> bool:
    patience = session.config.training.early_stopping_patience
    has_no_patience_left = patience is not None and progress.evals_without_better >= patience
    return has_no_patience_left or progress.step >= session.knobs.num_steps  # beyond: a resume asked for fewer steps


def _interrupted(session: Session, signal_name: str, step: int) -> InterruptedAndSaved:
    return InterruptedAndSaved(
        where=str(session.folder.path),
        found=f"{signal_name} after step {step} of {session.knobs.num_steps}",
        expected="the end of the run",
        fix="Everything is saved: the same command with --resume auto goes on.",
    )


def _prepared(session: Session) -> Prepared:
    parameters = trainable_parameters(session.model).values()
    linears = session.model.linears.values()
    tables = {id(buffer): buffer for name, buffer in session.model.module.named_buffers() if name.endswith("weight")}
    return Prepared(
        run_path=session.folder.path,
        base=session.base.name,
        base_parameters=sum(linear.in_features * linear.out_features for linear in linears)
        + sum(table.numel() for table in tables.values()),
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        device=session.device.type,
        compute_dtype=session.knobs.machine.compute_dtype,
        is_stream=session.config.data.streaming,
        num_train_documents=len(session.train_data.documents),
        num_eval_documents=len(session.eval_data.documents),
        num_dropped_documents=session.train_data.num_dropped,
        num_tokens=session.train_data.num_tokens,
        num_supervised_tokens=session.train_data.num_supervised_tokens,
        length_percentiles=length_percentiles(session.train_data.documents.lengths),
        num_repeated_rows=session.train_data.documents.store.num_repeated,
        num_kept_rows=session.train_data.num_kept_rows,
        num_stopping_rows=session.train_data.num_stopping_rows,
        seq_len=session.knobs.plan.seq_len,
        num_steps=session.knobs.num_steps,
        global_batch_size=session.config.training.global_batch_size,
        micro_batch_tokens=session.knobs.plan.micro_batch_tokens,
        packs=session.packs,
        can_pack=session.base.can_pack,
    )
