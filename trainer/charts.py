"""Charts as inline SVG text: lines and bars, coloured by the page's style sheet (classes s0, s1, …)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 88, 20, 14, 62
COLOURS = 8  # classes the style sheet has


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: a label and points (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about n round numbers that cover [low, high].

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / n))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= n)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
    """Return a short label for an axis.

    Example:
        >>> number(1500000), number(0.25), number(0)
        ('1.5M', '0.25', '0')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


class _Frame:
    """Axes, grid and labels of a chart, and the map from values to pixels."""

    def __init__(self, xs: list[float], ys: list[float], x_label: str, y_label: str) -> None:
        self.x0, self.x1, self.y0, self.y1 = xs[0], xs[-1], ys[0], ys[-1]
        self.parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">']
        for y in ys:
            at = self.y(y)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 8}" y="{at + 5:.1f}" text-anchor="end">{number(y)}</text>')
        for x in ticks(xs[0], xs[-1], 6):
            if not xs[0] <= x <= xs[-1]:
                continue
            at = self.x(x)
            self.parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 24}" text-anchor="middle">{number(x)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
        up = (TOP + HEIGHT - BOTTOM) / 2
        self.parts.append(
            f'<text class="label" transform="translate(18 {up}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )

    def x(self, value: float) -> float:
        """Return the pixel of an x value."""
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the pixel of a y value."""
        return HEIGHT - BOTTOM - (value - self.y0) / ((self.y1 - self.y0) or 1) * (HEIGHT - TOP - BOTTOM)

    def end(self) -> str:
        """Return the chart."""
        return "".join([*self.parts, "</svg>"])


def line_chart(series: list[Series], x_label: str, y_label: str) -> str:
    """Return lines over a shared frame from y = 0; a chart of no points is an empty text.

    Example:
        >>> line_chart([Series("a", [(0, 1.0), (1, 0.5)])], "rows", "loss").count("<polyline")
        1
    """
    points = [p for s in series for p in s.points if math.isfinite(p[1])]
    if not points:
        return ""
    # The first points of a curve are far above all others; the frame is cut at the upper tenth so that the rest shows.
    top = sorted(y for _, y in points)[int(0.95 * (len(points) - 1))] * 1.15 or 1.0
    frame = _Frame([0, max(x for x, _ in points)], ticks(0, top), x_label, y_label)
    for i, one in enumerate(series):
        path = " ".join(f"{frame.x(x):.1f},{max(TOP, frame.y(y)):.1f}" for x, y in one.points if math.isfinite(y))
        frame.parts.append(f'<polyline class="line s{i % COLOURS}" points="{path}"><title>{escape(one.label)}</title></polyline>')
    return frame.end()


def scatter_chart(series: list[Series], x_label: str, y_label: str) -> str:
    """Return points over a shared frame from (0, 0); no points give an empty text.

    Example:
        >>> scatter_chart([Series("a", [(32.0, 0.2)])], "L0", "FVU").count("<circle")
        1
    """
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    across, up = (ticks(0, max(p[i] for p in points) * 1.08 or 1.0) for i in (0, 1))
    frame = _Frame(across, up, x_label, y_label)
    for i, one in enumerate(series):
        for x, y in one.points:
            title = f"<title>{escape(one.label)}: {x:.4g}, {y:.4g}</title>"
            frame.parts.append(
                f'<circle class="point s{i % COLOURS}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="6">{title}</circle>'
            )
    return frame.end()


def bar_chart(edges: Sequence[float], series: list[tuple[str, Sequence[float]]], x_label: str, y_label: str) -> str:
    """Return histograms over shared bins as step outlines.

    Args:
        edges: (n + 1) bin edges.
        series: label and (n) heights of each histogram.

    Example:
        >>> bar_chart([0.0, 1.0, 2.0], [("a", [3.0, 1.0])], "value", "latents").count("<polygon")
        1
    """
    highest = max((h for _, heights in series for h in heights), default=0)
    frame = _Frame([edges[0], edges[-1]], ticks(0, highest or 1), x_label, y_label)
    for i, (label, heights) in enumerate(series):
        points = [(edges[0], 0.0)]
        for low, high, height in zip(edges, edges[1:], heights, strict=False):
            points += [(low, height), (high, height)]
        points.append((edges[-1], 0.0))
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        frame.parts.append(f'<polygon class="bars s{i % COLOURS}" points="{path}"><title>{escape(label)}</title></polygon>')
    return frame.end()
