"""The authors' published figures beside what was measured of the same tasks, in cells of their own.

A cell that was not published, or not measured by their metric and split, is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from engines.files import AnyPath
from selfguide.intervals import PRIMARY_METRICS
from selfguide.published import Figure, PublishedTask, figure_kinds, figures_of, published, published_tasks
from selfguide.replication import read_marker

MEASURED = ("base", "filtered_decoding", "self_guide")
FIGURES = ("base", "filtered_decoding", "gain", "best_validation")
AVERAGED = ("base", "filtered_decoding", "gain")
_METRICS = PRIMARY_METRICS["authors"]

Json = Mapping[str, Any]


def collect_replication(folder: AnyPath, tasks: Sequence[Json]) -> dict[str, Any] | None:
    """`replication` of `docs/report.md`; None where the folder is none of `selfguide replicate`."""
    marker = read_marker(folder)
    if marker is None:
        return None
    by_name = {task["name"]: task for task in tasks}
    rows = [_row(one, marker, by_name) for one in published_tasks()]
    kinds = [
        {**asdict(one), "differs": list(one.differs), "source_meaning": _source(one.source)} for one in figure_kinds()
    ]
    overall = [{**one, "source_meaning": _source(one["source"])} for one in published()["overall"]]
    return {
        "student": published()["student"]["model"],
        "tasks": rows,
        "means": list(_means(rows)),
        "kinds": kinds,
        "overall": overall,
    }


def _source(tag: str) -> str:
    return str(published()["sources"][tag])


def _row(one: PublishedTask, marker: Json, tasks: Mapping[str, Json]) -> dict[str, Any]:
    """One of the authors' tasks: theirs and ours."""
    name = marker["tasks"].get(one.name)
    task = tasks.get(name, {"lines": [], "stages": [], "unfinished": []})
    ours = [line for line in task["lines"] if line["protocol"] == "authors" and line["methods"]]
    line, figures = ours[-1] if ours else None, figures_of(one)
    return {
        "name": one.name, "set": one.set, "kind": one.kind, "task": name,
        "state": _state(one.name, marker, task, line), "failure": marker["failed"].get(one.name),
        "metric": _METRICS[one.kind], "line": line and line["id"],
        "published": {what: _figure(figures[what]) if what in figures else None for what in FIGURES},
        "measured": _measured(line, _METRICS[one.kind]),
    }  # fmt: skip


def _state(name: str, marker: Json, task: Json, line: Json | None) -> str:
    if line:
        return "compared"
    if name in marker["failed"]:
        return "failed"
    if name in marker["absent"]:
        return "absent"
    if name not in marker["tasks"]:
        return "not asked for"
    if task["lines"]:
        return "compared otherwise"
    return "begun" if task["stages"] or task["unfinished"] else "to do"


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "value": figure.value, "unit": figure.unit, "points": figure.points, "metric": figure.metric,
        "source": figure.source, "settings": figure.settings,
    }  # fmt: skip


def _measured(line: Json | None, metric: str) -> dict[str, Any]:
    """Scores of the methods that the authors measured too, and the gain of SELF-GUIDE over the base."""
    methods = {one["method"]: one for one in line["methods"]} if line else {}
    cells = {name: methods[name]["scores"][metric] if name in methods else None for name in MEASURED}
    return {**cells, "gain": methods["base"]["differences"][metric] if methods else None}


# ---- means over tasks


def _means(rows: Sequence[Json]) -> Iterator[dict[str, Any]]:
    """Of each set and kind: over all its tasks, and, where only some (two at least) are measured, over those."""
    for group in dict.fromkeys((row["set"], row["kind"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["kind"]) == group]
        measured = [row for row in mine if row["state"] == "compared"]
        for chosen in (mine, measured) if 1 < len(measured) < len(mine) else (mine,):
            yield {
                "set": group[0], "kind": group[1], "tasks": [row["name"] for row in chosen],
                "published": {what: _published_mean(chosen, what) for what in AVERAGED},
                "measured": {what: _measured_mean(chosen, what) for what in (*MEASURED, "gain")},
            }  # fmt: skip


def _published_mean(rows: Sequence[Json], what: str) -> float | None:
    cells = [row["published"][what] for row in rows]
    return None if None in cells else round(math.fsum(cell["points"] for cell in cells) / len(cells), 2)


def _measured_mean(rows: Sequence[Json], what: str) -> dict[str, Any] | None:
    """Each task counts the same. The interval follows from the tasks' own, which are independent of each other."""
    cells = [row["measured"][what] for row in rows]
    if None in cells:
        return None
    mean = math.fsum(cell["mean"] for cell in cells) / len(cells)
    half = math.hypot(*((cell["high"] - cell["low"]) / 2 for cell in cells)) / len(cells)
    return {
        "mean": round(mean, 2),
        "low": round(mean - half, 2),
        "high": round(mean + half, 2),
        "n": sum(cell["n"] for cell in cells),
    }
