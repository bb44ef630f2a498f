"""What a person sees while a sweep goes on: a calm block of fixed height on a terminal, plain lines elsewhere, or JSON.

The block and the lines go to standard error. JSON goes to standard output, one event a line, each with `version`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from json import dumps
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.placement import count
from selfguide.text import printable

EVENTS_VERSION = 1
"""Of the JSON lines (docs/report.md); within a version keys are only added."""
_PLAIN_EVERY_S = 30.0
_MOST_STAGES, _MOST_FAILURES = 10, 3
_SMOOTH = 0.3
"""How much of the newest rate is taken over into the rate that is shown."""

Event = Mapping[str, Any]


class _Rate:
    """A count's growth in a second, smoothed; a count that goes back (a new session's) begins anew."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._last: tuple[float, float] | None = None

    def hear(self, at: float, count: float) -> None:
        if self._last and at > self._last[0] and count >= self._last[1]:
            now = (count - self._last[1]) / (at - self._last[0])
            self.value = now if self.value is None else self.value + _SMOOTH * (now - self.value)
        self._last = (at, count)


class SweepView(AbstractContextManager["SweepView"]):
    """Give `hear` every event of a sweep, as it happens. `clock` returns seconds, of any origin."""

    def __init__(
        self, *, json: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._as_json, self._clock = json, clock
        self._console = console or Console(stderr=True)
        self._note = "starting"
        self._session: Event = {}
        self._totals: Event = {}
        self._first: tuple[float, float] | None = None  # seconds and share done, when first heard
        self._stages: dict[str, tuple[Event, _Rate]] = {}
        self._rates = {"rows": _Rate(), "output_tokens": _Rate()}
        self._failures: deque[tuple[str, str]] = deque(maxlen=_MOST_FAILURES)
        self._spoken: float | None = None
        self._live = Live(console=self._console, get_renderable=self.block, refresh_per_second=2, transient=True)

    def __enter__(self) -> SweepView:
        if self._console.is_terminal and not self._as_json:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()
        if self._totals and not self._as_json:
            self._say(self._headline())

    def hear(self, event: Event) -> None:
        """Takes one event in; shows it in time, or at once where it is a line of its own."""
        if self._as_json:
            print(dumps({"version": EVENTS_VERSION, "time": time.time(), **event}), file=sys.stdout, flush=True)
            return
        match event["event"]:
            case "engines" if "starting" in event:
                self._note = f"starting {count(event['starting'], 'engine')}"
                self._speak(self._note)
            case "session_began":
                self._session = event
                self._speak(self._beginning())
            case "totals":
                self._hear_totals(event)
            case "stages":
                self._hear_stages(event["active"])
            case "task" if event["state"] == "failed":
                self._failures.append((event["task"], event.get("reason") or "no reason given"))
                self._speak(f"failed: {event['task']}: {event.get('reason') or 'no reason given'}")
        if self._spoken is None or self._clock() - self._spoken >= _PLAIN_EVERY_S:
            self._spoken = self._clock()
            if self._totals:
                self._speak(self._headline())

    def _hear_totals(self, event: Event) -> None:
        self._totals = event
        for key, rate in self._rates.items():
            rate.hear(event["seconds"], event[key])
        if self._first is None:
            self._first = (event["seconds"], self._share())

    def _hear_stages(self, active: Mapping[str, Event]) -> None:
        for name in [*self._stages]:
            if name not in active:
                del self._stages[name]
        for name, counts in active.items():
            _, rate = self._stages.get(name, (counts, _Rate()))
            rate.hear(self._clock(), counts["rows"])
            self._stages[name] = (counts, rate)

    # ---- what is said

    def _speak(self, line: str) -> None:
        """A line of its own where there is no terminal."""
        if not self._live.is_started:
            self._say(line)

    def _say(self, line: str) -> None:
        self._console.print(Text(printable(line)), soft_wrap=True)

    def _beginning(self) -> str:
        counts = (count(self._session[f"{key}s"], key) for key in ("engine", "runner", "trainer"))
        return f"{', '.join(counts)}, ready in {self._session['start_s']:.0f} s"

    def _headline(self) -> str:
        """Tasks, rows, speed, engines and what is left, in one line."""
        totals = self._totals
        said = [f"{totals['done']:,} of {totals['tasks']:,} tasks done", f"{totals['running']:,} running"]
        said += [f"{totals['failed']:,} failed"] * bool(totals["failed"])
        said += [f"{totals['rows']:,} rows", *self._speeds(), self._engines()]
        said += [f"{_clock_time(totals['seconds'])} gone", *self._left()]
        return ", ".join(filter(None, said))

    def _speeds(self) -> list[str]:
        named = {"rows": "rows/s", "output_tokens": "tokens/s"}
        return [f"{rate.value:,.0f} {named[key]}" for key, rate in self._rates.items() if rate.value is not None]

    def _engines(self) -> str:
        """Those that are alive, where the event says so."""
        all_of_them, alive = self._session.get("engines"), self._totals.get("engines_alive")
        if all_of_them is None:
            return ""
        return f"{all_of_them} engines" if alive is None else f"{alive} of {all_of_them} engines alive"

    def _left(self) -> list[str]:
        """By the cost of what is done where that is known. By number it is a bound: the longest tasks go first."""
        seconds, share = self._totals["seconds"], self._share()
        assert self._first is not None
        gained = share - self._first[1]
        if gained <= 0 or share >= 1:
            return []
        left_s = (seconds - self._first[0]) / gained * (1 - share)
        return [f"{'' if self._totals.get('cost_total') else 'at most '}{_clock_time(left_s)} left"]

    def _share(self) -> float:
        totals = self._totals
        if totals.get("cost_total"):
            return float(totals["cost_done"] / totals["cost_total"])
        return float((totals["done"] + totals["failed"]) / max(totals["tasks"], 1))

    # ---- the block

    def block(self) -> Group:
        """As many lines whatever goes on: two of totals, one a stage, the last failures."""
        head = self._headline() if self._totals else self._beginning() if self._session else self._note
        stages = sorted(self._stages.items(), key=lambda item: -item[1][0]["tasks"])
        failures = [Text(f"failed: {printable(task)}: {printable(why)}", style="red") for task, why in self._failures]
        return Group(
            *(
                Text(line, no_wrap=True, overflow="ellipsis")
                for line in _two_lines(printable(head), self._console.width)
            ),
            _stage_table(stages[:_MOST_STAGES]),
            *(Text() for _ in range(_MOST_STAGES - len(stages))),
            *(_one_line(text) for text in failures),
            *(Text() for _ in range(_MOST_FAILURES - len(failures))),
        )


def _stage_table(stages: list[tuple[str, tuple[Event, _Rate]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("stage", "tasks", "rows", "rows/s"):
        table.add_column(head, justify="left" if head == "stage" else "right", no_wrap=True)
    for name, (counts, rate) in stages:
        speed = "" if rate.value is None else f"{rate.value:,.0f}"
        table.add_row(*map(Text, (printable(name), f"{counts['tasks']:,}", f"{counts['rows']:,}", speed)))
    return table


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _two_lines(text: str, width: int) -> tuple[str, str]:
    """Broken between two parts where it is wider than the terminal."""
    if len(text) <= width:
        return text, ""
    at = text.rfind(", ", 0, width)
    return (text[: at + 1], text[at + 2 :]) if at > 0 else (text[:width], text[width:])


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
