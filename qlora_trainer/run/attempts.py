"""A step and an evaluation, each tried again in smaller micro-batches where memory runs out.

The documents, and every random draw, stay the same, so that a second attempt learns what the first would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.data.micro_batches import cut_documents
from qlora_trainer.errors import DivergedError
from qlora_trainer.hardware.heap import release_free_memory
from qlora_trainer.hardware.memory import OutOfMemoryError, memory_errors_as_ours, read_memory
from qlora_trainer.run.finish import plan_json
from qlora_trainer.run.folder import append_eval, append_skipped, append_step, write_plan
from qlora_trainer.run.planned import halved, halved_or_refused
from qlora_trainer.run.records import Evaluated, PlanRevised, StepDone, StepSkipped
from qlora_trainer.run.session import Progress, Session
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.schedule import learning_rate
from qlora_trainer.step.train_step import accumulate_gradients, evaluate

MAX_SKIPPED_IN_A_ROW = 3  # one bad batch is passed over; a run that has diverged gives nothing else from then on


def evaluate_or_revise(
    session: Session, progress: Progress
) -> Generator[Evaluated | PlanRevised, None, tuple[Session, Progress, bool]]:
    """Evaluate, in smaller micro-batches where memory runs out; returns whether it was the best so far.

    Raises:
        DoesNotFitError: memory runs out with one document, too.
    """
    while True:
        with suppress(OutOfMemoryError), memory_errors_as_ours():
            progress, evaluated = _evaluate(session, progress)
            break
        where = f"the evaluation at step {progress.step}"
        session, revised = _revise(session, progress.step, where, phase="evaluation")
        yield revised
    append_eval(session.folder, evaluated)
    yield evaluated
    return session, progress, evaluated.is_best


def step_or_revise(
    session: Session, progress: Progress, documents: Sequence[Document]
) -> Generator[StepDone | StepSkipped | PlanRevised, None, tuple[Session, Progress]]:
    """Take a step, in smaller micro-batches where memory runs out.

    One whose loss or gradient norm is not finite leaves weights and optimizer as they were.

    Raises:
        DoesNotFitError: memory runs out with one document, too.
        DivergedError: `MAX_SKIPPED_IN_A_ROW` such steps in a row, overflows of fp16 gradients not counted.
    """
    step = progress.step
    while True:
        start = time.perf_counter()
        with suppress(OutOfMemoryError), memory_errors_as_ours():
            loss_and_norm = _accumulate(session, documents, step)
            break
        session, revised = _revise(session, step + 1, f"step {step + 1}", phase="step")
        yield revised
    rate = _learning_rate(session, step)
    session = yield from _update_or_revise(session, rate, step, loss_and_norm)
    found = _read(session, loss_and_norm)
    skipped = None if found.is_finite else _skipped(session, progress, documents, found)
    seconds = time.perf_counter() - start
    progress, done = _stepped(session, progress, documents, seconds, skipped, found, lr=rate)
    if skipped is not None:
        append_skipped(session.folder, skipped)
    append_step(session.folder, done)
    yield done
    if skipped is not None:
        yield skipped
        _require_some_finite(skipped)
    return session, progress


@dataclass(frozen=True, slots=True)
class _Found:
    """What the host gets to know of a step."""

    loss: float
    grad_norm: float
    loss_scale: float | None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_overflow(self) -> bool:
        """Gradients left the range of fp16, which a smaller scale cures. At 1 there is no scale that could be."""
        return not self.is_finite and math.isfinite(self.loss) and self.loss_scale is not None and self.loss_scale > 1


def _read(session: Session, loss_and_norm: Tensor) -> _Found:
    """The one wait for the device, when all of the step is under way; the scaler knows of the step then."""
    if session.scaler is None:
        loss, grad_norm = loss_and_norm.tolist()
        return _Found(loss, grad_norm, None)
    numbers = torch.cat((loss_and_norm, session.scaler.scale.view(1)))
    session.scaler.update(loss_and_norm)
    return _Found(*numbers.tolist())


def _skipped(session: Session, progress: Progress, documents: Sequence[Document], found: _Found) -> StepSkipped:
    """A step that changed nothing is taken back."""
    session.optimizer.forget_update()
    return StepSkipped(
        step=progress.step + 1,
        loss=found.loss,
        grad_norm=found.grad_norm,
        rows=tuple(document.index for document in documents),
        num_in_a_row=progress.skipped_in_a_row + (not found.is_overflow),
        is_overflow=found.is_overflow,
        loss_scale=found.loss_scale,
    )


def _accumulate(session: Session, documents: Sequence[Document], step: int) -> Tensor:
    """Loss and gradient norm of a step, fp32 [2], on the device; the gradients, clipped, are the optimizer's."""
    session.optimizer.zero_gradients()
    loss = accumulate_gradients(
        session.model,
        _micro_batches(session, documents, step=step),
        num_supervised_tokens=sum(document.num_supervised_tokens for document in documents),
        loss_chunk_tokens=session.knobs.plan.loss_chunk,
        loss_scale=None if session.scaler is None else session.scaler.scale,
    )
    if session.scaler is not None:
        session.scaler.unscale_(session.optimizer.gradient)
    grad_norm = session.optimizer.clip_gradients(session.config.training.max_grad_norm)
    return torch.stack((loss, grad_norm))


def _update_or_revise(
    session: Session, rate: float, step: int, loss_and_norm: Tensor
) -> Generator[PlanRevised, None, Session]:
    """The optimizer's update: where memory runs out in it, the rest of it, with the gradients that it had.

    It takes the same memory again. What gives it a chance is what was freed since: the update's own workspace, and the
    allocator's cache. So it is tried again once at one document, too. Smaller micro-batches, which are taken before,
    change nothing of this update: each is one more try, and keeps the heap smaller when later steps are updated.
    """
    is_last_try, global_batch_size = False, session.config.training.global_batch_size
    while True:
        with suppress(OutOfMemoryError), memory_errors_as_ours():
            session.optimizer.update(rate, loss_and_norm)
            return session
        release_free_memory()
        if not is_last_try and halved(session.knobs.plan, global_batch_size) is None:
            is_last_try = True
            continue
        session, revised = _revise(session, step + 1, f"the optimizer's update of step {step + 1}", phase="step")
        yield revised


def _learning_rate(session: Session, step: int) -> float:
    training = session.config.training
    return learning_rate(
        step,
        num_steps=session.knobs.num_steps,
        peak=training.learning_rate,
        schedule=training.schedule,
        warmup_ratio=training.warmup_ratio,
    )


def _stepped(
    session: Session,
    progress: Progress,
    documents: Sequence[Document],
    seconds: float,
    skipped: StepSkipped | None,
    found: _Found,
    *,
    lr: float,
) -> tuple[Progress, StepDone]:
    tokens = sum(document.num_tokens for document in documents)
    supervised_tokens = sum(document.num_supervised_tokens for document in documents)
    memory, ratio = read_memory(session.device), session.config.training.loraplus_lr_ratio
    progress = replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + tokens,
        supervised_tokens=progress.supervised_tokens + supervised_tokens,
        train_seconds=progress.train_seconds + seconds,
        skipped_in_a_row=0 if skipped is None else skipped.num_in_a_row,
    )
    done = StepDone(
        step=progress.step,
        num_steps=session.knobs.num_steps,
        loss=found.loss,
        lr=lr,
        lr_b=None if ratio == 1.0 else lr * ratio,
        grad_norm=found.grad_norm,
        loss_scale=found.loss_scale,
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=memory.peak_bytes,
        memory_bytes=memory.now_bytes,
        samples_seen=session.batches.samples_seen(progress.step),
        epoch=session.batches.epoch(progress.step),
    )
    return progress, done


def _require_some_finite(skipped: StepSkipped) -> None:
    """Go on after a step that was skipped, unless too many were.

    Raises:
        DivergedError: `MAX_SKIPPED_IN_A_ROW` in a row; the weights are as they were before the first of them.
    """
    if skipped.is_overflow or skipped.num_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    rows = ", ".join(map(str, skipped.rows))
    numbers = f"loss {skipped.loss}, gradient norm {skipped.grad_norm}"
    raise DivergedError(
        where=f"step {skipped.step}",
        found=f"{numbers} on rows {rows}, after {skipped.num_in_a_row - 1} such steps in a row",
        expected="finite numbers",
        fix="Lower training.learning_rate or look at the rows in skipped.jsonl; the checkpoints before are intact.",
    )


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


def _micro_batches(session: Session, documents: Sequence[Document], *, step: int) -> Generator[MicroBatch]:
    packing = session.packs
    for positions in cut_documents(documents, session.knobs.plan.micro_batch_tokens, packing=packing):
        chosen = [documents[position] for position in positions]
        yield make_micro_batch(chosen, seed=session.config.training.seed, step=step, packing=packing)


def _revise(
    session: Session, step: int, where: str, *, phase: Literal["step", "evaluation"]
) -> tuple[Session, PlanRevised]:
    """Memory ran out: the same documents again, with the same draws, in micro-batches of half the size.

    Raises:
        DoesNotFitError: they are of one document already.
    """
    before = session.knobs.plan.micro_batch_tokens
    knobs = halved_or_refused(session.knobs, session.config.training.global_batch_size, where=where)
    session = replace(session, knobs=knobs)
    write_plan(session.folder, plan_json(session))
    revised = PlanRevised(
        step=step,
        phase=phase,
        micro_batch_tokens_before=before,
        micro_batch_tokens=knobs.plan.micro_batch_tokens,
    )
    return session, revised
