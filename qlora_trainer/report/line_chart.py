"""A line chart as SVG text, for pages that must show themselves without scripts, fonts or a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 240  # pixels; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 12, 34
_MAX_POINTS = 1_000  # more than there are pixels would only make the file large
_NUM_TICKS = 5

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart: (x, y) in the order of x; points that are not finite are gaps.

    Attributes:
        name: for the legend.
        style: a class of the page's style sheet; it decides the colour.
        is_dotted: draw each point too, for lines of few points.
    """

    name: str
    points: Sequence[Point]
    style: str
    is_dotted: bool = False


def line_chart(
    lines: Sequence[Line], *, label: str, x_label: str, y_text: Callable[[float], str], from_zero: bool = False
) -> str:
    """An `<svg>` element with axes, a grid and a legend.

    Args:
        lines: at least one with a finite point.
        label: what the chart shows, for those who cannot see it.
        x_label: below the x axis.
        y_text: a value of the y axis as its tick says it.
        from_zero: the y axis shows zero too, for what is compared by its size.

    Raises:
        ValueError: there is no finite point.
    """
    finite = [point for line in lines for point in line.points if all(map(math.isfinite, point))]
    if not finite:
        raise ValueError("a chart without a finite point")
    x_low, x_high = _bounds([x for x, _ in finite])
    y_ticks = ticks(*_bounds([*(y for _, y in finite), *((0.0,) if from_zero else ())]))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in y_ticks:
        _, y = place((x_low, value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(y_text(value))}</text>')
    for value in ticks(x_low, x_high):
        if x_low <= value <= x_high:
            x, _ = place((value, y_low))
            parts.append(f'<text x="{x}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:,g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for line in lines:
        parts += _draw(line, place)
    return "\n".join((*parts, "</svg>"))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at most `low` to at least `high`."""
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_MAX_POINTS` points, each the mean of its neighbours, and the last one as it is."""
    stride = math.ceil(len(points) / _MAX_POINTS)
    if stride <= 1:
        return list(points)
    groups = [points[first : first + stride] for first in range(0, len(points), stride)]
    return [*((group[0][0], sum(y for _, y in group) / len(group)) for group in groups), points[-1]]


def _draw(line: Line, place: Callable[[Point], Point]) -> list[str]:
    parts = []
    for run in _runs(thinned(line.points)):
        places = [place(point) for point in run]
        if len(places) > 1:
            parts.append(f'<polyline class="{line.style}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        if line.is_dotted or len(places) == 1:
            parts += [f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    return parts


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points, cut where one is not finite."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if all(map(math.isfinite, point)):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, so far from each other that ticks can be told apart."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        return low - margin, high + margin
    return low, high
