"""One training run as a generator of records: prepare, then evaluate, save and step until it is done.

The state between two steps is `Progress` and what `Session` points at; a checkpoint holds both, so the loop below is
entered the same way by a new run and by one that goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.show import to_yaml
from qlora_trainer.data.micro_batches import cut, cut_padded
from qlora_trainer.errors import DivergedError, DoesNotFitError, InterruptedAndSaved
from qlora_trainer.hardware.memory import is_out_of_memory, read_memory
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.run.answer import answer_all
from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.finish import finish, plan_json, resolved_config
from qlora_trainer.run.folder import (
    append_eval,
    append_skipped,
    append_step,
    open_run_folder,
    sync_logs,
    write_config,
    write_plan,
)
from qlora_trainer.run.planned import halved_or_refused, lack_of_memory_told
from qlora_trainer.run.prepare import prepare
from qlora_trainer.run.records import (
    Answered,
    Evaluated,
    PlanRevised,
    Prepared,
    Preparing,
    Record,
    Resumed,
    Saved,
    StepDone,
    StepSkipped,
)
from qlora_trainer.run.resume import saved_progress
from qlora_trainer.run.session import Progress, Session
from qlora_trainer.run.signals import Interruption, watch_signals
from qlora_trainer.run.trackers import open_trackers
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.schedule import learning_rate
from qlora_trainer.step.train_step import accumulate_gradients, evaluate

ANSWER_TOKENS = 64  # of a sample answer, at most
MAX_SKIPPED_IN_A_ROW = 3  # one bad batch is passed over; a run that has diverged gives nothing else from then on


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
        yield Resumed(step=progress.step, path=session.resumed.path, rejected=rejected, changes=changes)
    elif not interruption.requested:
        yield from _answer(session, "before")
    saved_step = progress.step if session.resumed is not None else -1
    while True:
        is_best = False
        if _is_evaluation_due(session, progress) and not interruption.requested:
            session, progress, is_best = yield from _evaluate_or_revise(session, progress)
        is_last = _is_last(session, progress)
        is_save_due = progress.step > 0 and (progress.step % session.knobs.save_every == 0 or is_last or is_best)
        if (is_save_due or interruption.requested) and (progress.step != saved_step or is_best):
            with lack_of_memory_told(f"saving step {progress.step}"):
                saved = _save(session, progress, is_best=is_best)
            yield saved
            saved_step = progress.step
        if interruption.requested:
            yield finish(session, progress, status="interrupted")
            raise _interrupted(session, interruption.signal_name or "a signal", progress.step)
        if is_last:
            break
        session, progress = yield from _step_or_revise(session, progress)
    yield from _answer(session, "after")
    yield finish(session, progress, status="done" if progress.step >= session.knobs.num_steps else "stopped_early")


def _evaluate_or_revise(
    session: Session, progress: Progress
) -> Generator[Evaluated | PlanRevised, None, tuple[Session, Progress, bool]]:
    """Evaluate, in smaller micro-batches where memory runs out; returns whether it was the best so far."""
    while True:
        try:
            progress, evaluated = _evaluate(session, progress)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        session, revised = _revise(session, session.eval_data.documents, progress.step, phase="evaluation")
        yield revised
    append_eval(session.folder, evaluated)
    yield evaluated
    return session, progress, evaluated.is_best


def _step_or_revise(
    session: Session, progress: Progress
) -> Generator[StepDone | StepSkipped | PlanRevised, None, tuple[Session, Progress]]:
    """Take a step, in smaller micro-batches where memory runs out."""
    while True:
        try:
            progress, done, skipped = _step(session, progress)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        documents = [session.train_data.documents[position] for position in session.order.batch(progress.step)]
        session, revised = _revise(session, documents, progress.step + 1, phase="step")
        yield revised
    if skipped is not None:
        append_skipped(session.folder, skipped)
    append_step(session.folder, done)
    yield done
    if skipped is not None:
        yield skipped
        _require_some_finite(skipped)
    return session, progress


def _step(session: Session, progress: Progress) -> tuple[Progress, StepDone, StepSkipped | None]:
    """One optimizer step; one whose loss or gradient norm is not finite leaves weights and optimizer as they were."""
    start = time.perf_counter()
    config, knobs, step = session.config.training, session.knobs, progress.step
    documents = [session.train_data.documents[position] for position in session.order.batch(step)]
    supervised_tokens = sum(document.num_supervised_tokens for document in documents)
    session.optimizer.zero_gradients()
    loss = accumulate_gradients(
        session.model,
        _micro_batches(session, documents, step=step),
        num_supervised_tokens=supervised_tokens,
        loss_chunk_tokens=knobs.plan.loss_chunk,
    )
    grad_norm = session.optimizer.clip_gradients(config.max_grad_norm)
    loss_value, grad_norm_value = float(loss), float(grad_norm)
    rate = learning_rate(
        step,
        num_steps=knobs.num_steps,
        peak=config.learning_rate,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
    )
    skipped = None
    if math.isfinite(loss_value) and math.isfinite(grad_norm_value):
        _update(session, rate, step)
    else:
        skipped = StepSkipped(
            step=step + 1,
            loss=loss_value,
            grad_norm=grad_norm_value,
            rows=tuple(document.index for document in documents),
            num_in_a_row=progress.skipped_in_a_row + 1,
        )
    seconds = time.perf_counter() - start
    tokens = sum(document.num_tokens for document in documents)
    memory = read_memory(session.device)
    progress = replace(
        progress,
        step=step + 1,
        tokens=progress.tokens + tokens,
        supervised_tokens=progress.supervised_tokens + supervised_tokens,
        train_seconds=progress.train_seconds + seconds,
        skipped_in_a_row=0 if skipped is None else skipped.num_in_a_row,
    )
    done = StepDone(
        step=progress.step,
        num_steps=knobs.num_steps,
        loss=loss_value,
        lr=rate,
        grad_norm=grad_norm_value,
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=memory.peak_bytes,
        memory_bytes=memory.now_bytes,
        samples_seen=session.order.samples_seen(progress.step),
        epoch=session.order.epoch(progress.step),
    )
    return progress, done, skipped


def _require_some_finite(skipped: StepSkipped) -> None:
    """Go on after a step that was skipped, unless too many were.

    Raises:
        DivergedError: `MAX_SKIPPED_IN_A_ROW` in a row; the weights are as they were before the first of them.
    """
    if skipped.num_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    rows = ", ".join(map(str, skipped.rows))
    numbers = f"loss {skipped.loss}, gradient norm {skipped.grad_norm}"
    raise DivergedError(
        where=f"step {skipped.step}",
        found=f"{numbers} on rows {rows}, after {skipped.num_in_a_row - 1} such steps in a row",
        expected="finite numbers",
        fix="Lower training.learning_rate or look at the rows in skipped.jsonl; the checkpoints before are intact.",
    )


def _update(session: Session, rate: float, step: int) -> None:
    """The optimizer's step; unlike a backward pass it cannot be tried again once a part of it is done.

    Raises:
        DoesNotFitError: memory ran out in it.
    """
    try:
        session.optimizer.update(rate)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            where=f"the optimizer's update of step {step + 1}",
            found="no memory left, and weights that may be half updated",
            expected="the memory that the plan counts on to be free",
            fix="End what else uses the memory and go on from the last checkpoint: --resume auto.",
        ) from error


def _evaluate(session: Session, progress: Progress) -> tuple[Progress, Evaluated]:
    """Held-out loss now; before the first step it is the baseline, not a candidate for the best."""
    start = time.perf_counter()
    documents = session.eval_data.documents
    loss_sum = evaluate(
        session.model,
        _micro_batches(session, documents, step=0),
        loss_chunk_tokens=session.knobs.plan.loss_chunk,
    )
    eval_tokens = session.eval_data.num_supervised_tokens
    eval_loss = float(loss_sum) / eval_tokens
    progress = replace(progress, evaluated_step=progress.step)
    is_best = False
    if progress.step == 0:
        progress = replace(progress, eval_loss_before=eval_loss if math.isfinite(eval_loss) else None)
    elif math.isfinite(eval_loss) and (progress.best_eval_loss is None or eval_loss < progress.best_eval_loss):
        is_best = True
        progress = replace(progress, best_eval_loss=eval_loss, best_step=progress.step, evals_without_better=0)
    else:
        progress = replace(progress, evals_without_better=progress.evals_without_better + 1)
    seconds = time.perf_counter() - start
    evaluated = Evaluated(
        step=progress.step, eval_loss=eval_loss, eval_tokens=eval_tokens, seconds=seconds, is_best=is_best
    )
    return progress, evaluated


def _save(session: Session, progress: Progress, *, is_best: bool) -> Saved:
    sync_logs(session.folder)
    return save_checkpoint(
        session.folder.checkpoints_path,
        step=progress.step,
        adapter={name: parameter.data for name, parameter in trainable_parameters(session.model).items()},
        optimizer=session.optimizer.state_dict(),
        state={
            "run_id": session.run_id,
            "samples_seen": session.order.samples_seen(progress.step),
            "epoch": session.order.epoch(progress.step),
            "seed": session.config.training.seed,
            "progress": progress.as_json(),
            "plan": session.knobs.as_json(),
            "plan_at_start": session.knobs_at_start.as_json(),
            "config": dict(session.asked),
        },
        fingerprints=session.fingerprints,
        keep_checkpoints=session.config.output.keep_checkpoints,
        is_best=is_best,
    )


def _answer(session: Session, when: str) -> Iterator[Answered | Preparing]:
    if not session.questions:
        return
    yield Preparing(what=f"answering {len(session.questions)} held-out questions")
    with lack_of_memory_told(f"answering held-out questions {when} training"):
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


def _micro_batches(session: Session, documents: Sequence[Document], *, step: int) -> Generator[MicroBatch]:
    lengths = [document.num_tokens for document in documents]
    packing = session.config.data.packing
    for positions in (cut if packing else cut_padded)(lengths, session.knobs.plan.micro_batch_tokens):
        chosen = [documents[position] for position in positions]
        yield make_micro_batch(chosen, seed=session.config.training.seed, step=step, packing=packing)


def _is_evaluation_due(session: Session, progress: Progress) -> bool:
    is_at_step = progress.step % session.knobs.eval_every == 0 or progress.step == session.knobs.num_steps
    return bool(session.eval_data.documents) and is_at_step and progress.evaluated_step != progress.step


def _is_last(session: Session, progress: Progress) -> bool:
    patience = session.config.training.early_stopping_patience
    has_no_patience_left = patience is not None and progress.evals_without_better >= patience
    return has_no_patience_left or progress.step >= session.knobs.num_steps  # beyond: a resume asked for fewer steps


def _revise(
    session: Session, documents: Sequence[Document], step: int, *, phase: Literal["step", "evaluation"]
) -> tuple[Session, PlanRevised]:
    """Memory ran out: the same documents again, with the same draws, in micro-batches of half the size.

    Raises:
        DoesNotFitError: they are of one document already.
    """
    longest = max(document.num_tokens for document in documents)
    before = session.knobs.plan.micro_batch_tokens
    where = f"step {step}" if phase == "step" else f"the evaluation at step {step}"
    knobs = halved_or_refused(session.knobs, longest_tokens=longest, where=where)
    session = replace(session, knobs=knobs)
    write_plan(session.folder, plan_json(session))
    revised = PlanRevised(
        step=step,
        phase=phase,
        micro_batch_tokens_before=before,
        micro_batch_tokens=knobs.plan.micro_batch_tokens,
    )
    return session, revised


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
        num_train_documents=len(session.train_data.documents),
        num_eval_documents=len(session.eval_data.documents),
        num_dropped_documents=session.train_data.num_rows - len(session.train_data.documents),
        num_tokens=session.train_data.num_tokens,
        num_supervised_tokens=session.train_data.num_supervised_tokens,
        seq_len=session.knobs.plan.seq_len,
        num_steps=session.knobs.num_steps,
        global_batch_size=session.config.training.global_batch_size,
        micro_batch_tokens=session.knobs.plan.micro_batch_tokens,
    )
