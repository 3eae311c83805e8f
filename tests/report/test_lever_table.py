from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_trainer.planning.plan import Plan
from qlora_trainer.report import frontier_plot
from qlora_trainer.report.frontier_plot import write_frontier_plot
from qlora_trainer.report.lever_table import lever_table
from tests.report.made_plan import GIB, fitting_plan, gains
from tests.report.test_frontier_plot import pixels
from tests.report.test_plan_tables import shown


def compared() -> Plan:
    return replace(fitting_plan(), lever_gains=gains(2 * GIB))


def test_each_line_tells_memory_length_and_speed() -> None:
    lines = shown(lever_table(compared()))
    assert lines[0] == "what each lever buys"
    assert "rank 16 and 1,024 tokens" in lines[1]
    assert [line.split() for line in lines[3:]] == [
        ["no", "lever", "2.60", "GiB", "-", "-"],
        ["tiles", "2.20", "GiB", "-", "-"],
        ["base", "streamed", "1.40", "GiB", "3,072", "345"],
        ["all", "of", "them", "1.00", "GiB", "8,192", "456"],
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_wraps(width: int) -> None:
    lines = shown(lever_table(compared()), width)
    assert max(map(len, lines)) <= min(width, 100)
    assert not any("…" in line for line in lines)


def test_the_plot_compares_them_below_the_map(tmp_path: Path) -> None:
    """Mutation tried: without the bars the picture is 700 pixels high."""
    plan = compared()
    path = tmp_path / "frontier.png"
    write_frontier_plot(plan, path)
    drawn = pixels(path)
    assert drawn.shape == (1030, 1200, 3)
    write_frontier_plot(replace(plan, lever_gains=()), path)
    assert pixels(path).shape == (700, 1200, 3)
    # Of equal bars none is drawn longer than another; of these the third column has two, the longer one last.
    is_bar = (drawn[700:, 900:] == (0x31, 0x68, 0x8E)).all(axis=-1).sum(axis=1)
    lengths = [number for number in dict.fromkeys(is_bar.tolist()) if number > 20]
    assert lengths[-1] / lengths[0] == pytest.approx(456 / 345, rel=0.05)


def test_the_plot_says_in_words_what_the_table_does() -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure()
    frontier_plot._draw(compared(), figure)
    texts = [found.get_text() for found in figure.findobj(Text)]
    for said in ("no lever", "tiles", "base streamed", "all of them", "2.60 GiB", "3,072", "345"):
        assert said in texts
    assert texts.count("does not fit") == 2 + 1  # two lines, and the map's key
    assert texts.count("none fits") == 2
