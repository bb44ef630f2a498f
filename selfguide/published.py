"""What the SELF-GUIDE authors published of their own experiment: their tasks and figures, from `published.yaml`.

Figures are theirs, as logged; nothing that was measured here is ever among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from selfguide.taskfile import Kind

Set = Literal["held-in", "held-out"]


@dataclass(frozen=True)
class PublishedTask:
    """A task of the authors' lists; `name` is the first part of its file's name, task190."""

    name: str
    set: Set
    kind: Kind


@dataclass(frozen=True)
class Figure:
    """One published number. `settings` are the configuration that it belongs to, where it is known."""

    task: str
    what: str
    value: float
    unit: Literal["fraction", "points"]
    metric: str
    source: str
    differs: tuple[str, ...]
    settings: str | None = None

    @property
    def points(self) -> float:
        return round(100 * self.value, 4) if self.unit == "fraction" else self.value


@dataclass(frozen=True)
class FigureKind:
    """What figures of one kind have in common: where they stand, and what differs from what is measured here."""

    what: str
    title: str
    unit: str
    source: str
    said: str
    differs: tuple[str, ...]


@cache
def published() -> dict[str, Any]:
    """The file as it is: student, tasks, sources, figures, overall."""
    return dict(yaml.safe_load(files("selfguide").joinpath("published.yaml").read_text(encoding="utf-8")))


def published_tasks() -> list[PublishedTask]:
    """All tasks of the authors' lists, in their order."""
    lists = published()["tasks"]
    return [PublishedTask(name, one, kind) for one in lists for kind in lists[one] for name in lists[one][kind]]


def figure_kinds() -> list[FigureKind]:
    return [
        FigureKind(what, one["title"], one["unit"], one["source"], one["said"], tuple(one["differs"]))
        for what, one in published()["figures"].items()
    ]


def figures_of(task: PublishedTask) -> dict[str, Figure]:
    """The task's figures by what they are; what was not published is not there."""
    found = {}
    for what, one in published()["figures"].items():
        if task.name in one["values"]:
            value, settings = _cell(one["values"][task.name], one.get("settings", ()))
            metric, differs = one["metric"][task.kind], tuple(one["differs"])
            found[what] = Figure(task.name, what, value, one["unit"], metric, one["source"], differs, settings)
    return found


def _cell(cell: Any, names: list[str]) -> tuple[float, str | None]:
    """A number, or a number and the settings behind it."""
    if not names:
        return float(cell), None
    value, *settings = cell
    said = {True: "yes", False: "no"}
    shown = (said[one] if isinstance(one, bool) else one for one in settings)
    return float(value), ", ".join(f"{name} {one}" for name, one in zip(names, shown, strict=True))
