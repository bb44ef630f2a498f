"""The next useful command here, told by the run folders that are there. Light: nothing is read but names and times."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

COMMAND_FILE = "command.txt"
"""In a run folder: the last command that worked in it."""
_AT_WORK_S = 60.0
"""A lease is touched every 15 s while its holder lives."""


def next_step(here: Path) -> list[str]:
    """What to say below the help: a line about the state of things, and the command."""
    begun = (path.parent for path in here.glob("runs/*/run.json") if (path.parent / "tasks").is_dir())
    runs = sorted(begun, key=_last_change)
    if not runs:
        return ["Nothing has been run here yet. The embedded student on four small tasks, minutes on a CPU:",
                "  selfguide demo"]  # fmt: skip
    newest = runs[-1].relative_to(here)
    work = [path for path in (here / newest).glob("tasks/*/*/*/work") if "." not in path.parent.name]
    if any(time.time() - one < _AT_WORK_S for one in _times(lease for path in work for lease in path.glob("lease-*"))):
        return [f"{newest} is being worked on. What it holds so far:", f"  selfguide report {newest}"]
    if work:
        stages = ", ".join(sorted({path.parents[1].name for path in work}))
        return [f"{newest} is unfinished ({stages}). It goes on with:", f"  {_command(here / newest, newest)}"]
    return [f"{newest} is finished. Its report:", f"  selfguide report {newest}"]


def _command(run: Path, shown: Path) -> str:
    """The command that began it, unless somebody has removed it."""
    path = run / COMMAND_FILE
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return known or f"selfguide run TASK --out {shown}   (with the options that began it)"


def _last_change(run: Path) -> float:
    return max(_times([run / "run.json", *run.glob("tasks/*/*/*")]), default=0.0)


def _times(paths: Iterable[Path]) -> list[float]:
    """Times of last change; what vanished meanwhile has none."""
    return [path.stat().st_mtime for path in paths if path.exists()]
