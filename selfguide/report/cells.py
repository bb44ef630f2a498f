"""Texts and numbers as Markdown shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfguide.text import printable

_MARKUP = re.compile(r"[\\`*\[\]{}#|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def escape(text: object) -> str:
    """Text from outside as it is, and obeyed by nothing: no markup, no HTML, no control characters."""
    escaped = _MARKUP.sub(r"\\\g<0>", printable(str(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(align: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns also line up as plain text; `align` has l or r for each. Cells are escaped already."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]
    rule = ["-" * (width - 1) + ("-" if side == "l" else ":") for width, side in zip(widths, align, strict=True)]
    pad = {"l": str.ljust, "r": str.rjust}
    lines.insert(1, rule)
    cells = ([pad[side](cell, width) for cell, width, side in zip(line, widths, align, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def points(value: float) -> str:
    """One decimal; a negative zero is zero."""
    return f"{round(value, 1) + 0.0:.1f}"


def signed(value: float) -> str:
    """A gain; zero has no sign."""
    return ("+" if float(points(value)) > 0 else "") + points(value)


def bounds(estimate: Mapping[str, Any]) -> str:
    return f"{points(estimate['low'])} to {points(estimate['high'])}"


def score(estimate: Mapping[str, Any] | None, otherwise: str = "") -> str:
    """With its interval; `otherwise` where there is none."""
    return f"{points(estimate['mean'])} ({bounds(estimate)})" if estimate else otherwise


def gain(estimate: Mapping[str, Any] | None, otherwise: str = "") -> str:
    """A difference with its interval."""
    return f"{signed(estimate['mean'])} ({bounds(estimate)})" if estimate else otherwise
