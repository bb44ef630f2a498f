"""Results for a person: tables on a terminal, the same as plain text in a pipe. Text from outside is never markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfguide.text import printable

_SHORT = 16
"""Cells up to this length stand on one line, so that a narrow terminal folds the long ones."""
_UNBROKEN = 100_000
"""Columns of a pipe: lines are not folded there, so that they can be searched."""


def make_table(heads: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """Numbers stand to the right; None is an empty cell; a rich `Text` keeps its style."""
    cells = [[one if isinstance(one, Text) else Text(_written(one)) for one in row] for row in rows]
    kinds = [list(column) for column in zip(*cells, strict=True)] or [[] for _ in heads]
    heading = Text(title, style="bold") if title else None
    table = Table(box=None, pad_edge=False, title=heading, title_justify="left", header_style="dim")
    for head, column in zip(heads, kinds, strict=True):
        numeric = bool(column) and all(_is_number(cell.plain) for cell in column)
        short = all(len(cell.plain) <= _SHORT for cell in column)
        table.add_column(Text(head), justify="right" if numeric else "left", overflow="fold", no_wrap=short)
    for row in cells:
        table.add_row(*row)
    return table


def show(*parts: Table | Text | str) -> None:
    """Prints each part on standard output, a blank line between them."""
    console = Console(file=sys.stdout)
    console = console if console.is_terminal else Console(file=sys.stdout, width=_UNBROKEN, color_system=None)
    for number, part in enumerate(parts):
        with console.capture() as captured:
            console.print(Text(printable(part)) if isinstance(part, str) else part)
        lines = captured.get().splitlines()
        print(*([""] if number else []), *(line.rstrip() for line in lines), sep="\n")


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else printable(str(value))


def _is_number(text: str) -> bool:
    return not text or text.replace(",", "").replace(".", "", 1).isdigit()
