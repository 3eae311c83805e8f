"""The records of a made-up run, as `run.loop.train` yields them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora_trainer.run.records import (
    Answered,
    Evaluated,
    Finished,
    Prepared,
    Record,
    Saved,
    Status,
    StepDone,
    Summary,
)

RUN = Path("runs/my run")
QUESTION = "What does `ast.parse` do?"


def prepared(num_steps: int) -> Prepared:
    return Prepared(
        run_path=RUN,
        base="smollm2-135m",
        base_parameters=134_515_008,
        trainable_parameters=4_884_480,
        device="cpu",
        compute_dtype="float32",
        is_stream=False,
        num_train_documents=1520,
        num_eval_documents=180,
        num_dropped_documents=3,
        num_tokens=182_341,
        num_supervised_tokens=97_212,
        length_percentiles=(104, 161, 188, 192),
        num_repeated_rows=2,
        num_kept_rows=1518,
        num_stopping_rows=1517,
        seq_len=192,
        num_steps=num_steps,
        global_batch_size=16,
        micro_batch_tokens=1024,
        packs=True,
        can_pack=True,
    )


def step_done(step: int, num_steps: int, seconds: float = 2.0) -> StepDone:
    return StepDone(
        step=step,
        num_steps=num_steps,
        loss=3.0 - step / num_steps,
        lr=2e-4,
        grad_norm=1.0,
        tokens=2000,
        supervised_tokens=900,
        seconds=seconds,
        tokens_per_second=2000 / seconds,
        peak_bytes=int(1.42 * 2**30),
        memory_bytes=int(1.2 * 2**30),
        samples_seen=16 * step,
        epoch=16 * step / 1520,
    )


def answered(after: str = "Parse the source into an AST node.") -> tuple[Answered, Answered]:
    before = "It [bold]parses[/bold] \x1b[31mthings."
    reference = "Parse the source into an AST node. Equivalent to compile()."
    return (
        Answered(when="before", question=QUESTION, answer=before, reference=reference),
        Answered(when="after", question=QUESTION, answer=after, reference=reference),
    )


def finished(status: Status = "done", *, steps: int = 100) -> Finished:
    summary = Summary(
        status=status,
        steps=steps,
        tokens=200_000,
        supervised_tokens=90_000,
        train_seconds=200.0,
        tokens_per_second=1000.0,
        eval_loss_before=2.9123,
        eval_loss_after=None if status == "interrupted" else 1.8212,
        predicted_peak_bytes=int(1.38 * 2**30),
        measured_peak_bytes=int(1.42 * 2**30),
        process_peak_bytes=int(1.61 * 2**30),
        device="cpu",
        versions={"torch": "2"},
    )
    adapter_path = None if status == "interrupted" else RUN / "adapter"
    return Finished(status=status, summary=summary, run_path=RUN, adapter_path=adapter_path)


def whole_run(num_steps: int = 100) -> Iterator[Record]:
    before, after = answered()
    yield prepared(num_steps)
    yield Evaluated(step=0, eval_loss=2.9123, eval_tokens=12_034, seconds=9.7, is_best=True)
    yield before
    for step in range(1, num_steps + 1):
        yield step_done(step, num_steps)
        if step == num_steps // 2:
            yield Evaluated(step=step, eval_loss=2.1, eval_tokens=12_034, seconds=9.7, is_best=True)
            path = RUN / "checkpoints" / f"step-{step:08d}"
            yield Saved(step=step, path=path, seconds=0.21, num_bytes=78_200_000)
    yield after
    yield finished(steps=num_steps)
