"""Measures SELF-GUIDE with a small student against every control, task by task and seed by seed.

python -m benchmarks.nano.measure --set held_in|held_out [--seeds 3] [--tasks N] [--out DIR]

Writes OUT/rows.json: for each seed, task and method the scores of all instances, and what became of the labels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

import selfguide
from benchmarks.nano import tasks
from selfguide.api import Session, open_session
from selfguide.curation import curation_stage
from selfguide.evaluation import evaluate
from selfguide.finetuning import finetune
from selfguide.methods import tuned_protocol
from selfguide.metrics import exact_match
from selfguide.progress import stderr_line
from selfguide.records import ACCEPTED, Ledger
from selfguide.store import Artifact, RunStore
from selfguide.synthesis import synthesis_stage
from selfguide.taskrun import TaskRun

HERE = Path(__file__).parent
CONTROLS = ("few_shot_icl", "filtered_decoding", "constrained_labels", "calibrated_labels", "few_shot_sft")
IN_FLIGHT = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("held_in", "held_out"), default="held_out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", help="only tasks whose names hold one of these")
    parser.add_argument("--out", type=Path, default=Path("runs/nano-bench"))
    parser.add_argument("--recipe", default="nano", help="the recipe of the best levers")
    parser.add_argument("--published", default=str(HERE / "published.yaml"), help="the recipe as published")
    parser.add_argument("--model", help="the student's folder")
    parser.add_argument("--trainers", type=int, default=2, help="at work at the same time")
    asyncio.run(measure(parser.parse_args()))


async def measure(options: argparse.Namespace) -> None:
    known = tasks.HELD_IN if options.set == "held_in" else tasks.HELD_OUT
    names = [name for name in known if not options.tasks or any(part in name for part in options.tasks)]
    changes: dict[str, Any] = {"cluster.num_trainers": options.trainers}
    changes |= {"model.path": options.model} if options.model else {}
    recipes = {"best": selfguide.load_recipe(options.recipe, changes)}
    recipes["published"] = selfguide.load_recipe(options.published, changes)
    found: list[dict[str, Any]] = []
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with open_session(recipes["best"]) as session:
        jobs = [_measure_one(session, recipes, name, seed, options.out, slots)
                for seed in range(options.seeds) for name in names]  # fmt: skip
        for job in asyncio.as_completed(jobs):
            found.append(await job)
            stderr_line(f"{len(found)} of {len(jobs)}: {_told(found[-1])}")
    found.sort(key=lambda one: (one["seed"], one["task"]))
    path = options.out / "rows.json"
    path.write_text(json.dumps({"set": options.set, "runs": found}))
    json.dump({"path": str(path), "runs": len(found)}, sys.stdout)


def _told(one: Mapping[str, Any]) -> str:
    means = {name: _mean(scores["exact_match"]) for name, scores in one["methods"].items()}
    return f"seed {one['seed']} {one['task']} {json.dumps(means)} {json.dumps(one['labels'])}"


def _mean(values: list[float]) -> float:
    return round(100 * sum(values) / len(values), 1)


async def _measure_one(
    session: Session, recipes: Mapping[str, selfguide.Recipe], name: str, seed: int, out: Path, slots: asyncio.Semaphore
) -> dict[str, Any]:
    """One task under one seed, which also draws other gold examples: all methods, on the same instances."""
    async with slots:
        folder = out / f"seed-{seed}"
        [path] = tasks.write(out / f"tasks-{seed}", [name], draw=seed)
        task, store = selfguide.load_task(path), RunStore(folder)
        runs = {}
        for kind, recipe in recipes.items():
            controls = CONTROLS if kind == "published" else ()
            changed = recipe.evaluation.model_copy(update={"controls": controls})
            own = replace(session, recipe=recipe.model_copy(update={"seed": seed, "evaluation": changed}))
            runs[kind] = own.task_run(task, store, lambda task, stage, counts: None)
        methods: dict[str, Artifact | None] = {}
        labels: dict[str, Any] = {}
        for kind, run in runs.items():
            evaluations, labels[kind] = await _self_guide(run)
            methods |= {f"self_guide_{kind}" if key == "self_guide" else key: one for key, one in evaluations.items()}
        methods["oracle"] = await _oracle(runs["published"])
        scores = {key: _scores(one) for key, one in methods.items() if one is not None}
        base = methods["base"]
        assert base is not None
        if task.labels:
            scores["base_lenient"] = _lenient(base, task.labels)
        valid = [row["prediction"] in task.labels for row in base.rows()] if task.labels else []
        return {
            "task": name, "kind": task.kind, "seed": seed, "chance": 1 / len(task.labels) if task.labels else 0.0,
            "valid": sum(valid) / len(valid) if valid else None, "labels": labels, "methods": scores,
        }  # fmt: skip


async def _self_guide(run: TaskRun) -> tuple[dict[str, Artifact | None], dict[str, Any]]:
    """The evaluations; where the task ended before there was a tuned student, the base stands for it."""
    try:
        done: dict[str, Artifact | None] = dict((await selfguide.methods.self_guide(run)).evaluations)
    except selfguide.TaskFailed as error:
        stderr_line(str(error))
        untuned = await selfguide.methods.evaluate_untuned(run)
        done = {**untuned, "self_guide": untuned["base"]}
        if "few_shot_sft" in selfguide.methods.wanted_controls(run):
            done["few_shot_sft"] = await selfguide.methods.few_shot_sft(run)
    return done, label_accuracy(run)


def label_accuracy(run: TaskRun) -> dict[str, Any]:
    """Shares: inputs that have a truth, that carry the label they were written for; right outputs before and after."""
    candidates = synthesis_stage(run).done
    curated = curation_stage(run, candidates).done if candidates else None
    if candidates is None or curated is None:
        return {}
    inputs = [row for row in candidates.rows() if row["state"] == ACCEPTED]
    truths = {row["row"]: tasks.truth(run.task.name, row["input"]) for row in inputs}
    pairs = [row for row in curated.rows() if row["output"] is not None]
    kept = [row for row in pairs if row["state"] == ACCEPTED]

    def right(rows: list[dict[str, Any]]) -> float | None:
        known = [exact_match(row["output"], [truths[row["row"]] or "\0"]) for row in rows]
        return round(sum(known) / len(known), 3) if known else None

    carried = [row["label"] == truths[row["row"]] for row in inputs if row["label"]]
    return {
        "inputs": len(inputs), "valid": round(sum(t is not None for t in truths.values()) / max(1, len(inputs)), 3),
        "carry": round(sum(carried) / len(carried), 3) if carried else None,
        "before": right(pairs), "kept": len(kept), "after": right(kept),
    }  # fmt: skip


async def _oracle(run: TaskRun) -> Artifact | None:
    """All accepted inputs with the world's own answers: what right labels would bring."""
    candidates = synthesis_stage(run).done
    assert candidates is not None
    stage = run.store.stage("curation", run.made_by(1, labels="the world's"), [candidates])
    async with run.lock(stage):
        if not stage.done:
            with stage.writing():
                rows: list[dict[str, Any]] = []
                for row in candidates.rows():
                    truth = tasks.truth(run.task.name, row["input"])
                    if row["state"] == ACCEPTED and truth is not None:
                        rows.append({"row": len(rows), "input": row["input"], "output": truth})
                ledger = Ledger(len(rows), len(rows), {}, {})
                stage.finish(
                    [{**row, "state": ACCEPTED, "filter": None, "reason": None} for row in rows], _ORACLE, ledger
                )
    assert stage.done is not None
    if not stage.done.marker["ledger"]["accepted"]:
        return None
    return await evaluate(run, tuned_protocol(run, await finetune(run, stage.done), "oracle"))


_ORACLE = pa.schema([
    ("row", pa.int32()), ("input", pa.string()), ("output", pa.string()), ("state", pa.string()),
    ("filter", pa.string()), ("reason", pa.string()),
])  # fmt: skip


def _scores(evaluation: Artifact) -> dict[str, list[float]]:
    rows = evaluation.rows()
    return {metric: [round(row[metric], 4) for row in rows] for metric in ("exact_match", "rouge_l")}


def _lenient(base: Artifact, labels: tuple[str, ...]) -> dict[str, list[float]]:
    """The base's own answers, read as the first label that they name."""
    rows = base.rows()
    named = [next((word for word in row["prediction"].split() if word in labels), "") for row in rows]
    exact = [exact_match(label, row["references"]) for label, row in zip(named, rows, strict=True)]
    return {"exact_match": exact, "rouge_l": exact}


if __name__ == "__main__":
    main()
