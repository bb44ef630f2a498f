"""Tries variants of a recipe on the held-in tasks, which alone may decide a lever.

python -m benchmarks.nano.levers VARIANTS.yaml [--seeds 1] [--tasks N] [--model FOLDER] [--out DIR]

VARIANTS.yaml maps a name to changes of the recipe, such as {filters.vote.min_share: 0.6}. Stages that variants have in
common are made once. Prints exact match by variant and task, in points, beside the base and its controls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import selfguide
from benchmarks.nano import tasks
from benchmarks.nano.measure import label_accuracy
from selfguide.api import Session, open_session
from selfguide.progress import stderr_line
from selfguide.store import RunStore

UNTUNED = ("filtered_decoding", "constrained_labels", "calibrated_labels")
IN_FLIGHT = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--tasks", nargs="*", help="only tasks whose names hold one of these")
    parser.add_argument("--model", help="the student's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/nano-levers"))
    asyncio.run(try_variants(parser.parse_args()))


async def try_variants(options: argparse.Namespace) -> None:
    variants = yaml.safe_load(options.variants.read_text())
    names = [name for name in tasks.HELD_IN if not options.tasks or any(part in name for part in options.tasks)]
    common = {"evaluation.controls": list(UNTUNED)} | ({"model.path": options.model} if options.model else {})
    recipes = {
        name: selfguide.load_recipe(options.recipe, common | (changes or {})) for name, changes in variants.items()
    }
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with open_session(next(iter(recipes.values()))) as session:
        runs = [_try(session, recipes, name, seed, options.out, slots) for seed in options.seeds for name in names]
        found = await asyncio.gather(*runs)
    (options.out / "levers.json").write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))


async def _try(
    session: Session, recipes: Mapping[str, selfguide.Recipe], name: str, seed: int, out: Path, slots: asyncio.Semaphore
) -> dict[str, Any]:
    """Every variant on one task, one after another, so that later ones find the stages of earlier ones."""
    async with slots:
        [path] = tasks.write(out / f"tasks-{seed}", [name], draw=seed)
        task, store = selfguide.load_task(path), RunStore(out / f"seed-{seed}")
        scores: dict[str, float] = {}
        labels: dict[str, Any] = {}
        for variant, recipe in recipes.items():
            own = replace(session, recipe=recipe.model_copy(update={"seed": seed}))
            run = own.task_run(task, store, lambda task, stage, counts: None)
            try:
                done = (await selfguide.methods.self_guide(run)).evaluations
            except selfguide.TaskFailed as error:
                stderr_line(str(error))
                done = {**(untuned := await selfguide.methods.evaluate_untuned(run)), "self_guide": untuned["base"]}
            means = {method: one.marker["scores"]["exact_match"] for method, one in done.items()}
            scores |= {variant: means.pop("self_guide")} | means
            labels[variant] = label_accuracy(run)
            stderr_line(
                f"{name} seed {seed} {variant}: {scores[variant]:.1f} (base {means['base']:.1f}) {labels[variant]}"
            )
        return {"task": name, "kind": task.kind, "seed": seed, "scores": scores, "labels": labels}


def render(found: list[dict[str, Any]]) -> str:
    """Means by kind of task and method, and each task's."""
    lines = []
    for kind in ("classification", "generation"):
        mine = [one for one in found if one["kind"] == kind]
        columns: dict[str, list[float]] = defaultdict(list)
        for one in mine:
            for method, score in one["scores"].items():
                columns[method].append(score)
        lines += [f"{kind}, {len(mine)} runs"] if mine else []
        for method, values in columns.items():
            each = " ".join(f"{value:5.1f}" for value in values)
            lines.append(f"  {sum(values) / len(values):5.1f}  {method:24s} {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
