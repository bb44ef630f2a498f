"""The drawings of a sweep's page, as inline SVG. Colours come from the page's style by class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from selfguide.report import sweep_tables as tables
from selfguide.report.cells import gain
from selfguide.text import printable

_WIDTH = 920
_ROW, _LABEL, _VALUE = 24, 300, 170
"""Of the forest: height of a row, room for the category on the left and the numbers on the right."""
_BINS = 40

Json = Mapping[str, Any]


def forest(groups: Sequence[Json]) -> str:
    """Mean gain over the base of each group with its interval, the largest first; the dot's size tells the tasks."""
    rows = [(one, method["difference"]) for one in groups for method in one["methods"] if method["method"] == "base"]
    rows.sort(key=lambda row: -row[1]["mean"])
    ends = [0.0, *(row[1]["low"] for row in rows), *(row[1]["high"] for row in rows)]
    low, high, step = _nice(min(ends), max(ends))
    left, right = _LABEL, _WIDTH - _VALUE

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = _ROW * len(rows) + 8
    parts = list(_ticks(low, high, step, at, bottom))
    for number, (one, estimate) in enumerate(rows):
        parts += _forest_row(one, estimate, _ROW * number + 18, at)
    return _svg("Gain over the base by category", bottom + 30, parts)


def _forest_row(one: Json, estimate: Json, y: float, at: Any) -> Iterator[str]:
    tone = "up" if estimate["low"] > 0 else "down" if estimate["high"] < 0 else "even"
    radius = 3 + min(4.0, math.sqrt(one["num_tasks"]) / 2)
    name = f"{tables.group_title(one)} · {one['num_tasks']:,}"
    yield f'<text class="label" x="{_LABEL - 12}" y="{y + 4:.0f}" text-anchor="end">{_text(_short(name, 44))}</text>'
    yield f'<g class="{tone}"><line x1="{at(estimate["low"]):.1f}" x2="{at(estimate["high"]):.1f}" y1="{y}" y2="{y}"/>'
    yield f'<circle cx="{at(estimate["mean"]):.1f}" cy="{y}" r="{radius:.1f}"/></g>'
    yield f'<text class="value" x="{_WIDTH - _VALUE + 14}" y="{y + 4:.0f}">{_text(gain(estimate))}</text>'


def histogram(gains: Sequence[float]) -> str:
    """How many tasks gained how much over the base."""
    low, high, step = _nice(min(0.0, *gains), max(0.0, *gains))
    width = next(one for one in (1, 2, 2.5, 5, 10) if (high - low) / one <= _BINS)
    bins: dict[int, int] = {}
    for value in gains:
        at_bin = math.floor(value / width)
        bins[at_bin] = bins.get(at_bin, 0) + 1
    most, height, top = max(bins.values()), 190, 16
    left, right = 20, _WIDTH - 20

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = list(_ticks(low, high, step, at, top + height))
    for number, many in sorted(bins.items()):
        tall, x = many / most * height, at(number * width)
        tone = "up" if number >= 0 else "down"
        parts.append(
            f'<rect class="{tone}" x="{x + 1:.1f}" y="{top + height - tall:.1f}" rx="2" '
            f'width="{at((number + 1) * width) - x - 2:.1f}" height="{tall:.1f}">'
            f"<title>{number * width:g} to {(number + 1) * width:g} points: {many:,} tasks</title></rect>"
        )
        middle = (x + at((number + 1) * width)) / 2
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{top + height - tall - 4:.1f}">{many:,}</text>')
    return _svg("Tasks by their gain over the base, in points", top + height + 30, parts)


def funnel_bars(steps: Sequence[Json]) -> str:
    """From candidates to trained rows."""
    parts, room = [], _WIDTH - 160 - _VALUE
    for number, step in enumerate(steps):
        y, width = 30 * number, max(1.0, step["share"] * room)
        parts.append(
            f'<text class="label" x="148" y="{y + 17}" text-anchor="end">{tables.STEP_TITLES[step["step"]]}</text>'
        )
        parts.append(f'<rect class="bar" x="160" y="{y}" width="{width:.1f}" height="24" rx="3"/>')
        said = f"{step['rows']:,} · {step['share']:.1%}"
        parts.append(f'<text class="value" x="{160 + width + 10:.1f}" y="{y + 17}">{said}</text>')
    return _svg("Rows by step, from candidates to trained rows", 30 * len(steps), parts)


def stage_bar(stages: Sequence[Json]) -> str:
    """Each stage's share of the seconds of work."""
    parts, x = [], 0.0
    for number, one in enumerate(stages):
        said, width = f"{one['stage']} {one['share']:.1%}", one["share"] * _WIDTH
        parts.append(f'<rect class="part{number}" x="{x:.1f}" y="0" width="{max(0.0, width - 2):.1f}" height="30"/>')
        x += width
        left = _WIDTH / len(stages) * number
        parts.append(f'<rect class="part{number}" x="{left:.1f}" y="44" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="value" x="{left + 16:.1f}" y="53">{_text(said)}</text>')
    return _svg("Share of the seconds of work by stage", 58, parts)


def _ticks(low: float, high: float, step: float, at: Any, bottom: float) -> Iterator[str]:
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        kind = "zero" if abs(value) < step / 2 else "grid"
        yield f'<line class="{kind}" x1="{at(value):.1f}" x2="{at(value):.1f}" y1="4" y2="{bottom}"/>'
        yield f'<text class="tick" x="{at(value):.1f}" y="{bottom + 18}">{value:+g}</text>'.replace("+0<", "0<")


def _nice(low: float, high: float) -> tuple[float, float, float]:
    """Bounds that are whole steps of 1, 2 or 5 times a power of ten, at most ten or so of them."""
    span = max(high - low, 1.0)
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * one for one in (1, 2, 5, 10) if span / (power * one) <= 9)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, high if high > low else low + step, step


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg role="img" aria-label="{_text(name)}" viewBox="0 0 {_WIDTH} {height:.0f}">'
    return "\n".join([head, *parts, "</svg>"])


def _text(text: str) -> str:
    return escape(printable(text))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
