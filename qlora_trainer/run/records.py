"""What a run tells while it goes: `run.loop.train` yields these, `report` shows them.

Step numbers are optimizer steps done, so the first step is 1 and an evaluation before training is at step 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_trainer.data.rows import Reading
from qlora_trainer.planning.plan import Plan

Status = Literal["done", "stopped_early", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparing:
    """Something that takes a while before the first step begins, told as a line such as "quantizing the base"."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the run will do with the memory it was given."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRevised:
    """Memory ran out; the same documents go on in smaller micro-batches.

    Attributes:
        step: the step that is done again, or after which an evaluation is; 0 in the rehearsal.
        phase: in which it ran out.
        micro_batch_tokens_before, micro_batch_tokens: tokens that go through the model at once, at most.
    """

    step: int
    micro_batch_tokens_before: int
    micro_batch_tokens: int
    phase: Literal["rehearsal", "step", "evaluation"] = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsSkipped:
    """Rows of a data file that are no conversations were passed over, as `data.on_bad_row: skip` asks.

    Attributes:
        path: the file.
        num_rows: how many.
        reasons: of the first of them, each beginning with `file:line`.
    """

    path: str
    num_rows: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRead:
    """The next rows of streamed data are tokenised.

    Attributes:
        first_row: 1-based number of the first good one of them.
        num_rows: good ones.
        num_documents: that are left of them.
        num_dropped: rows left out because they are too long or have nothing to train on.
        num_changed: rows that were cut or split because they are too long.
    """

    first_row: int
    num_rows: int
    num_documents: int
    num_dropped: int
    num_changed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The base is loaded, the data is tokenised, the first step is next.

    Attributes:
        run_path: the run folder.
        base: what the user named as `model.base`.
        base_parameters: frozen parameters of the base.
        trainable_parameters: parameters of the adapters.
        device: "cpu" or "cuda".
        compute_dtype: "bfloat16", "float16" or "float32".
        is_stream: whether the data is read while it is trained on; then the numbers of train documents and rows, of
            their tokens and lengths are those of the rows that were read first.
        num_train_documents: documents trained on in an epoch.
        num_eval_documents: documents held out.
        num_dropped_documents: rows left out because they are longer than `seq_len` or have nothing to train on.
        num_tokens: tokens of the train documents.
        num_supervised_tokens: those of them that contribute to the loss.
        length_percentiles: tokens of a train document: 50, 90, 99 and 100 %.
        num_repeated_rows: rows with the very tokens of an earlier one.
        num_kept_rows, num_stopping_rows: rows that are trained on, and those of them of which a stop token is learned.
        seq_len: tokens that the longest document may have.
        num_steps: optimizer steps of the whole run.
        global_batch_size: documents an optimizer step.
        micro_batch_tokens: tokens that go through the model at once, at most.
        packs: whether documents share rows.
        can_pack: whether they could; an architecture that carries something from token to token cannot.
    """

    run_path: Path
    base: str
    base_parameters: int
    trainable_parameters: int
    device: str
    compute_dtype: str
    is_stream: bool
    num_train_documents: int
    num_eval_documents: int
    num_dropped_documents: int
    num_tokens: int
    num_supervised_tokens: int
    length_percentiles: tuple[int, ...]
    num_repeated_rows: int
    num_kept_rows: int
    num_stopping_rows: int
    seq_len: int
    num_steps: int
    global_batch_size: int
    micro_batch_tokens: int
    packs: bool
    can_pack: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A held-out question, answered greedily before or after training."""

    when: Literal["before", "after"]
    question: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        num_steps: steps of the whole run.
        loss: mean over the supervised tokens of the global batch.
        lr: learning rate of this step.
        lr_b: that of the B matrices, where they have another one.
        grad_norm: before clipping.
        tokens: tokens of the global batch.
        supervised_tokens: those that contribute to the loss.
        seconds: wall time of the step.
        tokens_per_second: `tokens / seconds`.
        peak_bytes: most memory used since the base was loaded: RSS on the CPU, allocated on a GPU.
        memory_bytes: memory in use now, likewise.
        samples_seen: documents since step 0.
        epoch: passes over the training data so far.
        loss_scale: what gradients were multiplied by to be fp16, where they are.
    """

    step: int
    num_steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    memory_bytes: int
    samples_seen: int
    epoch: float
    lr_b: float | None = None
    loss_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped:
    """A step whose loss or gradients were not finite: the weights and the optimizer are as they were before it.

    Attributes:
        step: as the `StepDone` before it.
        loss, grad_norm: what was found.
        rows: of the documents of its global batch, 0-based in their file.
        num_in_a_row: such steps up to this one, overflows not counted.
        is_overflow: the gradients were too large for fp16 at the scale of the loss, which is halved: no sign that the
            run diverges.
        loss_scale: of this step, where fp16 is computed in.
    """

    step: int
    loss: float
    grad_norm: float
    rows: tuple[int, ...]
    num_in_a_row: int
    is_overflow: bool = False
    loss_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The held-out loss, a mean over `eval_tokens` supervised tokens; `is_best` where none before was lower."""

    step: int
    eval_loss: float
    eval_tokens: int
    seconds: float
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint is committed: it survives a crash or a power loss from here on."""

    step: int
    path: Path
    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Training goes on from a checkpoint.

    Attributes:
        step: optimizer steps done.
        path: the checkpoint.
        rejected: newer ones that were damaged, and why.
        changes: what is asked otherwise than before, as "key: old -> new".
        notes: what else is not as it was before, a sentence each.
    """

    step: int
    path: Path
    rejected: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the run took, with exactly the keys of `summary.json`.

    Attributes:
        status: "done", "stopped_early" (no better evaluation for a while) or "interrupted" (by a signal, and saved).
        steps: optimizer steps done, those before a resume included.
        tokens: tokens trained on.
        supervised_tokens: those that contributed to the loss.
        train_seconds: wall time of the training steps.
        tokens_per_second: `tokens / train_seconds`.
        eval_loss_before: held-out loss before the first step; None without held-out data.
        eval_loss_after: held-out loss of the exported adapter; None without held-out data, or when interrupted.
        predicted_peak_bytes: what the plan said; None where there was no prediction.
        measured_peak_bytes: most memory used since the base was loaded, as a plan counts it: RSS on the CPU,
            allocated on a GPU.
        process_peak_bytes: most resident memory of the process since it began; converting, planning and quantizing the
            base are part of it.
        device: "cpu", or the GPU's name.
        versions: of the packages that the numbers depend on.
    """

    status: Status
    steps: int
    tokens: int
    supervised_tokens: int
    train_seconds: float
    tokens_per_second: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    predicted_peak_bytes: int | None
    measured_peak_bytes: int
    process_peak_bytes: int
    device: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last record of a run.

    Attributes:
        status: as in the summary.
        summary: what it took.
        run_path: the run folder.
        adapter_path: the PEFT folder; None when interrupted before it was written.
    """

    status: Status
    summary: Summary
    run_path: Path
    adapter_path: Path | None


Record = (
    Preparing
    | Reading
    | RowsSkipped
    | StreamRead
    | Planned
    | PlanRevised
    | Prepared
    | Answered
    | StepDone
    | StepSkipped
    | Evaluated
    | Saved
    | Resumed
    | Finished
)
