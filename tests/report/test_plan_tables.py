from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from qlora_trainer.planning.plan import FrontierCell, Plan, WouldFit
from qlora_trainer.report.frontier_table import frontier_table
from qlora_trainer.report.plan_tables import plan_report
from tests.report.made_plan import BREAKDOWN, GIB, MIB, failing_plan, fitting_plan, gpu_plan, host_failing_plan

FILLS = "█▓▒░▄·!"
PLANS = [fitting_plan, gpu_plan, failing_plan, host_failing_plan]


def shown(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def line_with(lines: list[str], words: str) -> str:
    found = [line for line in lines if words in line]
    assert len(found) == 1, (words, found)
    return found[0]


def bar_in(line: str) -> str:
    """What is drawn behind the percents of a row."""
    bar = line.rpartition("%")[2].strip()
    assert set(bar) <= set(FILLS), line
    return bar


def whole_bar(lines: list[str]) -> str:
    title = next(number for number, line in enumerate(lines) if line.startswith("memory at the peak"))
    return lines[title + 1].strip()


@pytest.mark.parametrize("make_plan", PLANS)
def test_the_made_plans_are_consistent(make_plan: Callable[[], Plan]) -> None:
    plan = make_plan()
    predicted = plan.predicted
    assert sum(predicted.breakdown.values()) == predicted.allocated_peak_bytes
    assert max(predicted.phases.values()) == predicted.phases[predicted.peak_phase] == predicted.allocated_peak_bytes
    device_bytes = predicted.process_peak_bytes - plan.budget_bytes
    host_bytes = predicted.host_peak_bytes - plan.host_budget_bytes
    assert plan.fits is (max(device_bytes, host_bytes) <= 0)
    assert plan.missing_bytes == max(0, device_bytes, 0 if plan.device == "cpu" else host_bytes)


def test_a_plan_that_fits_is_told_in_words_and_numbers() -> None:
    lines = shown(plan_report(fitting_plan()))
    expected = [
        "fits on the CPU in 2.00 GiB, 546 MiB to spare",
        "  base         smollm2-135m",
        "  adapters     rank 16, alpha 32, 4.88 M parameters",
        "  document     1,024 tokens at most (seq_len)",
        "  micro-batch  2 documents, 2,048 tokens at most",
        "  step         8 micro-batches",
        "  activations  kept in 22 layers, recomputed in 8",
        "  loss chunk   logits of 256 positions at a time",
        "  optimizer    AdamW, state of 8 bits, on the device",
        "  speed        about 1,234 tokens/s (an estimate)",
        "memory at the peak (train backward), in shares of 2.00 GiB",
        "  █  embedding and head       108 MiB    5 %  ██",
        "  ▓  optimizer state         10.0 MiB   <1 %",
        "  ▒  saved activations        640 MiB   31 %  ▒▒▒▒▒▒▒▒▒▒▒",
        "     allocated peak          1.07 GiB   54 %",
        "  ▄  program and libraries    404 MiB   20 %  ▄▄▄▄▄▄▄",
        "     expected RSS peak       1.47 GiB   73 %",
        "  ·  free                     546 MiB   27 %  ·········",
        "     budget                  2.00 GiB  100 %",
        "     worst case              1.65 GiB   82 %",
        "allocated peak of each phase, ► the highest",
        "     load                     300 MiB   15 %  █████",
        "  ►  train backward          1.07 GiB   54 %  ██████████████████",
        "given up to fit, the least first",
        "  - 8 of 30 layers recompute their activations",
    ]
    rest = iter(lines)
    for line in expected:
        assert line in rest, line  # in this order: `in` goes on where it stopped
    assert sum("►" in line for line in lines) == 2
    assert not any("would" in line or "missing" in line for line in lines)


def test_a_gpu_has_a_driver_and_a_host() -> None:
    lines = shown(plan_report(gpu_plan()))
    assert lines[0] == "fits on NVIDIA H100 80GB HBM3 in 79.0 GiB, 52.4 GiB to spare"
    assert "  host memory  5.00 GiB of 64.0 GiB" in lines
    assert "  optimizer    AdamW, state of 32 bits, paged out where memory is short" in lines
    assert line_with(lines, "expected driver peak").split()[-4:-1] == ["26.6", "GiB", "34"]
    assert not any("RSS" in line or "given up" in line for line in lines)


def test_a_plan_that_does_not_fit_says_what_is_missing_and_what_would_help() -> None:
    lines = shown(plan_report(failing_plan()))
    assert lines[0] == "does not fit on the CPU in 1.00 GiB, 478 MiB missing"
    assert line_with(lines, "  missing  ").startswith("  !  missing                  478 MiB   47 %  !!!!!")
    start = lines.index("any one of these changes would make it fit")
    assert lines[start + 1] == "  seq_len        1024 → 512        allocated peak 420 MiB"
    assert lines[start + 2] == "  memory.budget  1 GiB → 1.65 GiB  allocated peak 1.07 GiB"
    assert "given up, the least first" in lines
    assert not any("free" in line for line in lines)

    without = shown(plan_report(replace(failing_plan(), would_fit=())))
    assert without[-1] == "no single change would make it fit"


def test_the_host_may_be_what_is_too_small() -> None:
    lines = shown(plan_report(host_failing_plan()))
    assert lines[0] == "does not fit on NVIDIA H100 80GB HBM3, 2.00 GiB of host memory missing"
    assert "  host memory  5.00 GiB of 3.00 GiB" in lines
    assert any("free" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("make_plan", PLANS)
def test_no_line_is_wider_than_the_console_and_no_row_wraps(make_plan: Callable[[], Plan], width: int) -> None:
    plan = make_plan()
    lines = shown(plan_report(plan), width) + shown(frontier_table(plan), width)
    assert max(len(line) for line in lines) <= min(width, 100)
    assert not any("…" in line for line in lines)
    labels = ("base weights in NF4", "dequantized weights", "expected", "optimizer step", "budget   ", "worst case")
    for label in labels:
        assert line_with(lines, f"  {label}").count("%") == 1


@pytest.mark.parametrize("width", [60, 80, 100])
def test_bars_are_as_long_as_their_shares(width: int) -> None:
    plan = fitting_plan()
    lines = shown(plan_report(plan), width)
    cells = width - 46  # what the columns before the bar leave
    for label, num_bytes in (
        ("saved activations", 640 * MIB),
        ("recomputed layer", 96 * MIB),
        ("logits   ", 144 * MIB),
        ("free", 546 * MIB),
        ("train forward", 1002 * MIB),
        ("▓  adapters", 19 * MIB),
    ):
        assert len(bar_in(line_with(lines, f"  {label}"))) == round(cells * num_bytes / (2 * GIB)), label


@pytest.mark.parametrize("width", [60, 80])
def test_the_whole_budget_is_one_bar(width: int) -> None:
    bar = whole_bar(shown(plan_report(fitting_plan()), width))
    assert len(bar) == width - 4
    groups = {
        "█": BREAKDOWN["base"] + BREAKDOWN["quant_state"] + BREAKDOWN["embedding"],
        "▓": BREAKDOWN["adapter"] + BREAKDOWN["gradient"] + BREAKDOWN["optimizer"],
        "▒": BREAKDOWN["saved_activation"] + BREAKDOWN["recompute"],
        "░": BREAKDOWN["logits"] + BREAKDOWN["dequant_workspace"] + BREAKDOWN["other"],
        "▄": (1502 - 1098) * MIB,
        "·": 546 * MIB,
    }
    assert "".join(dict.fromkeys(bar)) == "".join(groups)
    for fill, num_bytes in groups.items():
        assert abs(bar.count(fill) - len(bar) * num_bytes / (2 * GIB)) <= 1, fill


@pytest.mark.parametrize("budget_mib", [100, 1024, 1424])
def test_a_bar_that_is_too_long_shows_where_the_budget_ends(budget_mib: int) -> None:
    plan = replace(failing_plan(), budget_bytes=budget_mib * MIB)
    lines = shown(plan_report(plan))
    bar = whole_bar(lines)
    assert len(bar) == 76
    assert "·" not in bar
    below = lines[lines.index(f"  {bar}") + 1]
    assert "budget " in below
    assert below.index("▲") == 2 + round(76 * budget_mib / 1502) - 1  # in the last cell of the budget


def test_what_lies_beyond_the_budget_is_red() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(plan_report(failing_plan()))
    assert isinstance(console.file, io.StringIO)
    line = next(line for line in console.file.getvalue().splitlines() if all(fill in line for fill in "█▓▒░▄"))
    within, beyond = line.split("\x1b[31m", 1)
    assert len(re.sub(r"\x1b\[\d*m", "", within)) == 2 + round(76 * 1024 / 1502)
    assert set(re.findall(r"\x1b\[(\d+)m", beyond)) == {"0", "31"}
    # What is within, in its groups' colours.
    assert {"34", "35", "32", "33"} <= set(re.findall(r"\x1b\[(\d+)m", within))


def test_what_a_gpus_allocator_takes_is_told_where_it_was_replayed() -> None:
    plan = gpu_plan()
    assert not any("reserved" in line for line in shown(plan_report(plan)))
    predicted = replace(plan.predicted, reserved_peak_bytes=27 * GIB, fragmentation=0.046)
    line = line_with(shown(plan_report(replace(plan, predicted=predicted))), "reserved by the allocator")
    assert " ".join(line.split()) == "reserved by the allocator, 5% in pieces 27.0 GiB 34 %"


def test_a_worst_case_beyond_the_budget_is_told_but_not_judged() -> None:
    lines = shown(plan_report(replace(fitting_plan(), budget_bytes=1600 * MIB)))
    assert lines[0] == "fits on the CPU in 1.56 GiB, 98.0 MiB to spare"
    assert line_with(lines, "worst case") == "     worst case              1.65 GiB  106 %"
    told = "     (free pieces are given back before it is passed)"
    assert lines[lines.index(line_with(lines, "worst case")) + 1] == told
    assert told not in shown(plan_report(fitting_plan()))
    bar = whole_bar(lines)
    assert bar.count("·") == 76 - round(76 * 1502 / 1600)
    assert lines[lines.index(f"  {bar}") + 1].index("▲") == 2 + 76 - 1  # the bar ends with the budget
    assert not any("missing" in line for line in lines)


def test_odd_plans_are_told_too() -> None:
    """Categories and phases of later versions, nothing between the peaks, part of a document, and hostile names."""
    plan = fitting_plan()
    knobs = replace(plan.knobs, seq_len=4096, micro_batches_per_step=1, loss_chunk=1, activation_offload_layers=4)
    knobs = replace(knobs, tile_tokens=512, base_residency="streamed", optimizer_on_host=True)
    predicted = replace(
        plan.predicted, process_peak_bytes=1000 * MIB, breakdown={"vision_tower": 99 * MIB, "base": 999 * MIB}
    )
    lines = shown(plan_report(replace(plan, model="[red]a[/red]", knobs=knobs, predicted=predicted)))
    for line in (
        "  base         [red]a[/red]",
        "  micro-batch  2,048 tokens at most",
        "  step         1 micro-batch",
        "  activations  kept in 22 layers, recomputed in 12 (the input of 4 on the host)",
        "  tiles        recomputed layers take 512 tokens at a time",
        "  weights      mapped from the disk, a layer in memory at a time",
        "  optimizer    AdamW, state of 8 bits, on the host",
        "  loss chunk   logits of 1 position at a time",
        "  ░  vision tower            99.0 MiB    5 %  ░░",
    ):
        assert line in lines, line
    assert not any("program and libraries" in line for line in lines)
    assert "1.5 documents, 1,536 tokens at most" in " ".join(
        shown(plan_report(replace(plan, knobs=replace(plan.knobs, micro_batch_tokens=1536))))
    )
    change = WouldFit(knob="optimizer", before="[b]x", after="[/b]", allocated_peak_bytes=MIB)
    assert "[b]x → [/b]" in " ".join(shown(plan_report(replace(failing_plan(), would_fit=(change,)))))


def test_the_frontier_is_a_table_with_the_chosen_cell_marked() -> None:
    lines = shown(frontier_table(fitting_plan()))
    assert "  rank      256      512       1k       2k       4k       8k" in lines
    start = next(number for number, line in enumerate(lines) if line.startswith("    16"))
    assert lines[start].split() == ["16", "13", "6", "►", "3", "1", "-", "-"]
    assert lines[start + 1].split() == ["1.24k", "1.09k", "878", "565"]
    assert sum("►" in line for line in lines) == 2  # the key and the cell
    assert shown(frontier_table(replace(fitting_plan(), frontier=()))) == ["no other ranks and lengths were looked at"]


def test_a_frontier_that_is_too_wide_goes_on_below() -> None:
    cells = tuple(
        FrontierCell(rank=rank, seq_len=2**power, micro_batch_tokens=2**power // 2, tokens_per_second=1e5)
        for rank in (8, 256)
        for power in range(7, 18)
    )
    lines = shown(frontier_table(replace(fitting_plan(), frontier=cells)), 60)
    headers = [line.split()[1:] for line in lines if line.startswith("  rank")]
    assert [length for header in headers for length in header] == [
        "128",
        "256",
        "512",
        "1k",
        "2k",
        "4k",
        "8k",
        "16k",
        "32k",
        "64k",
        "128k",
    ]
    assert max(map(len, lines)) <= 60
    assert any("65536 tok" in line for line in lines)
    halves = [line.split()[1:] for line in shown(frontier_table(fitting_plan()), 50) if line.startswith("  rank")]
    assert halves == [["256", "512", "1k"], ["2k", "4k", "8k"]]  # rather than four and two
