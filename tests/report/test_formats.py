from __future__ import annotations

import pytest

from qlora_trainer.report.formats import (
    counted,
    format_bytes,
    format_change,
    format_clock,
    format_loss,
    format_seconds,
)


@pytest.mark.parametrize(
    "num_bytes, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (78_200_000, "74.6 MiB"),
        (300 * 2**20, "300 MiB"),
        (1000 * 2**20, "0.98 GiB"),
        (int(1.42 * 2**30), "1.42 GiB"),
        (5000 * 2**30, "5000 GiB"),
    ],
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.0, "0.00 s"), (0.214, "0.21 s"), (0.999, "1.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_clock() -> None:
    assert [format_clock(seconds) for seconds in (0.2, 59.4, 59.6, 3599.6)] == ["0:00", "0:59", "1:00", "1:00:00"]


def test_losses_and_changes() -> None:
    assert (format_loss(1.23456), format_loss(None)) == ("1.2346", "-")
    assert format_change(2.0, 1.0) == "-50.0 %"
    assert format_change(2.0, 2.1) == "+5.0 %"
    assert format_change(0.0, 1.0) == format_change(float("nan"), 1.0) == ""


def test_counted() -> None:
    assert (counted(1, "step"), counted(1234, "step")) == ("1 step", "1,234 steps")
