"""What each lever buys, as bars: least memory, longest document and speed side by side, a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_trainer.planning.plan import Plan
from qlora_trainer.report.formats import counted, format_bytes
from qlora_trainer.report.frontier_table import speed_label
from qlora_trainer.report.lever_table import gain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_INK, _FAINT_INK, _BUDGET = "#1f2328", "#59636e", "#e8590c"
_PLAIN, _PULLED, _TOO_LARGE = "#8c959f", "#31688e", "#d0d4d9"
_LEFT, _LABELS, _WIDTH, _GAP = 0.075, 0.155, 0.235, 0.02  # shares of the width
_ROOM = 1.42  # of the longest bar: its own label stands behind it


def draw_lever_bars(plan: Plan, figure: FigureBase) -> None:
    """The lower part of a plot: three groups of bars over the same lines."""
    gains, knobs = plan.lever_gains, plan.knobs
    title = f"What each lever buys at rank {knobs.rank} and {counted(knobs.seq_len, 'token')}, predicted"
    figure.text(_LEFT, 0.93, title, fontsize=13, fontweight="bold", color=_INK)
    colours = [_PULLED if gain.levers else _PLAIN for gain in gains]
    of_memory = [
        colour if gain.least_bytes <= plan.budget_bytes else _TOO_LARGE
        for gain, colour in zip(gains, colours, strict=True)
    ]
    columns = (
        (
            "least memory",
            [float(gain.least_bytes) for gain in gains],
            [format_bytes(gain.least_bytes) for gain in gains],
            of_memory,
        ),
        (
            "longest document that fits, tokens",
            [float(gain.longest_tokens) for gain in gains],
            [f"{gain.longest_tokens:,}" if gain.longest_tokens else "none fits" for gain in gains],
            colours,
        ),
        (
            f"tokens/s at {counted(knobs.seq_len, 'token')}",
            [gain.tokens_per_second for gain in gains],
            [speed_label(gain.tokens_per_second) if gain.tokens_per_second else "does not fit" for gain in gains],
            colours,
        ),
    )
    for number, (heading, lengths, labels, fills) in enumerate(columns):
        axes = figure.add_axes((_LEFT + _LABELS + number * (_WIDTH + _GAP), 0.08, _WIDTH, 0.70))
        _draw_bars(axes, heading, lengths, labels, fills)
        if number == 0:
            axes.axvline(plan.budget_bytes, color=_BUDGET, linewidth=2, zorder=0)
            axes.set_xlim(0, max(_ROOM * max(lengths), 1.05 * plan.budget_bytes))
            names = [gain_label(gain) for gain in gains]
            axes.set_yticks(range(len(gains)), names, fontsize=11, color=_INK)
    figure.text(
        _LEFT,
        0.005,
        "orange: the budget; the least memory is of one document at a time; none is longer than the model's positions",
        fontsize=10,
        color=_FAINT_INK,
    )


def _draw_bars(
    axes: Axes, heading: str, lengths: Sequence[float], labels: Sequence[str], colours: Sequence[str]
) -> None:
    axes.barh(range(len(lengths)), lengths, height=0.62, color=colours)
    over_the_budget = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for y, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        axes.annotate(
            label,
            (length, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=_INK,
            bbox=over_the_budget,
        )
    axes.set_xlim(0, _ROOM * (max(lengths) or 1.0))
    axes.set_ylim(len(lengths) - 0.5, -0.5)  # the first on top
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(heading, fontsize=11, color=_FAINT_INK, loc="left")
