"""The processes below another one, as Linux tells of them; for what kills some of them and looks for the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

GONE_S = 120.0
"""All the time that processes may need to end once their parent is dead."""
Process = tuple[int, str, str]
"""A process id, its start (together they are never used again), and its command line."""


def descendants(pid: int) -> dict[int, str]:
    """Children of a process, their children and so on, with their command lines."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        parent = read(stat).rpartition(")")[2].split()[1:2]
        if parent:
            children.setdefault(int(parent[0]), []).append(int(stat.parent.name))
    found, queue = {}, children.get(pid, [])
    while queue:
        child = queue.pop()
        found[child] = read(Path(f"/proc/{child}/cmdline")).replace("\0", " ").strip()
        queue += children.get(child, [])
    return found


def living(processes: Iterable[Process]) -> list[int]:
    return [pid for pid, started, _ in processes if started and start_of(pid) == started]


def bury_all(processes: Sequence[Process]) -> int:
    """How many are still there after all time that they may need; they are ended."""
    due = time.monotonic() + GONE_S
    while (left := living(processes)) and time.monotonic() < due:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


def start_of(pid: int) -> str:
    """Clock ticks from boot to the process's start; empty where it has ended, also where nobody has noticed yet."""
    fields = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if fields and fields[0] not in ("Z", "X") else ""


def read(path: Path) -> str:
    """A process may end at any time."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
