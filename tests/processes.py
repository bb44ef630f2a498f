"""Which processes a process has started, from /proc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], dict[int, str]]:
    """`descendants(pid)`: the children of a process, their children and so on, with their command lines."""
    return _descendants


def _descendants(pid: int) -> dict[int, str]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        parent = _read(stat).rpartition(")")[2].split()[1:2]
        if parent:
            children.setdefault(int(parent[0]), []).append(int(stat.parent.name))
    found, queue = {}, children.get(pid, [])
    while queue:
        child = queue.pop()
        found[child] = _read(Path(f"/proc/{child}/cmdline")).replace("\0", " ").strip()
        queue += children.get(child, [])
    return found


def _read(path: Path) -> str:
    """A process may end at any time."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
