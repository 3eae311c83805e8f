"""The curves of `scaling.py`: seconds a step beside memory, both against what varies."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "micro_batch_tokens": "tokens of the micro-batch",
    "seq_len": "tokens of a document",
    "rank": "rank",
    "model": "parameters of the base",
}
GIB = 2**30
_WIDTH_PIXELS, _HEIGHT_PIXELS, _DPI = 1200, 480, 100
_INK, _FAINT_INK, _GRID = "#1f2328", "#59636e", "#e4e6e9"
# Told apart by the colour-blind too, and by their marks.
_STYLES = {False: ("activations kept", "#0969da", "o"), True: ("all layers recomputed", "#e8590c", "s")}
Point = Mapping[str, Any]


def curves(sweep: str, found: Sequence[Point]) -> dict[bool, list[Point]]:
    """Points by whether layers are recomputed, each in the order of what varies."""
    by_policy: dict[bool, list[Point]] = {}
    for point in sorted(found, key=lambda point: place_of(sweep, point)):
        by_policy.setdefault(point["is_recomputed"], []).append(point)
    return by_policy


def place_of(sweep: str, point: Point) -> float:
    """Where a point is on the axis."""
    return float(point["base_parameters"] if sweep == "model" else point[sweep])


def write_plot(sweep: str, found: Sequence[Point], path: Path) -> None:
    """Write a PNG of 1200 x 480 pixels; the same points give the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with matplotlib.rc_context():  # whatever the user's own matplotlibrc says
        matplotlib.rcdefaults()
        figure = Figure(figsize=(_WIDTH_PIXELS / _DPI, _HEIGHT_PIXELS / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.15, top=0.88, wspace=0.2)
        _draw(left, sweep, found, lambda point: point["seconds"], "seconds a step")
        _draw(right, sweep, found, lambda point: point["taken_bytes"] / GIB, "GiB above imports")
        left.legend(frameon=False, fontsize=10)
        figure.text(0.07, 0.93, _title(sweep, found), fontsize=13, fontweight="bold", color=_INK)
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    path.write_bytes(png.getvalue())


def _draw(axes: Axes, sweep: str, found: Sequence[Point], figure_of: Callable[[Point], float], label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for is_recomputed, own in curves(sweep, found).items():
        name, colour, mark = _STYLES[is_recomputed]
        places, figures = [place_of(sweep, point) for point in own], [figure_of(point) for point in own]
        axes.plot(places, figures, color=colour, marker=mark, linewidth=2, label=name)
    axes.set_xscale("log")
    if sweep == "model":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks = {place_of(sweep, point): _tick(sweep, point) for point in found}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    if sweep != "model":
        axes.set_ylim(0, 1.1 * max(map(figure_of, found)))
    axes.set_xlabel(LABELS[sweep], fontsize=11, color=_INK)
    axes.set_ylabel(label, fontsize=11, color=_INK)
    axes.tick_params(length=0, labelsize=10, labelcolor=_FAINT_INK)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _tick(sweep: str, point: Point) -> str:
    return str(point["model"]).upper() if sweep == "model" else f"{point[sweep]:,}"


def _title(sweep: str, found: Sequence[Point]) -> str:
    """What does not vary."""
    words = [] if sweep == "model" else [str(found[0]["model"]).upper()]
    for key, form in (("micro_batch_tokens", "{:,} tokens"), ("seq_len", "documents of {:,}"), ("rank", "rank {}")):
        values = {point[key] for point in found}
        if key != sweep and len(values) == 1:
            words.append(form.format(*values))
    return ", ".join([*words, *sorted({point["compute_dtype"] for point in found})])
