"""Draws the kept ratios of every hardware into docs/: a picture and a table each, between the page's markers.

python -m benchmarks.performance [--baselines DIR] [--docs DIR]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.suite import BASELINES, REPO, SIZES, SUITE

BEGIN, END = "<!-- made by benchmarks/performance.py: begin -->", "<!-- made by benchmarks/performance.py: end -->"
LABEL, PLOT, VALUE, ROW, TOP = 300, 380, 215, 24, 44
"""Widths of the picture's columns, height of a row, and where rows begin."""
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""What is greater is no ratio, and in the table alone."""
INK, SOFT, GOOD, BAD = "#1f2328", "#8c959f", "#0969da", "#cf222e"
Row = tuple[str, str, Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    parser.add_argument("--docs", type=Path, default=REPO / "docs")
    args = parser.parse_args()
    for path, text in render(args.baselines, args.docs).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def render(baselines: Path, docs: Path) -> dict[Path, str]:
    """Every file that the kept results make, with its text."""
    page = docs / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    pictures: dict[Path, str] = {}
    sections = []
    for path in sorted(baselines.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        for size in (one for one in SIZES if one in kept):
            rows = [(name, key, one) for name in SUITE if name in kept[size]
                    for key, one in kept[size][name]["ratios"].items()]  # fmt: skip
            title, picture = f"{path.stem}, {size} sizes", f"pictures/{path.stem}-{size}.svg"
            pictures[docs / picture] = draw(title, [row for row in rows if row[2]["max"] <= TICKS[-1]])
            sections.append("\n".join([f"### {title}", "", f"![{title}]({picture})", "", *table(rows), ""]))
    sections = sections or ["None are kept yet."]
    text = "\n".join([before + BEGIN, "", *sections, END]) + rest.partition(END)[2]
    return {page: text, **pictures}


def table(rows: list[Row]) -> Iterator[str]:
    yield "| benchmark | ratio | median | least to most | pairs | bound |"
    yield "|---|---|---|---|---|---|"
    for name, key, one in rows:
        spread = f"{one['min']:.2f} to {one['max']:.2f}"
        cells = [f"`{name}`", words(key), f"{one['median']:.2f}", spread, str(one["pairs"]), bound(one)]
        yield f"| {' | '.join(cells)} |"


def words(key: str) -> str:
    return key.replace("_", " ")


def bound(one: Mapping[str, Any]) -> str:
    said = [f"{word} {one[key]:g}" for key, word in (("floor", "at least"), ("ceiling", "at most"))
            if one[key] is not None]  # fmt: skip
    return ", ".join(said) + (" **missed**" if missed(one) else "")


def missed(one: Mapping[str, Any]) -> bool:
    floor, ceiling = one["floor"], one["ceiling"]
    return (floor is not None and one["median"] < floor) or (ceiling is not None and one["median"] > ceiling)


def draw(title: str, rows: list[Row]) -> str:
    """A line from the least to the most, a dot for the median, a bar at the bound; its own white ground, so that the
    page's colours do not matter."""
    numbers = [value for _, _, one in rows for value in (one["min"], one["max"], one["floor"], one["ceiling"]) if value]
    ticks = _ticks(min(numbers, default=1), max(numbers, default=1))
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def at(value: float) -> float:
        return LABEL + (math.log(max(value, ticks[0])) - low) / (high - low) * PLOT

    width, height = LABEL + PLOT + VALUE, TOP + ROW * len(rows) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(16, 26, f"Ratios on {title}", "start", INK),
    ]
    for tick in ticks:
        parts.append(_line(at(tick), TOP - 6, at(tick), height - 28, INK if tick == 1 else "#d8dee4"))
        parts.append(_text(at(tick), height - 10, f"{tick:g}", "middle", SOFT))
    for number, (name, key, one) in enumerate(rows):
        parts += _draw_row(TOP + ROW * number + 8, f"{name}: {words(key)}", one, at)
    return "\n".join([*parts, "</svg>", ""])


def _draw_row(y: float, label: str, one: Mapping[str, Any], at: Any) -> Iterator[str]:
    tone = BAD if missed(one) else GOOD
    yield _text(LABEL - 14, y + 4, label, "end", INK)
    for limit in (one["floor"], one["ceiling"]):
        if limit is not None:
            yield _line(at(limit), y - 8, at(limit), y + 8, INK, 3)
    yield _line(at(one["min"]), y, at(one["max"]), y, tone, 3)
    yield f'<circle cx="{at(one["median"]):.1f}" cy="{y:.1f}" r="5" fill="{tone}"/>'
    yield _text(LABEL + PLOT + 16, y + 4, f"{one['median']:.2f}  {bound(one).replace('**', '')}", "start", tone)


def _ticks(least: float, most: float) -> tuple[float, ...]:
    below = [tick for tick in TICKS if tick <= least][-1:] or [TICKS[0]]
    above = [tick for tick in TICKS if tick >= most][:1] or [TICKS[-1]]
    ends = (min(below[0], 0.5), max(above[0], 2))
    return tuple(tick for tick in TICKS if ends[0] <= tick <= ends[1])


def _line(x1: float, y1: float, x2: float, y2: float, tone: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{tone}" stroke-width="{width:g}"/>'


def _text(x: float, y: float, text: str, anchor: str, tone: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{tone}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
