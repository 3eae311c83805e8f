"""The frontier as a picture: what fits for each rank and length, and how fast it is expected to be; below it what each
lever buys."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_trainer.config.paths import require_plot_path
from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.planning.plan import FrontierCell, Plan
from qlora_trainer.report.formats import format_bytes
from qlora_trainer.report.frontier_table import length_label, levers_key, levers_label, size_label, speed_label
from qlora_trainer.report.lever_bars import draw_lever_bars
from qlora_trainer.report.screen import printable
from qlora_trainer.run.checkpoint.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure, FigureBase

_WIDTH_PIXELS, _HEIGHT_PIXELS, _BARS_PIXELS, _DPI = 1200, 700, 330, 100
_INK, _FAINT_INK, _NO_FIT, _HATCH = "#1f2328", "#59636e", "#f0f1f3", "#c8ccd2"
_CHOSEN = "#e8590c"  # orange: in none of the colormap's shades
_COLORMAP = "viridis"  # equal steps of speed look equally large, to the colour-blind too
_LEFT = 0.075  # of the axes and of the title, as a share of the width
_SUBTITLE = "Predicted, not measured: the largest micro-batch that fits, in documents of seq_len, and its speed"
_MIN_RATIO_FOR_LOG = 8.0  # fastest / slowest; below, a linear scale shows more


def write_frontier_plot(plan: Plan, path: Path) -> None:
    """Write the plan's frontier as a PNG of 1200 x 700 pixels; the same plan gives the same bytes.

    Where levers may be pulled, 330 pixels below it compare them.

    Args:
        plan: with a frontier.
        path: a .png in a folder that exists; a file there is replaced, whole or not at all.

    Raises:
        ConfigError: the path cannot be one of a plot, there is no frontier, or matplotlib is not installed.
        StorageError: the disk refused; what was there is untouched.
    """
    _check(plan, path)
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            where=str(path),
            found="no matplotlib to draw it with",
            expected="matplotlib to be installed",
            fix="Install it: pip install matplotlib",
        ) from error

    png = io.BytesIO()
    # Whatever the user's own matplotlibrc says, and back to it afterwards.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # A model's name may have letters that the font lacks; boxes in their place do no harm.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        height = _HEIGHT_PIXELS + (_BARS_PIXELS if plan.lever_gains else 0)
        figure = Figure(figsize=(_WIDTH_PIXELS / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        _draw(plan, figure)
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    try:
        write_atomically(path, png.getvalue())
    except StorageError as error:  # its advice is about a run's folder
        raise StorageError(
            where=str(path), found=error.found, expected=error.expected, fix="Choose another place for the plot."
        ) from error


def _check(plan: Plan, path: Path) -> None:
    """What can be told before matplotlib is imported, which takes a second."""
    require_plot_path(path)
    if not plan.frontier:
        raise ConfigError(
            where=str(path),
            found="a plan without a frontier",
            expected="one that has been searched over rank and seq_len",
            fix="Plan again with a frontier.",
        )


def _draw(plan: Plan, figure: Figure) -> None:
    if not plan.lever_gains:
        _draw_map(plan, figure)
        return
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(_HEIGHT_PIXELS, _BARS_PIXELS))
    _draw_map(plan, parts[0, 0])
    draw_lever_bars(plan, parts[1, 0])


def _draw_map(plan: Plan, figure: FigureBase) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    title = _title(plan)
    large = min(17.0, 17.0 * 66 / len(title))  # points; 66 characters at 17 are as wide as the axes
    figure.text(_LEFT, 0.938, title, fontsize=large, fontweight="bold", color=_INK, parse_math=False)
    figure.text(_LEFT, 0.893, _SUBTITLE, fontsize=11, color=_FAINT_INK, parse_math=False)
    axes = figure.add_axes((_LEFT, 0.155, 0.81, 0.70))
    speeds = [cell.tokens_per_second for cell in plan.frontier if cell.micro_batch_tokens]
    slowest, fastest = min(speeds, default=1.0), max(speeds, default=1.0)
    spread = 0 < slowest * _MIN_RATIO_FOR_LOG < fastest
    colours = ScalarMappable(LogNorm(slowest, fastest) if spread else Normalize(0.0, fastest), _COLORMAP)
    _draw_cells(plan, axes, colours)
    _draw_frame(plan, axes)
    if speeds:
        _draw_scale(figure, colours)
    _draw_key(plan, figure)


def _title(plan: Plan) -> str:
    model, device = printable(plan.model, 44), printable(plan.device, 28)
    return f"{model} on {'the CPU' if device == 'cpu' else device} in {format_bytes(plan.budget_bytes)}"


def _draw_cells(plan: Plan, axes: Axes, colours: ScalarMappable) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    ranks, lengths = _sides(plan)
    cells = {(cell.rank, cell.seq_len): cell for cell in plan.frontier}
    large = max(8.0, min(15.0, 100 / len(lengths), 90 / len(ranks)))  # points; what a cell holds two lines of
    small = max(7.5, large * 0.7)
    unit = " tok/s" if len(lengths) <= 8 else ""  # the colour scale says it too
    for y, rank in enumerate(ranks):
        for x, seq_len in enumerate(lengths):
            cell = cells.get((rank, seq_len))
            corner = (x - 0.5, y - 0.5)
            if cell is None or not cell.micro_batch_tokens:
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=_NO_FIT, edgecolor=_HATCH, hatch="///", linewidth=0))
                continue
            red, green, blue = map(float, colours.to_rgba(np.array([cell.tokens_per_second]))[0, :3])
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=(red, green, blue), linewidth=0))
            ink = _INK if _luminance(red, green, blue) > 0.24 else "white"  # whichever of the two stands out more
            levers = levers_label(cell)
            speed = speed_label(cell.tokens_per_second) + unit + (f"  {levers}" if levers else "")
            for text, points, anchor, weight, offset in (
                (size_label(cell), large, "bottom", "bold", large / 8),
                (speed, small, "top", "normal", -large / 4),
            ):
                axes.annotate(
                    text,
                    (x, y),
                    xytext=(0, offset),
                    textcoords="offset points",
                    fontsize=points,
                    fontweight=weight,
                    color=ink,
                    ha="center",
                    va=anchor,
                )


def _sides(plan: Plan) -> tuple[list[int], list[int]]:
    """The ranks and the lengths of the frontier, smallest first."""
    return sorted({cell.rank for cell in plan.frontier}), sorted({cell.seq_len for cell in plan.frontier})


def _luminance(red: float, green: float, blue: float) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2 defines it; the transfer function simplified to a power."""
    return float(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)


def _draw_frame(plan: Plan, axes: Axes) -> None:
    from matplotlib.patches import Rectangle

    ranks, lengths = _sides(plan)
    if plan.knobs.rank in ranks and plan.knobs.seq_len in lengths:
        corner = (lengths.index(plan.knobs.seq_len) - 0.5, ranks.index(plan.knobs.rank) - 0.5)
        for colour, points in (("white", 7), (_CHOSEN, 4)):
            outline = Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=points, zorder=3, clip_on=False)
            axes.add_patch(outline)
    axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(-0.5, len(ranks) - 0.5))
    axes.set_xticks(range(len(lengths)), [length_label(seq_len) for seq_len in lengths], fontsize=12, color=_INK)
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=12, color=_INK)
    axes.set_xlabel("seq_len (tokens)", fontsize=12, color=_INK, labelpad=8)
    axes.set_ylabel("rank", fontsize=12, color=_INK, labelpad=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for x in range(1, len(lengths)):
        axes.axvline(x - 0.5, color="white", linewidth=2)
    for y in range(1, len(ranks)):
        axes.axhline(y - 0.5, color="white", linewidth=2)


def _draw_scale(figure: FigureBase, colours: ScalarMappable) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes = figure.add_axes((0.905, 0.155, 0.018, 0.70))
    scale = figure.colorbar(colours, cax=axes)
    scale.outline.set_visible(False)
    is_log = isinstance(colours.norm, LogNorm)
    scale.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(nbins=7))
    scale.ax.yaxis.set_minor_locator(NullLocator())
    scale.ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value / 1000:g}k")
    )
    scale.ax.tick_params(length=0, labelsize=10, labelcolor=_INK)
    scale.set_label("tokens/s, predicted", fontsize=11, color=_INK, labelpad=6)


def _draw_key(plan: Plan, figure: FigureBase) -> None:
    from matplotlib.patches import Patch

    knobs = plan.knobs
    chosen_cell = FrontierCell(
        rank=knobs.rank,
        seq_len=knobs.seq_len,
        micro_batch_tokens=knobs.micro_batch_tokens,
        tokens_per_second=plan.predicted.tokens_per_second,
    )
    ranks, lengths = _sides(plan)
    handles = []
    if knobs.rank in ranks and knobs.seq_len in lengths:
        what = f"this plan: micro-batch {size_label(chosen_cell)}" if plan.fits else "the least allowed: does not fit"
        handles.append(Patch(facecolor="white", edgecolor=_CHOSEN, linewidth=3, label=what))
    if sum(cell.micro_batch_tokens > 0 for cell in plan.frontier) < len(ranks) * len(lengths):
        handles.append(Patch(facecolor=_NO_FIT, edgecolor=_HATCH, hatch="////", linewidth=0, label="does not fit"))
    figure.text(_LEFT, 0.03, levers_key(plan), fontsize=10, color=_FAINT_INK, parse_math=False)
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=(0.89, 0.015), ncols=2, frameon=False, fontsize=11)
