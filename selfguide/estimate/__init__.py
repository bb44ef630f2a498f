"""What a run would do, before it starts: which stages are done, and what the others take in rows, tokens, bytes, time.

Prompts are rendered and counted for real. Answers are bounded by `max_tokens`; what is expected of them, and how fast
they come, is known from what the run folder holds of the same student. Without that it is called unknown, or, where
that is asked for, reckoned from assumptions, which are printed. So is a student that is not on this machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from selfguide.estimate.assumed import Assumptions, parse_assumptions
from selfguide.estimate.plan import Plan, Planner
from selfguide.estimate.shown import Estimate, document, document_tasks, show_plans, show_tasks

if TYPE_CHECKING:
    from engines.files import AnyPath
    from selfguide.config import Recipe
    from selfguide.tasks import Task

__all__ = [
    "Assumptions",
    "Estimate",
    "Plan",
    "document",
    "document_tasks",
    "parse_assumptions",
    "plan_run",
    "show_plans",
    "show_tasks",
]


def plan_run(
    task: Task, recipe: Recipe, out: AnyPath, force: Iterable[str] = (), assumed: Assumptions | None = None
) -> Estimate:
    """The stages of `selfguide run` with these arguments, in order; those in `force` count as not done.

    `assumed` stands in for what the run folder does not tell. A hub name that is not on this machine is planned by its
    size alone, its name's or that of `assumed`. Starts nothing, fetches no model, writes nothing into `out`. Raises the
    `UserError`s that the run would begin with.
    """
    from engines.models import find_model, is_hub_name
    from selfguide.api import check_prompts, check_stage_names, idle_run, load_student
    from selfguide.estimate.assumed import stand_in
    from selfguide.sizes import read_size
    from selfguide.store import RunStore

    check_stage_names(force := tuple(force))
    store, model = RunStore(out, create=False), recipe.model
    absent = is_hub_name(model.path) and find_model(model.path, model.revision) is None
    if absent:
        assumed = (assumed or Assumptions()).for_size(_size_of_absent(model.path, assumed))
        student, size = stand_in(recipe, assumed)
    else:
        student = load_student(recipe)
        size = read_size(Path(student.folder))
        assumed = assumed and assumed.for_size(size.num_params)
    run = idle_run(task, recipe, student, store)
    check_prompts(task, recipe, run.prompts)
    plans = Planner(run, store, size, frozenset(force), assumed).plan()
    return Estimate(task.name, plans, assumed, model.path if absent else None)


def _size_of_absent(model: str, assumed: Assumptions | None) -> float:
    """Parameters of a student that is not here; raises `UserError` where nothing says them."""
    from selfguide.errors import UserError
    from selfguide.estimate.assumed import size_by_name

    params = (assumed.params if assumed else None) or size_by_name(model)
    if params is None:
        raise UserError(
            f"{model}: not on this machine, and a dry run fetches nothing: hf download {model} does, or say how large "
            "it is, for example --assume params=7e9"
        )
    return params
