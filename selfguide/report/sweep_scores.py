"""Methods side by side: means over tasks with intervals, and wins and losses task by task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfguide.intervals import bootstrap_clusters
from selfguide.report.conclusion import TITLES
from selfguide.report.sweep_reading import SweptTask
from selfguide.report.sweep_significance import benjamini_hochberg, holm, sign_p, wilcoxon_p

SURE = 0.05
"""An adjusted p up to this counts as surely better or worse."""
_RESAMPLES = 2_000

Json = Mapping[str, Any]
Adjusted = Mapping[str, Mapping[str, tuple[float, float, float]]]
"""By job and method: p, Holm's p, Benjamini and Hochberg's p."""


@dataclass(frozen=True)
class Group:
    """Scored tasks whose means are taken together."""

    scope: str
    name: str | None
    kind: str | None
    metric: str | None
    tasks: Sequence[SweptTask]


def group(tasks: Sequence[SweptTask]) -> list[Group]:
    """All; each kind; each category; and of the tasks of the official test split the kinds and categories again."""
    scored = [task for task in tasks if task.scores]
    official = [task for task in scored if task.listed.get("in_official_test")]
    whole = [Group("all", None, None, None, scored)] if scored else []
    return [
        *whole, *_split("kind", scored, by_category=False), *_split("category", scored, by_category=True),
        *_split("test_kind", official, by_category=False), *_split("test_category", official, by_category=True),
    ]  # fmt: skip


def _split(scope: str, tasks: Sequence[SweptTask], *, by_category: bool) -> list[Group]:
    """Tasks of one metric each: what one mean is taken over has one unit."""
    found: dict[tuple[str, str, str], list[SweptTask]] = {}
    for task in tasks:
        assert task.scores is not None
        category = (task.listed.get("category") or "") if by_category else ""
        found.setdefault((category, kind_of(task), task.scores.metric), []).append(task)
    return [
        Group(scope, category or None, kind, metric, mine) for (category, kind, metric), mine in sorted(found.items())
    ]


def kind_of(task: SweptTask) -> str:
    """As its comparison was made; as it is listed before."""
    return str(task.comparison.marker["task"]["kind"] if task.comparison else task.listed["kind"])


def method_order(tasks: Sequence[SweptTask]) -> list[str]:
    """Every method that any task has, SELF-GUIDE last."""
    found = {name for task in tasks if task.scores for name in task.scores.means}
    known = [*TITLES]
    return sorted(found, key=lambda name: (name == "self_guide", known.index(name) if name in TITLES else 99, name))


def describe(one: Group, seed: int) -> dict[str, Any]:
    """Each method's mean over the tasks of the group that have it, and SELF-GUIDE's difference on the same tasks."""
    methods = [_describe_method(name, one.tasks, seed) for name in method_order(one.tasks)]
    facts = {"scope": one.scope, "name": one.name, "kind": one.kind, "metric": one.metric}
    return {**facts, "num_tasks": len(one.tasks), "methods": methods}


def _describe_method(name: str, tasks: Sequence[SweptTask], seed: int) -> dict[str, Any]:
    scores = [task.scores for task in tasks if task.scores and name in task.scores.means]
    rows = sum(one.num_rows for one in scores)
    score = _estimate([one.means[name] for one in scores], [one.resampled[name] for one in scores], rows, seed)
    difference = None
    if name != "self_guide":
        gains = [one.means["self_guide"] - one.means[name] for one in scores]
        drawn = [one.resampled["self_guide"] - one.resampled[name] for one in scores]
        difference = _estimate(gains, drawn, rows, seed)
    return {"method": name, "num_tasks": len(scores), "score": score, "difference": difference}


def _estimate(means: Sequence[float], drawn: Sequence[Any], rows: int, seed: int) -> dict[str, Any]:
    low, high = bootstrap_clusters(np.stack(drawn), _RESAMPLES, seed)
    return {"mean": round(100 * float(np.mean(means)), 2), "low": low, "high": high, "n": rows}


# ---- wins and losses


def adjust(tasks: Sequence[SweptTask]) -> Adjusted:
    """For each method, one family of tests: all tasks that have it."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {task.job: {} for task in tasks if task.scores}
    for method in method_order(tasks)[:-1]:
        tested = [(task.job, task.scores.chances[method]) for task in tasks if _has(task, method) and task.scores]
        chances = [chance for _, chance in tested]
        for (job, chance), strict, mild in zip(tested, holm(chances), benjamini_hochberg(chances), strict=True):
            found[job][method] = (chance, strict, mild)
    return found


def _has(task: SweptTask, method: str) -> bool:
    return task.scores is not None and method in task.scores.means


def count_wins(groups: Sequence[Group], adjusted: Adjusted) -> Iterator[dict[str, Any]]:
    """SELF-GUIDE against each method: over all tasks, and over those of each kind."""
    for one in groups:
        if one.scope in ("all", "kind"):
            for method in method_order(one.tasks)[:-1]:
                yield {"scope": one.scope, "kind": one.kind, "metric": one.metric, **_count(one, method, adjusted)}


def _count(one: Group, method: str, adjusted: Adjusted) -> dict[str, Any]:
    mine = [task for task in one.tasks if _has(task, method)]
    gains: Any = np.asarray([gain_of(task, method) for task in mine])
    _, strict, mild = np.asarray([adjusted[task.job][method] for task in mine]).T
    better, worse = gains > 0, gains < 0
    return {
        "method": method, "num_tasks": len(mine),
        "wins": int(better.sum()), "losses": int(worse.sum()), "ties": int((gains == 0).sum()),
        "surely_better": int((better & (strict <= SURE)).sum()), "surely_worse": int((worse & (strict <= SURE)).sum()),
        "likely_better": int((better & (mild <= SURE)).sum()), "likely_worse": int((worse & (mild <= SURE)).sum()),
        "sign_p": float(f"{sign_p(gains):.3g}"), "wilcoxon_p": float(f"{wilcoxon_p(gains):.3g}"),
    }  # fmt: skip


def gain_of(task: SweptTask, method: str) -> float:
    """SELF-GUIDE minus the method, in points as they are printed: what rounds to nothing is a tie."""
    assert task.scores is not None
    return round(100 * (task.scores.means["self_guide"] - task.scores.means[method]), 2) + 0.0
