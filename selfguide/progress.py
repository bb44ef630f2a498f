"""What a person sees while a run goes on: a live table on a terminal, a plain line now and then elsewhere.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from selfguide.text import printable

_PLAIN_EVERY_S = 10.0
_MOST_LINES = 16
_TASK_WIDTH = 28


@dataclass
class _StageView:
    began: float = field(default_factory=time.monotonic)
    last: float = 0.0
    first_rows: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.last - self.began

    def left_s(self) -> float | None:
        """Seconds to the end at the pace so far (rows that an earlier process did are not counted as speed)."""
        rows, total = self.counts.get("rows"), self.counts.get("of")
        done = (rows or 0) - (self.first_rows or 0)
        return None if not rows or not total or done <= 0 else self.seconds / done * (total - rows)


class ProgressView(AbstractContextManager["ProgressView"]):
    """Call it with (task, stage, counts). Knows the counts rows, of, accepted, kept, failed, output_tokens, loss."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._note = ""
        self._console = Console(stderr=True, quiet=quiet)
        self._views: dict[tuple[str, str], _StageView] = {}
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=4, transient=True)
        self._spoken: dict[tuple[str, str], float] = {}

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()
        for (task, stage), view in self._views.items():
            self._say(task, stage, view)

    def __call__(self, task: str, stage: str, counts: dict[str, Any]) -> None:
        if stage == "engines":
            self._engines(counts)
            return
        view = self._views.setdefault((task, stage), _StageView())
        view.counts = counts
        view.last = time.monotonic()
        if view.first_rows is None:
            view.first_rows = counts.get("rows", 0)
        if not self._live.is_started and view.last - self._spoken.get((task, stage), 0.0) >= _PLAIN_EVERY_S:
            self._say(task, stage, view)

    def _engines(self, counts: dict[str, Any]) -> None:
        started = "starting" in counts
        self._note = (
            f"starting {counts['starting']} engine(s)" if started else f"engines ready in {counts['seconds']:.0f} s"
        )
        if not self._live.is_started:
            self._console.print(Text(self._note))

    def _say(self, task: str, stage: str, view: _StageView) -> None:
        said = (task, stage)
        if self._spoken.get(said) == view.last:
            return
        self._spoken[said] = view.last
        cells = [f"{name} {value}" for name, value in zip(_HEADS[1:], _cells(view), strict=True) if value]
        self._console.print(Text(f"{printable(task)} {stage}: " + ", ".join(cells)), soft_wrap=True)

    def _table(self) -> Table | Text:
        if not self._views:
            return Text(self._note, style="dim")
        table = Table(box=None, pad_edge=False, title=Text(self._note, style="dim"), title_justify="left")
        several = len({task for task, _ in self._views}) > 1
        for head in ("task", *_HEADS) if several else _HEADS:
            table.add_column(head, justify="left" if head in ("task", "stage") else "right")
        for (task, stage), view in sorted(self._views.items(), key=lambda item: item[1].began)[-_MOST_LINES:]:
            named = [printable(task)[:_TASK_WIDTH], stage] if several else [stage]
            table.add_row(*map(Text, [*named, *_cells(view)]))
        return table


_HEADS = ("stage", "rows", "accepted", "kept", "rejected", "failed", "tokens/s", "loss", "seconds", "left")


def _cells(view: _StageView) -> list[str]:
    counts = view.counts
    rows, total, left = counts.get("rows"), counts.get("of"), view.left_s()
    accepted, failed = counts.get("accepted"), counts.get("failed")
    rejected = None if accepted is None or rows is None else max(0, rows - accepted - (failed or 0))
    speed = counts.get("output_tokens", 0) / view.seconds if view.seconds >= 1 else 0
    loss = counts.get("loss")
    return [
        f"{rows}/{total}" if total else _number(rows),
        _number(accepted), _number(counts.get("kept")), _number(rejected),
        _number(failed), f"{speed:.0f}" if speed else "", "" if loss is None else f"{loss:.3f}", f"{view.seconds:.0f}",
        "" if left is None or left < 1 else f"{left:.0f} s",
    ]  # fmt: skip


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def stderr_line(text: str) -> None:
    """One plain line on standard error, control characters shown, not obeyed."""
    print(printable(text), file=sys.stderr, flush=True)
