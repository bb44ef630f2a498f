"""The comparison's artifact: which evaluation is which method's, what each scores, and what was in force.

Methods that ask alike share an evaluation, so no other marker can name them; reports read a line's lineage from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from selfguide.environment import environment
from selfguide.intervals import AUTHORS_METRICS, METRICS, Difference, bootstrap_columns
from selfguide.records import Ledger

if TYPE_CHECKING:
    from selfguide.config import Recipe
    from selfguide.finetuning import Adapter
    from selfguide.store import Artifact
    from selfguide.taskrun import TaskRun
    from selfguide.tasks import Task

VERSION = 1
SCHEMA = pa.schema([
    ("row", pa.int32()), ("method", pa.string()), ("evaluation", pa.string()), ("metric", pa.string()),
    ("n", pa.int32()), ("score", pa.float64()), ("low", pa.float64()), ("high", pa.float64()),
    ("difference", pa.float64()), ("difference_low", pa.float64()), ("difference_high", pa.float64()),
])  # fmt: skip


async def record(run: TaskRun, adapter: Adapter, evaluations: Mapping[str, Artifact]) -> Artifact:
    """One row for each method and metric, in points, with 95% intervals; none for a task without held-out data.

    `difference` is `self_guide` minus the method, paired row by row. The marker adds the task's facts, the resolved
    recipe and the environment, as they were when the comparison was first made.
    """
    resamples, seed = run.recipe.evaluation.bootstrap_samples, run.recipe.seed
    methods = {name: one.path.name for name, one in evaluations.items()}
    inputs = [adapter.artifact, *{one.path: one for one in evaluations.values()}.values()]
    made_by = run.made_by(VERSION, recipe=run.recipe.name, resamples=resamples, methods=methods)
    stage = run.store.stage("comparison", made_by, inputs)
    async with run.lock(stage):
        if stage.done:
            return stage.done
        with stage.writing():
            rows = _score_rows(evaluations, resamples, seed)
            facts = {"task": task_facts(run.task), "recipe": recipe_facts(run.recipe), "environment": environment()}
            return stage.finish(rows, SCHEMA, Ledger(len(rows), len(rows), {}, {}), **facts)


def task_facts(task: Task) -> dict[str, Any]:
    """What a report says of the task; not where its file lay."""
    return {
        "name": task.name, "kind": task.kind, "labels_from": task.labels_from, "num_labels": len(task.labels),
        "num_examples": len(task.examples), "num_instances": len(task.instances), "category": task.category,
        "output_language": task.output_language, "remarks": list(task.remarks),
    }  # fmt: skip


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without what names a place: a folder's path is cut to its name, addresses are left out."""
    settings: dict[str, Any] = recipe.model_dump(mode="json")
    student = Path(recipe.model.path).expanduser()
    settings["model"]["path"] = student.resolve().name if student.is_dir() else recipe.model.path
    del settings["cluster"]["address"], settings["engine"]["faults"]["marker"]
    return settings


def differences(comparison: Artifact) -> dict[str, dict[str, Difference]]:
    """The tuned student minus each other method, by method and metric."""
    found: dict[str, dict[str, Difference]] = {}
    for row in comparison.rows():
        if row["difference"] is not None:
            bounds = (row["difference"], row["difference_low"], row["difference_high"])
            found.setdefault(row["method"], {})[row["metric"]] = Difference(*bounds, row["n"])
    return found


def _score_rows(evaluations: Mapping[str, Artifact], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Every score and every difference is resampled by the same rows: they are drawn once."""
    metrics = [*METRICS, *AUTHORS_METRICS]
    predictions = {method: artifact.rows(metrics) for method, artifact in evaluations.items()}
    found: list[dict[str, Any]] = []
    columns: dict[tuple[int, str], list[float]] = {}
    for method, rows in predictions.items():
        for metric in metrics:
            line = {"row": len(found), "method": method, "evaluation": evaluations[method].path.name, "metric": metric}
            values = [row[metric] for row in rows]
            if None not in values:
                columns[len(found), ""] = values
                if method != "self_guide":
                    ours = [row[metric] for row in predictions["self_guide"]]
                    columns[len(found), "difference"] = [a - b for a, b in zip(ours, values, strict=True)]
            found.append({**dict.fromkeys(SCHEMA.names), **line, "n": len(rows)})
    estimates = bootstrap_columns(list(columns.values()), resamples, seed)
    for (number, what), one in zip(columns, estimates, strict=True):
        names = (f"{what}_low", f"{what}_high") if what else ("low", "high")
        found[number] |= {what or "score": one.mean, names[0]: one.low, names[1]: one.high}
    return found
