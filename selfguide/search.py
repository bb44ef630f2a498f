"""One-parameter-fits-all (SELF-GUIDE): of a grid of recipes the one whose worst gain over held-in tasks is the best.

Gains are of validation rows, for classification and generation apart; no test row is looked at. One training gives all
epochs, and points share the stages that they have in common.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

from selfguide.comparison import recipe_facts
from selfguide.curation import curate
from selfguide.errors import TaskFailed, UserError
from selfguide.evaluation import evaluate, rouge_of
from selfguide.finetuning import finetune, read_epochs
from selfguide.grid import Grid
from selfguide.intervals import PRIMARY_METRICS
from selfguide.methods import tuned_protocol, untuned_protocols
from selfguide.recipefile import change_recipe, extend_recipe
from selfguide.sizes import read_size, saved_bytes
from selfguide.store import RunStore, write_whole
from selfguide.synthesis import synthesis_stage, synthesize
from selfguide.taskfile import Kind

if TYPE_CHECKING:
    from selfguide.api import Session
    from selfguide.config import Recipe
    from selfguide.finetuning import Adapter
    from selfguide.store import Artifact
    from selfguide.sweep import Job
    from selfguide.sweep.driver import Listen
    from selfguide.taskrun import TaskRun
    from selfguide.tasks import Task

FORMAT = 1
METHOD = "selfguide.search:search_task"
_AT_ONCE = 8
"""Trainings of a task under way together; each holds its rows in memory."""


@dataclass(frozen=True)
class Search:
    """What is searched: a recipe, `parent` being the name or file that it was read from, over tasks."""

    tasks: Sequence[Task]
    recipe: Recipe
    parent: str
    grids: Mapping[Kind, Grid]


# ---- one task


async def search_task(
    run: TaskRun, *, changes: Sequence[Mapping[str, Any]], epochs: Sequence[int] = ()
) -> dict[str, Any]:
    """A sweep's job: scores of the base and of every grid point, a change and an epoch, on the validation rows.

    A point that fails has its reason in the place of a score, and the others go on; `failed` counts them. Raises
    `TaskFailed` where the base has no score.
    """
    grid = Grid(tuple(changes), tuple(epochs))
    base = await evaluate(run, replace(untuned_protocols(run)["base"], split="validation"))
    if base is None:
        raise TaskFailed(f"{run.task.name}: has no validation rows")
    slots = asyncio.Semaphore(_AT_ONCE)

    async def search_change(recipe: Recipe) -> list[dict[str, Any]]:
        async with slots:
            return await _search_change(replace(run, recipe=recipe), grid.epochs)

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(search_change(recipe)) for recipe in grid.recipes(run.recipe)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    points = [entry for one in running for entry in one.result()]
    return {"base": _scored(run, base), "points": points, "failed": sum("failed" in entry for entry in points)}


async def _search_change(run: TaskRun, epochs: Sequence[int]) -> list[dict[str, Any]]:
    """An entry for each epoch, in order; one where the recipe's own number decides."""
    try:
        kept = await curate(run, await synthesize(run))
        adapter = await finetune(run, kept)
    except TaskFailed as error:
        return [{"failed": str(error)} for _ in epochs or (0,)]
    adapters = read_epochs(adapter.artifact)
    return [await _score(run, adapters[epoch]) for epoch in epochs or (max(adapters),)]


async def _score(run: TaskRun, adapter: Adapter) -> dict[str, Any]:
    try:
        artifact = await evaluate(run, replace(tuned_protocol(run, adapter), split="validation"))
    except TaskFailed as error:
        return {"failed": str(error)}
    assert artifact is not None, "the base was scored on the same rows"
    return _scored(run, artifact) | {"proof": artifact.marker["proof"]["status"], "adapter": adapter.ref.digest}


def _scored(run: TaskRun, artifact: Artifact) -> dict[str, Any]:
    """Points from 0 to 100, by the metric that is usual for the kind of task."""
    asked = [row["id"] for row in artifact.rows()]
    if asked != [row.id for row in run.validation_instances] or {row.id for row in run.evaluation_instances} & {*asked}:
        raise AssertionError(f"{run.task.name}: a search was about to look at other rows than those for validation")
    scores, ledger = artifact.marker["scores"], artifact.marker["ledger"]
    metric = PRIMARY_METRICS[run.recipe.evaluation.protocol][run.task.kind]
    evaluation = artifact.path.relative_to(run.store.root.parents[1]).as_posix()
    num_failed = sum(ledger["failed"].values())
    return {"score": scores[metric], "n": scores["n"], "num_failed": num_failed, "evaluation": evaluation}


# ---- all tasks


async def search_tasks(
    search: Search,
    out: Path,
    *,
    hear: Listen = lambda event: None,
    retry_failed: bool = False,
    session: Session | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Searches in the run folder `out`, and writes search.json, search.md and a recipe for each winner.

    A second call goes on where the first one ended; `retry_failed` has it try again what failed. `hear` hears a sweep's
    events. Raises `UserError` for what the caller can mend, before anything starts.
    """
    from selfguide.api import load_student, open_session
    from selfguide.sweep import run_jobs
    from selfguide.sweep.driver import is_settled
    from selfguide.sweep.files import SweepFiles

    student = session.student if session else await asyncio.to_thread(load_student, search.recipe)
    check_search(_idle_runs(search, out, student), search)
    known = SweepFiles(RunStore(out, command=command)).outcomes()
    jobs = _jobs(search)
    if session is None and all(is_settled(known.get(job.key), out, retry_failed) for job in jobs):
        outcomes = [known[job.key] for job in jobs]
    else:

        def progress(_: str, stage: str, counts: Mapping[str, Any]) -> None:
            hear({"event": stage, **counts})

        async with nullcontext(session) if session else open_session(_serving(search), progress) as engines:
            outcomes = await run_jobs(jobs, out, session=engines, hear=hear, retry_failed=retry_failed)
    return _write_results(search, out, {one.task: one.result or {"failed": one.reason} for one in outcomes})


def _jobs(search: Search) -> list[Job]:
    """A job is a task with all its points: those share stages, and a stage is written by one process."""
    from selfguide.api import student_digest
    from selfguide.sweep import Job

    jobs, student = [], student_digest(search.recipe)
    for task in search.tasks:
        grid, source = search.grids[task.kind], str(Path(task.source).resolve())
        job = Job(
            source, task.name, task.digest, search.recipe, student, METHOD, task.kind, task.labels_from,
            cost=float(grid.num_points), options={"changes": list(grid.changes), "epochs": list(grid.epochs)},
        )  # fmt: skip
        jobs.append(job)
    return jobs


def _idle_runs(search: Search, out: Path, student: Any) -> list[TaskRun]:
    from selfguide.api import idle_run

    store = RunStore(out, create=False)
    return [idle_run(task, search.recipe, student, store) for task in search.tasks]


def _serving(search: Search) -> Recipe:
    """The engines make room for the highest rank that is tried."""
    recipes = [recipe for grid in search.grids.values() for recipe in grid.recipes(search.recipe)]
    return change_recipe(search.recipe, {"finetuning.lora_rank": max(one.finetuning.lora_rank for one in recipes)})


def check_search(runs: Sequence[TaskRun], search: Search) -> None:
    """Raises `UserError` where a task cannot be searched on."""
    from selfguide.api import check_run

    sources: dict[str, str] = {}
    for run in runs:
        task, evaluation = run.task, run.recipe.evaluation
        if task.source != sources.setdefault(task.name, task.source):
            raise UserError(f"{task.source}: another task has this name: {sources[task.name]}; rename one of them")
        if not run.validation_instances:
            official = f"all {len(task.instances)} are test rows; lower evaluation.num_instances, or leave the task out"
            why = official if evaluation.protocol == "official" else "it has fewer than ten; leave the task out"
            raise UserError(f"{task.source}: no instance is left for validation: {why}")
        if task.kind == "generation" and evaluation.protocol == "official" and rouge_of(run) is None:
            raise UserError(
                f"{task.source}: ROUGE-L of {task.output_language} needs GPT-2's tokenizer: evaluation.gpt2"
            )
        for recipe in search.grids[task.kind].recipes(search.recipe):
            check_run(replace(run, recipe=recipe))


# ---- the choice


def choose(grid: Grid, results: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int | None]:
    """Every point with its gains, and the winner's number: argmax of the worst gain, then of the mean, then the first.

    A point that failed on a task cannot win. `results` are what `search_task` said, or a reason, by task.
    """
    points: list[dict[str, Any]] = []
    for number in range(grid.num_points):
        change, epoch = divmod(number, max(1, len(grid.epochs)))
        entries = {task: _gain(result, number) for task, result in results.items()}
        gains = {task: entry["gain"] for task, entry in entries.items() if "gain" in entry}
        whole = len(gains) == len(entries)
        points.append({
            "changes": grid.changes[change], "epoch": grid.epochs[epoch] if grid.epochs else None, "tasks": entries,
            "worst_task": min(gains, key=gains.__getitem__) if whole else None,
            "worst": min(gains.values()) if whole else None, "mean": round(fmean(gains.values()), 4) if whole else None,
        })  # fmt: skip
    whole_points = [number for number, point in enumerate(points) if point["worst"] is not None]
    ranked = [(points[number]["worst"], points[number]["mean"], -number) for number in whole_points]
    return points, -max(ranked)[2] if ranked else None


def _gain(result: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Points over the base; or why there are none."""
    if "points" not in result:
        return {"failed": result["failed"]}
    entry = dict(result["points"][number])
    return entry if "failed" in entry else entry | {"gain": round(entry["score"] - result["base"]["score"], 4)}


def _write_results(search: Search, out: Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    from selfguide.report.search import render_search

    kinds = []
    for kind in get_args(Kind):
        mine = {task.name: results[task.name] for task in search.tasks if task.kind == kind}
        if mine:
            kinds.append(_write_kind(search, out, kind, mine))
    document = {"format": FORMAT, "parent": Path(search.parent).name, "recipe": recipe_facts(search.recipe)}
    document["kinds"] = kinds
    write_whole(out / "search.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_whole(out / "search.md", render_search(document).encode())
    return document


def _write_kind(search: Search, out: Path, kind: Kind, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The kind's part of the document; its winner's recipe is written, and one of an earlier call taken away."""
    points, winner = choose(search.grids[kind], results)
    path = out / f"winner-{kind}.yaml"
    path.unlink(missing_ok=True)
    if winner is not None:
        point = points[winner]
        changes = {**point["changes"], "name": f"{search.recipe.name}-{kind}"}
        changes |= {"finetuning.epochs": point["epoch"]} if point["epoch"] else {}
        text = extend_recipe(search.parent, change_recipe(search.recipe, changes), out)
        title = f"# The winner of a search over {len(results)} {kind} tasks (search.md).\n"
        write_whole(path, (title + text).encode())
    return {
        "kind": kind, "metric": PRIMARY_METRICS[search.recipe.evaluation.protocol][kind],
        "tasks": [{"task": task, **result.get("base", result)} for task, result in results.items()],
        "points": points, "winner": winner, "winner_recipe": None if winner is None else path.name,
    }  # fmt: skip


# ---- beforehand


def plan_search(search: Search, out: Path) -> dict[str, Any]:
    """What the search takes, by task, in pieces of work; weights in bytes. Writes nothing."""
    from selfguide.api import load_student

    student = load_student(search.recipe)
    runs = _idle_runs(search, out, student)
    check_search(runs, search)
    size = read_size(Path(student.folder))
    lines = []
    for run in runs:
        grid = search.grids[run.task.kind]
        recipes = grid.recipes(search.recipe)
        stages = {stage.path: stage for stage in (synthesis_stage(replace(run, recipe=one)) for one in recipes)}
        lines.append({
            "task": run.task.name, "kind": run.task.kind, "n": len(run.validation_instances),
            "points": grid.num_points, "syntheses": len(stages), "trainings": len(recipes),
            "evaluations": grid.num_points + 1, "done": sum(one.done is not None for one in stages.values()),
            "weights_bytes": sum(saved_bytes(size, one.finetuning) for one in recipes),
        })  # fmt: skip
    return {"tasks": lines, "notices": notices(search)}


def notices(search: Search) -> list[str]:
    """What keeps points from sharing their work."""
    kinds = {task.kind for task in search.tasks}
    varied = {key for kind in kinds for key in search.grids[kind].varied}
    of_pairs = sorted(
        key for key in varied if key.startswith("filters.") and key.split(".")[1] not in ("inputs", "sets")
    )
    rows = search.recipe.synthesis.target_rows
    if rows and of_pairs:
        return [
            f"synthesis.target_rows is {rows}: points that differ in {', '.join(of_pairs)} generate candidates of "
            "their own until so many pairs are kept; --set synthesis.target_rows=null lets them share"
        ]
    return []
