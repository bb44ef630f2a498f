"""Which tasks a sweep is of, and the jobs that it makes of them; each task's file is read once and let go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfguide.comparison import recipe_facts
from selfguide.errors import UserError
from selfguide.protocols import test_instances
from selfguide.sweep.jobs import Job
from selfguide.tasks import SPLITS, Task, find_tasks, load_split, load_task

if TYPE_CHECKING:
    from selfguide.config import Recipe
    from selfguide.tasks import LabelsFrom

_CHARS_A_TOKEN = 4


@dataclass(frozen=True)
class Sweep:
    """What is swept: jobs in the order of their tasks, and what was asked for that is no task here."""

    jobs: tuple[Job, ...]
    subject: dict[str, Any]
    """The content of `sweep/sweep.json`."""

    @property
    def invalid(self) -> list[dict[str, str]]:
        return list(self.subject["invalid"])


def plan_sweep(
    paths: Sequence[str], recipe: Recipe, *, split: str = "", labels_from: LabelsFrom | None = None
) -> Sweep:
    """A job for every task under the paths; with `split`, for those of them that an official split names.

    A file that is no task, or that has no room in the student's context, is told and left out, as an absent one is.
    Raises `UserError` where nothing is left, or where two files hold tasks of one name.
    """
    from selfguide.api import student_digest

    files, absent = _choose(paths, split)
    student = student_digest(recipe)
    official = _official(paths)
    jobs: list[Job] = []
    facts: list[dict[str, Any]] = []
    invalid: list[dict[str, str]] = []
    for path in files:
        try:
            task = load_task(path, labels_from=labels_from)
        except UserError as error:
            invalid.append({"source": path.name, "reason": str(error).replace(str(path), path.name)})
            continue
        cost = _cost(task, recipe)
        job = Job(str(path.resolve()), task.name, task.digest, recipe, student, labels_from=labels_from, cost=cost)
        jobs.append(job)
        facts.append({
            "task": task.name, "job": job.key, "source": path.name, "kind": task.kind, "category": task.category,
            "in_official_test": task.name in official,
        })  # fmt: skip
    _check_names(jobs)
    if not jobs:
        said = f"; the first: {invalid[0]['reason']}" if invalid else ""
        raise UserError(f"{', '.join(paths)}: none of {len(files)} files is a task{said}")
    subject = {"recipe": recipe_facts(recipe), "split": split, "tasks": facts, "absent": absent, "invalid": invalid}
    return Sweep(tuple(jobs), subject)


def _choose(paths: Sequence[str], split: str) -> tuple[list[Path], list[str]]:
    """Files, and names that the split has and no folder holds."""
    if not split:
        return find_tasks(paths), []
    full = {one.partition("/")[2] if one.startswith("default/") else one: one for one in SPLITS}
    name = full.get(split, split)
    if name not in SPLITS:
        raise UserError(f"--split {split}: there is no such split; name one of {', '.join(full)}")
    files: list[Path] = []
    absent: list[str] = []
    for root in map(Path, paths):
        if not (root / "splits").is_dir():
            raise UserError(f"{root}: holds no splits/; with --split name the root of an NI-V2 clone")
        held = load_split(root, name, missing_ok=True)
        named = (root / "splits" / f"{name}_tasks.txt").read_text(encoding="utf-8").split()
        files += [root / "tasks" / f"{task}.json" for task in held]
        absent += [task for task in named if task not in set(held)]
    return files, absent


def _official(paths: Iterable[str]) -> set[str]:
    """Names in the official English test split of the clones among the paths."""
    lists = (Path(path) / "splits" / "default" / "test_tasks.txt" for path in paths)
    return {name for one in lists if one.is_file() for name in one.read_text(encoding="utf-8").split()}


def _check_names(jobs: Sequence[Job]) -> None:
    seen: dict[str, str] = {}
    for job in jobs:
        if job.task in seen:
            raise UserError(
                f"{job.source}: holds a task {job.task}, as {seen[job.task]} does; rename one, or leave it out"
            )
        seen[job.task] = job.source


def _cost(task: Task, recipe: Recipe) -> float:
    """Tokens that the engines read and write for it, roughly: what counts is which task takes longer."""
    gold = sum(len(one.input) + len(one.output) for one in task.examples) / _CHARS_A_TOKEN
    per_example = gold / max(1, len(task.examples))
    synthesis, annotation = recipe.synthesis, recipe.annotation
    answers = annotation.num_samples if annotation.mode == "sample" else 1
    row = min(per_example, synthesis.sampling.max_tokens) + answers * min(per_example, annotation.sampling.max_tokens)
    tests = test_instances(task, recipe.evaluation, recipe.seed)
    held = sum(len(one.input) for one in tests) / _CHARS_A_TOKEN + len(tests) * per_example
    return synthesis.num_candidates * (row + 0.1 * gold) + held * (2 + len(recipe.evaluation.controls))
