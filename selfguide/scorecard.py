"""One student, and any adapter of it, on any tasks: scores with intervals, and what the adapter changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.files import AnyPath, locate
from selfguide.adapterfile import AdapterFile, check_adapter_file, find_measured, measure_adapter, read_adapter_file
from selfguide.api import idle_run, load_student, open_session
from selfguide.errors import TaskFailed, UserError
from selfguide.evaluation import Protocol, evaluate, evaluation_stage
from selfguide.intervals import AUTHORS_METRICS, METRICS, PRIMARY_METRICS, bootstrap, bootstrap_tasks, paired_bootstrap
from selfguide.methods import untuned_protocols
from selfguide.store import RunStore
from selfguide.tables import make_table, show

if TYPE_CHECKING:
    from engines.types import AdapterRef
    from selfguide.api import Session
    from selfguide.config import Recipe
    from selfguide.finetuning import Adapter
    from selfguide.store import Artifact
    from selfguide.taskrun import Progress, TaskRun
    from selfguide.tasks import Task

_AT_ONCE = 8
"""Tasks under way together: enough that one task's last rows do not leave the engines idle."""
_PRIMARY = PRIMARY_METRICS["official"]
_LEGEND = "Points from 0 to 100 with 95% bootstrap intervals; differences are paired."
_TITLES = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}


async def evaluate_tasks(
    tasks: Sequence[Task],
    recipe: Recipe,
    out: str | AnyPath,
    adapter: str | Path | None = None,
    *,
    progress: Progress = lambda task, stage, counts: None,
    session: Session | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores by the recipe's evaluation section, in points with 95% intervals, in the run folder `out`.

    With `adapter`, a folder in PEFT's layout, also the adapter's scores and the paired differences. A second call goes
    on where the first one ended; `command` is left in the folder as a note on how. Raises `UserError` for what the
    caller can mend, before anything starts.
    """
    out = locate(out)
    RunStore(out, create=False)
    if not any(task.instances for task in tasks):
        raise UserError(f"{tasks[0].source}: no task has instances, so nothing can be evaluated; add held-out data")
    file = read_adapter_file(Path(adapter)) if adapter else None
    recipe = _serving(recipe, file)
    student = await asyncio.to_thread(load_student, recipe)
    ref = await asyncio.to_thread(check_adapter_file, file, student) if file else None
    store = RunStore(out, command=command)
    idle = [idle_run(task, recipe, student, store) for task in tasks]
    if all(_is_done(run, ref) for run in idle):
        lines = [await _score_task(run, ref) for run in idle]
    elif session is None:
        async with open_session(recipe, progress, trains=False) as own:
            lines = await _score(tasks, own, store, ref, progress)
    else:
        lines = await _score(tasks, session, store, ref, progress)
    described = {"folder": file.folder.name, "rank": file.rank, "digest": ref.digest} if file and ref else None
    return {
        "student": Path(student.folder).name, "recipe": recipe.name, "adapter": described,
        "tasks": [line["shown"] for line in lines], "overall": _overall(lines, recipe),
    }  # fmt: skip


def _serving(recipe: Recipe, file: AdapterFile | None) -> Recipe:
    """The adapter's own rank decides what engines make room for; without one they need none."""
    if file and not recipe.model.path:
        raise UserError(f"no student: name the adapter's own with --model (it says {file.base or 'nothing of it'})")
    update = {"method": "lora", "lora_rank": file.rank} if file else {"method": "full"}
    return recipe.model_copy(update={"finetuning": recipe.finetuning.model_copy(update=update)})


async def _score(
    tasks: Sequence[Task], session: Session, store: RunStore, ref: AdapterRef | None, progress: Progress
) -> list[dict[str, Any]]:
    from cluster.pool import EnginesLost

    slots = asyncio.Semaphore(_AT_ONCE)

    async def score(task: Task) -> dict[str, Any]:
        async with slots:
            return await _score_task(session.task_run(task, store, progress), ref)

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(score(task)) for task in tasks]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        if isinstance(first, EnginesLost):
            raise TaskFailed(f"{first}; the same command goes on from here") from first
        raise first from None
    return [one.result() for one in running]


def _protocol(run: TaskRun, adapter: Adapter) -> Protocol:
    """The adapter is asked what the base is asked."""
    base = untuned_protocols(run)["base"]
    return Protocol("adapter", base.sampling, base.num_gold, adapter=adapter)


def _is_done(run: TaskRun, ref: AdapterRef | None) -> bool:
    """Whether nothing is left that would need an engine."""
    if not run.evaluation_instances:
        return True
    if not evaluation_stage(run, untuned_protocols(run)["base"]).done:
        return False
    adapter = find_measured(run, ref) if ref else None
    return ref is None or (adapter is not None and evaluation_stage(run, _protocol(run, adapter)).done is not None)


async def _score_task(run: TaskRun, ref: AdapterRef | None) -> dict[str, Any]:
    """One task's line: what is shown, and the rows' values, from which means over tasks are made."""
    artifacts = {"base": await evaluate(run, untuned_protocols(run)["base"])}
    if ref and run.evaluation_instances:
        artifacts["adapter"] = await evaluate(run, _protocol(run, await measure_adapter(run, ref)))
    found = {name: artifact for name, artifact in artifacts.items() if artifact}
    resamples, seed = run.recipe.evaluation.bootstrap_samples, run.recipe.seed
    values = {name: _values(artifact) for name, artifact in found.items()}
    shown: dict[str, Any] = {
        "task": run.task.name, "kind": run.task.kind, "labels_from": run.task.labels_from,
        "n": len(run.evaluation_instances),
        "failed": {name: sum(one.marker["ledger"]["failed"].values()) for name, one in found.items()},
        "scores": {name: _each(columns, resamples, seed) for name, columns in values.items()},
    }  # fmt: skip
    if len(found) == 2:
        differences = paired_bootstrap(found["adapter"], found["base"], resamples, seed)
        shown["difference"] = {metric: asdict(one) for metric, one in differences.items()}
        shown["proof"] = found["adapter"].marker["proof"]
    return {"shown": shown, "values": values}


def _values(artifact: Artifact) -> dict[str, list[float]]:
    """Each metric's values by row; a metric that is unavailable for the task is left out."""
    rows = artifact.rows()
    columns = {metric: [row[metric] for row in rows] for metric in (*METRICS, *AUTHORS_METRICS)}
    return {metric: column for metric, column in columns.items() if None not in column}


def _each(columns: Mapping[str, list[float]], resamples: int, seed: int) -> dict[str, Any]:
    return {metric: asdict(bootstrap(column, resamples, seed)) for metric, column in columns.items()}


def _overall(lines: Sequence[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """As published: exact match over classification tasks, ROUGE-L over generation tasks; a task is a task."""
    found = []
    for kind, metric in _PRIMARY.items():
        columns = [line["values"] for line in lines if line["shown"]["kind"] == kind]
        columns = [one for one in columns if one and metric in one["base"]]
        if columns:
            found.append({"kind": kind, "metric": metric, "num_tasks": len(columns), **_means(columns, metric, recipe)})
    return found


def _means(columns: Sequence[Mapping[str, Mapping[str, list[float]]]], metric: str, recipe: Recipe) -> dict[str, Any]:
    resamples, seed = recipe.evaluation.bootstrap_samples, recipe.seed
    by_side = {side: [one[side][metric] for one in columns] for side in columns[0]}
    means = {side: bootstrap_tasks(values, resamples, seed) for side, values in by_side.items()}
    document: dict[str, Any] = {"scores": {side: asdict(mean) for side, mean in means.items()}}
    if "adapter" in by_side:
        pairs = zip(by_side["adapter"], by_side["base"], strict=True)
        gains = [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
        document["difference"] = asdict(bootstrap_tasks(gains, resamples, seed))
    return document


# ---- for a person


def show_scorecard(document: Mapping[str, Any]) -> None:
    """A line for each task with the metric that is usual for its kind, the means over tasks, and what to know."""
    adapter = document["adapter"]
    heads = ["task", "metric", "n", "base", *(["adapter", "difference", "in the engine"] if adapter else [])]
    rows = [_cells(one["task"], one, _PRIMARY[one["kind"]], one["n"]) for one in document["tasks"]]
    for one in document["overall"]:
        if one["num_tasks"] > 1:
            metric, name = one["metric"], f"mean of {one['num_tasks']} {one['kind']} tasks"
            means = {side: {metric: mean} for side, mean in one["scores"].items()}
            line = {"scores": means, "difference": {metric: one.get("difference")}}
            rows.append(_cells(name, line, metric, one["scores"]["base"]["n"]))
    title = f"{document['student']}, recipe {document['recipe']}"
    title += f", adapter {adapter['digest'][:12]} of rank {adapter['rank']}" if adapter else ""
    table = make_table(heads, [row[: len(heads)] for row in rows])
    show(title, table, *_remarks(document), _LEGEND)


def _cells(name: str, line: Mapping[str, Any], metric: str, n: int) -> list[object]:
    if not line["scores"]:
        return [name, "no held-out rows", 0, "", "", "", ""]
    base, adapter = line["scores"]["base"].get(metric), line["scores"].get("adapter", {}).get(metric)
    gain, status = line.get("difference", {}).get(metric), line.get("proof", {}).get("status", "")
    return [name, _TITLES[metric], n, *map(_interval, (base, adapter, gain)), status]


def _remarks(document: Mapping[str, Any]) -> list[str]:
    leaking = [one["task"] for one in document["tasks"] if one["labels_from"] == "instances"]
    failed = sum(sum(one["failed"].values()) for one in document["tasks"])
    remarks = [
        (leaking, f"The labels are taken from the test answers in: {', '.join(leaking)}."),
        (failed, f"{failed:,} rows failed, and count as misses."),
    ]
    return [text for applies, text in remarks if applies]


def _interval(one: Mapping[str, Any] | None) -> str:
    return f"{one['mean']:.1f} ({one['low']:.1f} to {one['high']:.1f})" if one else "unavailable"
