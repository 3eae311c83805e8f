"""What goes wrong, or is asked otherwise, is told as a line or a few."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qlora_trainer.report.tables import event_line
from qlora_trainer.run.records import PlanRevised, Resumed, RowsSkipped, StepSkipped, StreamRead


def test_a_resume_tells_what_was_damaged_and_what_is_asked_otherwise() -> None:
    record = Resumed(
        step=4,
        path=Path("runs/a/checkpoints/step-00000004"),
        rejected=("step-00000006 (state.json: missing)",),
        changes=("training.save_every: 2 -> 1", "output.dir: 'a\x1b[31m' -> 'b'"),
        notes=("torch 2.9 -> 2.10: the numbers may differ in their last digits",),
    )
    assert event_line(record).plain.splitlines() == [
        "resumed at step 4 from runs/a/checkpoints/step-00000004",
        "passed over, damaged: step-00000006 (state.json: missing)",
        "changed: training.save_every: 2 -> 1",
        "changed: output.dir: 'a[31m' -> 'b'",
        "note: torch 2.9 -> 2.10: the numbers may differ in their last digits",
    ]


def test_the_next_rows_of_a_stream_are_counted() -> None:
    record = StreamRead(first_row=10_241, num_rows=10_240, num_documents=10_239, num_dropped=1, num_changed=2)
    told = "stream: rows 10,241 to 20,480, 10,239 documents, 1 row dropped, 2 rows cut or split"
    assert event_line(record).plain == told
    whole = StreamRead(first_row=1, num_rows=7, num_documents=7, num_dropped=0, num_changed=0)
    assert event_line(whole).plain == "stream: rows 1 to 7, 7 documents"


def test_a_skipped_step_tells_its_rows() -> None:
    line = event_line(StepSkipped(step=7, loss=math.nan, grad_norm=1.5, rows=(3, 14), num_in_a_row=1)).plain
    assert line == "step 7 skipped, no weight was changed: loss nan, gradient norm 1.5 on rows 3, 14"


def test_skipped_rows_are_counted_and_the_first_are_listed() -> None:
    reasons = ("rows.jsonl:2: broken JSON", "rows.jsonl:5: 3")
    lines = event_line(RowsSkipped(path="rows.jsonl", num_rows=1003, reasons=reasons)).plain.splitlines()
    assert lines == ["1,003 bad rows of rows.jsonl skipped", *(f"  {reason}" for reason in reasons), "  and 1,001 more"]
    assert event_line(RowsSkipped(path="x", num_rows=1, reasons=reasons[:1])).plain.count("\n") == 1


@pytest.mark.parametrize(
    "phase, step, where",
    [("rehearsal", 0, "in the rehearsal"), ("step", 3, "at step 3"), ("evaluation", 3, "in the evaluation at step 3")],
)
def test_a_revised_plan_tells_where_memory_ran_out(phase: str, step: int, where: str) -> None:
    record = PlanRevised(step=step, micro_batch_tokens_before=512, micro_batch_tokens=256, phase=phase)  # type: ignore[arg-type]
    assert event_line(record).plain == (
        f"out of memory {where}: the same documents again, micro-batches cut from 512 to 256 tokens"
    )
