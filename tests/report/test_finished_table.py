"""The end of a run: a plan that was exceeded is said loudly, and only then."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from qlora_trainer.report.formats import format_bytes
from qlora_trainer.report.tables import finished_table
from tests.report.run_records import finished

PREDICTED_BYTES = 1000 * 2**20


def shown(measured_bytes: int, predicted_bytes: int | None) -> str:
    record = finished()
    summary = replace(record.summary, measured_peak_bytes=measured_bytes, predicted_peak_bytes=predicted_bytes)
    console = Console(file=io.StringIO(), width=200)
    console.print(finished_table(replace(record, summary=summary), question=None))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("share, said", [(1.021, "2.1 %"), (1.5, "50.0 %")])
def test_a_plan_that_was_exceeded_is_said(share: float, said: str) -> None:
    text = shown(round(share * PREDICTED_BYTES), PREDICTED_BYTES)
    assert f"This run took {said} more memory than its plan said." in text
    assert f"{format_bytes(PREDICTED_BYTES)} predicted" in text


@pytest.mark.parametrize("share", [0.5, 1.0, 1.019])
def test_a_plan_that_was_kept_is_not(share: float) -> None:
    assert "more memory" not in shown(round(share * PREDICTED_BYTES), PREDICTED_BYTES)
    assert "more memory" not in shown(PREDICTED_BYTES, None)
