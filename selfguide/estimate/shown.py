"""The plans of a run, for a person and as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from selfguide.estimate.plan import Plan
from selfguide.sizes import existing, readable_bytes
from selfguide.tables import make_table, show
from selfguide.text import printable

UNKNOWN = "unknown until measured"
_LEGEND = (
    "≤ at most, ~ expected from what the run folder holds. Stages that are done show what they took. Starting the "
    "engines is not counted."
)
_NOTHING = "Nothing is left to do: the run would only show its report."


def document(plans: Sequence[Plan], out: Path) -> dict[str, Any]:
    """Every number of every stage, and the sums over what is left."""
    left = [plan for plan in plans if plan.status != "done"]
    seconds = None if any(plan.seconds is None for plan in left) else round(sum(plan.seconds or 0 for plan in left), 1)
    return {
        "out": str(out), "stages": [asdict(plan) for plan in plans],
        "left": {"seconds": seconds, "disk_bytes": needed_bytes(plans), "free_bytes": _free(out)},
    }  # fmt: skip


def needed_bytes(plans: Sequence[Plan]) -> int:
    """Bytes at the worst moment: all that stays, and the largest of what lies there for a while."""
    left = [plan for plan in plans if plan.status != "done"]
    return sum(plan.disk_bytes for plan in left) + max((plan.peak_bytes for plan in left), default=0)


def show_plans(plans: Sequence[Plan], out: Path) -> None:
    """A table, what is to be said of its lines, and the sums."""
    heads = ("stage", "status", "rows", "tokens in", "tokens out", "disk", "time")
    notes = [f"{plan.stage}: {note}" for plan in plans for note in plan.notes]
    total = document(plans, out)["left"]
    time = UNKNOWN if total["seconds"] is None else readable_seconds(total["seconds"])
    disk = f"{readable_bytes(total['disk_bytes'])} at most, {readable_bytes(total['free_bytes'])} free for {out}"
    remarks = [Text("\n".join(map(printable, notes)))] if notes else []
    left = f"Left to do: time {time}; disk {disk}." if any(plan.status != "done" for plan in plans) else _NOTHING
    show(make_table(heads, map(_cells, plans)), *remarks, _LEGEND, left)


def _cells(plan: Plan) -> list[str]:
    committed = plan.status == "unfinished" and plan.rows_done
    status = f"{plan.status}, {plan.rows_done:,} rows committed" if committed else plan.status
    rows = f"{plan.rows_done:,}" if plan.status == "done" else _amount(plan.rows, plan.most_rows)
    tokens_in = _amount(plan.tokens_in, plan.most_tokens_in)
    tokens_out = _amount(plan.tokens_out, plan.most_tokens_out)
    disk = readable_bytes(plan.disk_bytes)
    disk += f" (+{readable_bytes(plan.peak_bytes)} while it works)" if plan.peak_bytes else ""
    return [plan.stage, status, rows, tokens_in, tokens_out, disk, _time(plan)]


def _amount(expected: int | None, most: int) -> str:
    if not most:
        return ""
    if expected is None:
        return f"≤ {most:,}"
    return f"{expected:,}" if expected == most else f"~ {expected:,} (≤ {most:,})"


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return UNKNOWN
    bounded = plan.status != "done" and plan.rows is None
    return ("≤ " if bounded and plan.seconds >= 1 else "") + readable_seconds(plan.seconds)


def readable_seconds(seconds: float) -> str:
    """4 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _free(out: Path) -> int:
    return shutil.disk_usage(existing(out)).free
