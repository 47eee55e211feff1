"""Line charts and split bars as SVG: numbers in, markup out. Colours and fonts are the page's style sheet's business.

A chart is drawn for a width of some 400 pixels and shown near that size: on a wide screen there are more beside each
other, not larger ones, so that the text keeps its size.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 20, 34
BAR_HEIGHT, BAR_GAP = 16, 30
LEVEL = "limit"  # what the line of a service level is called


@dataclass(frozen=True)
class Series:
    """One line: a value for each step, None where there is none."""

    name: str
    values: Sequence[float | None]
    colour: str  # classes of the style sheet


@dataclass(frozen=True)
class Chart:
    """Lines over time. `edges` are the steps' borders in seconds, one more than each series has values."""

    title: str
    unit: str
    edges: Sequence[float]
    series: Sequence[Series]
    limit: float | None = None  # drawn as a line: a service level, unless it has another name
    limit_name: str = LEVEL
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether no line has a point."""
        return all(value is None for series in self.series for value in series.values)

    def svg(self) -> str:
        """The chart without its title."""
        highest = max((v for s in self.series for v in s.values if v is not None), default=0.0)
        # A limit far above what was seen would press the lines flat: then its number in the table is enough.
        shown_limit = self.limit if self.limit is not None and self.limit <= 2.5 * highest else None
        ticks = nice_ticks(max(highest, shown_limit or 0.0) or 1.0)
        low, high, top = self.edges[0], self.edges[-1], ticks[-1]

        def x(seconds: float) -> float:
            return LEFT + (seconds - low) / (high - low) * (WIDTH - LEFT - RIGHT)

        def y(value: float) -> float:
            return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

        parts = [self._warmup(x)] if low < 0 else []
        for tick in ticks:
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
            parts.append(_text(LEFT - 6, y(tick) + 4, _number(tick), "end"))
        for tick in time_ticks(low, high):
            parts.append(_text(x(tick), HEIGHT - BOTTOM + 15, _number(tick), "middle"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "seconds after the warm-up", "middle", "axis"))
        parts.append(_text(4, 11, self.unit, "start", "axis"))
        if shown_limit is not None:
            kind = "limit" if self.limit_name == LEVEL else "bound"
            parts.append(
                f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(shown_limit):.1f}" '
                f'y2="{y(shown_limit):.1f}"/>'
            )
            parts.append(
                _text(WIDTH - RIGHT - 3, y(shown_limit) - 4, f"{self.limit_name} {_number(shown_limit)}", "end", kind)
            )
        centres = [x((a + b) / 2) for a, b in itertools.pairwise(self.edges)]
        for series in self.series:
            for run in _runs(series.values):
                points = " ".join(f"{centres[i]:.1f},{y(value):.1f}" for i, value in run)
                if len(run) > 1:
                    parts.append(f'<polyline class="line {series.colour}" points="{points}"/>')
                else:
                    cx, cy = points.split(",")
                    parts.append(f'<circle class="dot {series.colour}" cx="{cx}" cy="{cy}" r="2.2"/>')
        parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>')
        label = escape(f"{self.title}, {self.unit}, over time", quote=True)
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
            f"data-points='{escape(self._points(centres), quote=True)}'>{''.join(parts)}</svg>"
        )

    def _warmup(self, x: Callable[[float], float]) -> str:
        start, end = x(self.edges[0]), x(0.0)
        size = f'width="{end - start:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        box = f'<rect class="warmup" x="{start:.1f}" y="{TOP}" {size}/>'
        return box + (_text(start + 4, TOP + 12, "warm-up", "start", "axis") if end - start > 50 else "")

    def _points(self, centres: Sequence[float]) -> str:
        """What the page's script reads to show the values under the pointer."""
        steps = [f"{_number(a)} to {_number(b)} s" for a, b in itertools.pairwise(self.edges)]
        series = [
            {"name": s.name, "colour": s.colour, "values": [None if v is None else float(f"{v:.4g}") for v in s.values]}
            for s in self.series
        ]
        return json.dumps(
            {"x": [round(c, 1) for c in centres], "steps": steps, "unit": self.unit, "series": series},
            ensure_ascii=False,
        )


@dataclass(frozen=True)
class Bars:
    """One bar a row, each of parts laid end to end."""

    unit: str
    rows: Sequence[tuple[str, Sequence[float]]]
    parts: Sequence[tuple[str, str]]  # name and colour of each

    def svg(self) -> str:
        """The bars, each below its label; a part of nothing is left out."""
        height = len(self.rows) * (BAR_HEIGHT + BAR_GAP) + 4
        longest = max((sum(values) for _, values in self.rows), default=0.0) or 1.0
        parts = []
        for i, (name, values) in enumerate(self.rows):
            y = i * (BAR_HEIGHT + BAR_GAP) + 18
            parts.append(_text(4, y - 5, name, "start", "label"))
            parts.append(_text(WIDTH - 4, y - 5, self._amounts(values), "end"))
            at = 4.0
            for value, (part, colour) in zip(values, self.parts, strict=True):
                if not value:
                    continue
                width = value / longest * (WIDTH - 8)
                parts.append(
                    f'<rect class="bar {colour}" x="{at:.1f}" y="{y}" width="{max(width, 0.8):.1f}" '
                    f'height="{BAR_HEIGHT}"><title>{escape(part)}: {_number(value)} {escape(self.unit)}</title></rect>'
                )
                at += width
        return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="time in each model">{"".join(parts)}</svg>'

    def _amounts(self, values: Sequence[float]) -> str:
        return " + ".join(_number(value) for value in values if value) + f" {self.unit}"

    @property
    def parts_shown(self) -> list[tuple[str, str]]:
        """Name and colour of the parts that any row has."""
        return [part for i, part in enumerate(self.parts) if any(values[i] for _, values in self.rows)]


def nice_ticks(highest: float) -> list[float]:
    """From 0 to at least `highest` in three to five steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = highest / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 4 >= highest * (1 - 1e-9))
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def time_ticks(low: float, high: float) -> list[float]:
    """Five to eight round moments from `low` to `high`, 0 among them."""
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400)
    step = next((step for step in steps if (high - low) / step <= 8), steps[-1])
    return [float(step * i) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """The stretches without a gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((i, value))
    return [run for run in runs if run]


def _number(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.1g}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
