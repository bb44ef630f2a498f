"""The report of a sweep as a document: `sweep` of `docs/report.md`, from the sweep's files and the tasks' artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import selfguide
from engines.files import AnyPath
from selfguide.report.cells import bounds, points, signed
from selfguide.report.collect import SCHEMA_VERSION, finite, lift, open_run
from selfguide.report.conclusion import METRIC_TITLES, sign, title
from selfguide.report.sweep_reading import Sweep, SweptTask, read_sweep, read_task, reconcile
from selfguide.report.sweep_scores import Adjusted, adjust, count_wins, describe, gain_of, group, kind_of
from selfguide.report.sweep_work import (
    rows_by_step,
    seconds_by_stage,
    split_sessions,
    sum_failures,
    sum_funnel,
    sum_sessions,
    sum_stages,
    sum_tokens,
)

_OF_KIND = ("scope", "kind", "metric")

Json = Mapping[str, Any]


def collect_sweep(folder: AnyPath) -> dict[str, Any]:
    """The document of `docs/report.md` for a sweep: `tasks` is empty, `sweep.tasks` has what can be said of so many."""
    store, sweep = open_run(folder), read_sweep(folder)
    seed = sweep.facts["recipe"]["seed"]
    listed = sweep.facts["tasks"]
    tasks = [read_task(store, one, sweep.outcomes.get(one["job"], ()), seed) for one in listed]
    settings = sweep.facts["recipe"]
    line = {"recipe": {"name": settings["name"], "settings": settings}}
    recipes = lift([line], "recipe")
    described = _describe(sweep, tasks, reconcile(tasks, listed), seed)
    environments = lift([one for one in described["sessions"] if one["environment"]], "environment")
    document = {
        "schema_version": SCHEMA_VERSION, "selfguide": selfguide.__version__, "tasks": [],
        "recipes": recipes, "environments": environments, "replication": None,
        "sweep": {"recipe": line["recipe"], **described},
    }  # fmt: skip
    return dict(finite(document))


def _describe(sweep: Sweep, tasks: Sequence[SweptTask], states: Mapping[str, int], seed: int) -> dict[str, Any]:
    settings, groups, adjusted = sweep.facts["recipe"], group(tasks), adjust(tasks)
    sessions = split_sessions(sweep)
    described: dict[str, Any] = {
        "recipe_name": settings["name"], "seed": seed, "engine": settings["engine"]["kind"],
        "protocol": settings["evaluation"]["protocol"], "student": _student(settings, tasks),
        "counts": {
            "listed": len(tasks), **states, "scored": sum(task.scores is not None for task in tasks),
            "absent": len(sweep.facts["absent"]), "invalid": len(sweep.facts["invalid"]),
        },
        "groups": [describe(one, seed) for one in groups],
        "pairs": list(count_wins(groups, adjusted)),
        "funnel": sum_funnel(tasks),
        "stages": sum_stages(tasks),
        "totals": sum_sessions(sessions),
        "sessions": sessions,
        "failures": sum_failures(tasks),
        "absent": sweep.facts["absent"],
        "invalid": [{key: str(one[key]) for key in ("source", "reason")} for one in sweep.facts["invalid"]],
        "tasks": [_task(task, adjusted) for task in tasks],
    }  # fmt: skip
    caveats = _caveats(described, tasks)
    return {"conclusion": [*caveats, *_conclude(described)], **described}


def _student(settings: Json, tasks: Sequence[SweptTask]) -> dict[str, Any]:
    digests = [task.comparison.marker["made_by"]["model"] for task in tasks if task.comparison]
    return {"name": settings["model"]["path"], "digest": digests[0] if digests else None}


def _task(task: SweptTask, adjusted: Adjusted) -> dict[str, Any]:
    listed, comparison, chances = task.listed, task.comparison, adjusted.get(task.job, {})
    return {
        **{key: listed[key] for key in ("task", "job", "source")},
        "kind": kind_of(task) if comparison or listed.get("kind") else None, "category": listed.get("category") or None,
        "categories": listed.get("categories") or [], "domains": listed.get("domains") or [],
        "in_official_test": bool(listed.get("in_official_test")),
        "state": task.state, "attempts": task.attempts, "error": task.error, "reason": task.reason,
        "comparison": f"comparison/{comparison.path.name}" if comparison else None,
        "primary_metric": task.scores.metric if task.scores else None, "proof": task.proof,
        "methods": list(task.methods),
        "tests": [
            {"method": name, "gain": gain_of(task, name), "p": p, "holm_p": strict, "bh_p": mild}
            for name, (p, strict, mild) in chances.items()
        ],
        "funnel": rows_by_step(task), "stage_seconds": seconds_by_stage(task), **sum_tokens(task.stages.values()),
    }  # fmt: skip


# ---- what the numbers say


def _caveats(described: Json, tasks: Sequence[SweptTask]) -> Iterator[str]:
    if described["engine"] == "simulated":
        yield "Simulated engines answered, without a model: the scores mean nothing."
    elif described["student"]["name"] == "random":
        yield "The student's weights are random: the scores say nothing about the method."
    facts = Counter(task.comparison.marker["task"]["labels_from"] for task in tasks if task.comparison)
    if facts["instances"]:
        yield f"In {_tasks(facts['instances'])} the labels were read off the test answers, which flatters every method."
    same = sum(task.proof == "indistinguishable from base" for task in tasks)
    if same:
        yield f"In {_tasks(same)} training changed the student by no more than the engine's numerical noise."


def _conclude(described: Json) -> Iterator[str]:
    """Kind by kind: against the base, then against the controls. Nothing is claimed that an interval does not show."""
    kinds = [one for one in described["groups"] if one["scope"] == "kind"]
    for one in kinds:
        pairs = {pair["method"]: pair for pair in described["pairs"] if all(pair[key] == one[key] for key in _OF_KIND)}
        others = {method["method"]: method for method in one["methods"] if method["method"] in pairs}
        if base := others.pop("base", None):
            yield _against_base(one, base, pairs["base"])
        if others:
            yield f"Beside the controls it is {'; '.join(map(_against_control, others.values()))}."
    if not kinds:
        yield "No task with held-out data is done yet, so there are no scores."


def _against_base(one: Json, method: Json, pair: Json) -> str:
    gain, side = method["difference"], sign(method["difference"])
    where, metric = f"Over {_tasks(method['num_tasks'], one['kind'])}", METRIC_TITLES[one["metric"]]
    if side:
        amount = (
            f"{points(abs(gain['mean']))} points {'above' if side > 0 else 'below'} the untuned student in {metric}"
        )
        said = f"{where} SELF-GUIDE is {amount} (95% interval {bounds(gain)})"
    else:
        numbers = f"difference {points(gain['mean'])}, 95% interval {bounds(gain)}"
        said = f"{where} SELF-GUIDE is not shown to differ from the untuned student in {metric} ({numbers})"
    record = f"better on {pair['wins']:,} tasks, worse on {pair['losses']:,}, the same on {pair['ties']:,}"
    return f"{said}: {record}; surely better on {pair['surely_better']:,}, surely worse on {pair['surely_worse']:,}."


def _against_control(method: Json) -> str:
    gain, name = method["difference"], title(method["method"])
    claim = {1: "above", 0: "not shown to differ from", -1: "below"}[sign(gain)]
    return f"{claim} {name} ({signed(gain['mean'])}, {bounds(gain)})"


def _tasks(count: int, kind: str = "") -> str:
    return f"{count:,} {kind} task{'' if count == 1 else 's'}".replace("  ", " ")
