"""The live view of a sweep, at several moments of one; no clock but the test's own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from selfguide.sweepview import EVENTS_VERSION, SweepView

BEGAN = {"event": "session_began", "engines": 64, "runners": 4, "trainers": 2, "start_s": 12.4, "environment": {}}


def totals(**changes: Any) -> dict[str, Any]:
    return {
        "event": "totals", "tasks": 1_451, "done": 0, "failed": 0, "running": 0, "waiting": 1_451, "rows": 0,
        "output_tokens": 0, "prompt_tokens": 0, "cached_tokens": 0, "engine_deaths": 0, "stale": 0, "poisoned": 0,
        "engine_busy_s": 0.0, "engine_awake_s": 0.0, "engine_sequence_s": 0.0, "driver_rss_bytes": 1,
        "runner_rss_bytes": [1], "seconds": 0.0, **changes,
    }  # fmt: skip


def stages(**active: tuple[int, int]) -> dict[str, Any]:
    return {"event": "stages", "active": {name: {"tasks": n, "rows": rows} for name, (n, rows) in active.items()}}


def task(name: str, state: str, reason: str | None = None) -> dict[str, Any]:
    return {"event": "task", "task": name, "state": state, "reason": reason}


class Seen:
    """A view with a console of its own, and a clock that stands until it is moved."""

    def __init__(self, *, terminal: bool, width: int = 100) -> None:
        self.now = 0.0
        self.console = Console(file=io.StringIO(), force_terminal=terminal, width=width, height=40, color_system=None)
        self.view = SweepView(console=self.console, clock=lambda: self.now)

    def lines(self) -> list[str]:
        """What has been printed so far."""
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue().splitlines()

    def block(self) -> list[str]:
        """What a terminal would show now."""
        screen = Console(file=io.StringIO(), width=self.console.width, color_system=None)
        screen.print(self.view.block())
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue().splitlines()


@pytest.fixture
def seen() -> Seen:
    """On a terminal that nothing is drawn on by itself."""
    return Seen(terminal=True)


@pytest.fixture
def plain() -> Iterator[Seen]:
    seen = Seen(terminal=False)
    with seen.view:
        yield seen


def test_a_terminal_shows_stages_and_totals(seen: Seen) -> None:
    assert seen.block()[0] == "starting"
    seen.view.hear({"event": "engines", "starting": 64})
    assert seen.block()[0] == "starting 64 engines"
    seen.view.hear(BEGAN)
    assert seen.block()[0] == "64 engines, 4 runners, 2 trainers, ready in 12 s"
    seen.view.hear(totals())
    seen.view.hear(stages(synthesis=(40, 0), evaluation=(24, 100)))
    seen.now = 10.0
    seen.view.hear(totals(done=145, running=64, rows=50_000, output_tokens=900_000, seconds=10.0))
    seen.view.hear(stages(synthesis=(40, 3_000), finetuning=(2, 0)))
    block = seen.block()
    assert (
        " ".join(block[:2]).split()
        == (
            "145 of 1,451 tasks done, 64 running, 50,000 rows, 5,000 rows/s, 90,000 tokens/s, 64 engines, 0:10 gone, "
            "at most 1:30 left"
        ).split()
    )
    assert [line.split() for line in block[2:5]] == [
        ["stage", "tasks", "rows", "rows/s"], ["synthesis", "40", "3,000", "300"], ["finetuning", "2", "0"],
    ]  # fmt: skip
    assert not any("evaluation" in line for line in block)


def test_the_block_keeps_its_height(seen: Seen) -> None:
    """Whatever happens, and however many tasks there are."""
    heights = {len(seen.block())}
    seen.view.hear(BEGAN)
    for i in range(1_451):
        seen.view.hear(task(f"task{i}_{'x' * 200}", "failed" if i % 7 == 0 else "done", "why " * 100))
        if i % 100 == 0:
            seen.view.hear(totals(done=i, failed=i // 7, rows=i * 100, seconds=float(i), engines_alive=63))
            seen.view.hear(stages(**{f"stage{k}": (k, i) for k in range(i // 100)}))
            heights.add(len(seen.block()))
    assert heights == {16}
    assert all(len(line) <= 100 for line in seen.block())
    assert sum("failed: task" in line for line in seen.block()) == 3


def test_what_is_left_goes_by_cost_where_it_is_known(seen: Seen) -> None:
    """A quarter of the tasks, the longest ones, are half of the work. What was done before the session is no speed."""
    seen.view.hear(totals(tasks=100, done=10, cost_done=20.0, cost_total=100.0, seconds=0.0))
    seen.view.hear(totals(tasks=100, done=35, cost_done=70.0, cost_total=100.0, seconds=100.0))
    assert "1:00 left" in " ".join(seen.block()[:2])
    assert "at most" not in " ".join(seen.block()[:2])


def test_engines_that_died_are_told(seen: Seen) -> None:
    seen.view.hear(BEGAN)
    seen.view.hear(totals(engines_alive=61))
    assert "61 of 64 engines alive" in " ".join(seen.block()[:2])


def test_without_a_terminal_there_are_lines_now_and_then(plain: Seen) -> None:
    plain.view.hear(BEGAN)
    for i in range(100):  # a second each
        plain.now = float(i)
        plain.view.hear(totals(done=i, rows=10 * i, seconds=float(i)))
        plain.view.hear(stages(synthesis=(3, i)))
        plain.view.hear(task(f"t{i}", "started"))
    lines = plain.lines()
    assert lines[0] == "64 engines, 4 runners, 2 trainers, ready in 12 s"
    assert [line.split(" of ")[0] for line in lines[1:]] == ["30", "60", "90"]
    plain.view.hear(task("t7", "failed", "too few rows are left"))
    assert plain.lines()[-1] == "failed: t7: too few rows are left"
    plain.view.hear(BEGAN | {"runners": 1})
    assert plain.lines()[-1] == "64 engines, 1 runner, 2 trainers, ready in 12 s"


def test_the_end_is_said() -> None:
    seen = Seen(terminal=False)
    with seen.view:
        seen.view.hear(totals(tasks=3, done=2, failed=1, waiting=0, seconds=4_000.0))
    assert seen.lines()[-1] == "2 of 3 tasks done, 0 running, 1 failed, 0 rows, 1:06:40 gone"


def test_control_characters_are_shown_and_not_obeyed(plain: Seen) -> None:
    name = "bad\x1b[2J\r\n[red]task[/red]\u202e"
    plain.view.hear(task(name, "failed", "\x07why"))
    [line] = plain.lines()
    assert line == r"failed: bad\x1b[2J\r\n[red]task[/red]\u202e: \x07why"
    shown = Seen(terminal=True)
    shown.view.hear(task(name, "failed", "\x07why"))
    shown.view.hear(stages(**{"s\x1b[31m": (1, 1)}))
    assert not set("\x1b\x07\u202e") & set("".join(shown.block()))
    assert r"[red]task[/red]" in "".join(shown.block())


def test_a_terminal_is_drawn_on_and_left_with_the_last_line() -> None:
    seen = Seen(terminal=True)
    with seen.view:
        seen.view.hear(totals(tasks=2, done=2, seconds=5.0))
    assert seen.lines()[-1].endswith("2 of 2 tasks done, 0 running, 0 rows, 0:05 gone")


def test_json_lines_are_the_events(capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        BEGAN,
        totals(),
        stages(synthesis=(1, 2)),
        task("a\x1b\n", "failed", "\u202e"),
        {"event": "later", "time": 5},
    ]
    with SweepView(json=True) as view:
        for event in events:
            view.hear(event)
    said, others = capsys.readouterr()
    found = [json.loads(line) for line in said.splitlines()]
    assert others == ""
    assert said.isascii()
    assert "\x1b" not in said
    assert [{key: one[key] for key in event} for one, event in zip(found, events, strict=True)] == events
    assert {one["version"] for one in found} == {EVENTS_VERSION}
    assert all(isinstance(one["time"], (int, float)) for one in found)
    assert found[-1]["time"] == 5
