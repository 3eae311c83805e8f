"""A run's page: whole without a network, true to the logs, and safe whatever a name holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.report.line_chart import HEIGHT, WIDTH, Line, line_chart, thinned, ticks
from qlora_trainer.report.run_report import reported, write_run_report
from qlora_trainer.run.folder import RunFolder
from qlora_trainer.run.records import Finished, Summary
from tests.report.run_records import finished

SUMMARY: Summary = finished().summary


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "<b>run")
    folder.path.mkdir()
    steps = [
        {"step": step, "loss": 5.0 / step, "peak_bytes": 2**30 + step, "tokens_per_second": 100.0 + step}
        for step in range(1, 31)
    ]
    steps[4]["loss"] = None  # type: ignore[assignment]  # what is not finite is written so
    evals = [{"step": step, "eval_loss": 4.0 - step / 30} for step in (0, 15, 30)]
    for path, lines in ((folder.metrics_path, steps), (folder.evals_path, evals)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.plan_path.write_text(json.dumps({"model": "<script>alert(1)</script>"}))
    return folder


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_loss_memory_and_throughput_are_shown(folder: RunFolder) -> None:
    write_run_report(folder, SUMMARY)
    page = folder.report_path.read_text()
    loss, memory, throughput = charts(page)
    before, after, held_out = [points(line) for line in loss.iter("polyline")]
    assert (len(before), len(after), len(held_out)) == (4, 25, 3)  # a gap where the loss was not finite
    assert [len(points(line)) for line in memory.iter("polyline")] == [30, 2]
    (speed,) = [points(line) for line in throughput.iter("polyline")]
    assert [x for x, _ in speed] == sorted({x for x, _ in speed})
    assert [y for _, y in speed] == sorted({y for _, y in speed}, reverse=True)  # faster is higher up
    assert all(
        y < HEIGHT / 2 for line in (*memory.iter("polyline"), *throughput.iter("polyline")) for _, y in points(line)
    )
    assert "Planned 1.38 GiB, measured 1.42 GiB (+2.9%)" in page
    assert "class=loud" in page


def test_a_run_within_its_plan_is_not_loud(folder: RunFolder) -> None:
    write_run_report(folder, replace(SUMMARY, predicted_peak_bytes=SUMMARY.measured_peak_bytes))
    assert "class=loud" not in folder.report_path.read_text()


def test_it_needs_no_network_and_runs_no_script(folder: RunFolder) -> None:
    write_run_report(folder, SUMMARY)
    page = folder.report_path.read_text()
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;run" in page
    assert not re.search(r"<script|<b>run|https?://|@import|url\(|<link|<img", page)


def test_a_run_without_logs_has_a_page_all_the_same(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    nothing = replace(SUMMARY, steps=0, predicted_peak_bytes=None, eval_loss_before=None, eval_loss_after=None)
    write_run_report(folder, nothing)
    assert charts(folder.report_path.read_text()) == []


def test_the_page_is_written_after_the_last_record(folder: RunFolder) -> None:
    record = replace(finished(), run_path=folder.path)
    seen = []
    for given_on in reported([record]):
        seen.append(given_on)
        assert isinstance(given_on, Finished)
        assert not folder.report_path.exists()
    assert seen == [record]
    assert folder.report_path.is_file()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_hold_what_is_shown(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert found[0] <= low + 1e-9 * abs(low) + 1e-9
    assert found[-1] >= low + width - 1e-9 * abs(low + width) - 1e-9
    assert len(found) <= 8


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=40))
def test_any_points_stay_inside_the_picture(values: Sequence[float]) -> None:
    line = Line(name="x", points=list(enumerate(values)), style="first", is_dotted=True)
    if not any(map(math.isfinite, values)):
        with pytest.raises(ValueError, match="without a finite point"):
            line_chart([line], label="x", x_label="x", y_text=str)
        return
    chart = ElementTree.fromstring(line_chart([line], label="x", x_label="x", y_text=str))
    circles = [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in chart.iter("circle")]
    assert len(circles) == sum(map(math.isfinite, values))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in circles)


def test_long_lines_are_thinned_to_means() -> None:
    long = [(float(step), float(step % 2)) for step in range(10_000)]
    short = thinned(long)
    assert len(short) <= 1_001
    assert short[-1] == long[-1]
    assert {y for _, y in short[:-1]} == {0.5}
    assert thinned(long[:50]) == long[:50]
