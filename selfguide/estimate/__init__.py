"""What a run would do, before it starts: which stages are done, and what the others take in rows, tokens, bytes, time.

Prompts are rendered and counted for real. Answers are bounded by `max_tokens`; what is expected of them, and how fast
they come, is known only from what the run folder holds of the same student, and called unknown without that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from selfguide.estimate.plan import Plan, Planner
from selfguide.estimate.shown import document, show_plans

if TYPE_CHECKING:
    from selfguide.config import Recipe
    from selfguide.tasks import Task

__all__ = ["Plan", "document", "plan_run", "show_plans"]


def plan_run(task: Task, recipe: Recipe, out: Path, force: Iterable[str] = ()) -> list[Plan]:
    """The stages of `selfguide run` with these arguments, in order; those in `force` count as not done.

    Starts nothing, fetches no model, writes nothing into `out`. Raises the `UserError`s that the run would begin with.
    """
    from engines.models import find_model, is_hub_name
    from selfguide.api import check_prompts, check_stage_names, idle_run, load_student
    from selfguide.errors import UserError
    from selfguide.sizes import read_size
    from selfguide.store import RunStore

    check_stage_names(force := tuple(force))
    model = recipe.model.path
    if is_hub_name(model) and find_model(model, recipe.model.revision) is None:
        raise UserError(f"{model}: not on this machine, and a dry run fetches nothing: hf download {model} does")
    student, store = load_student(recipe), RunStore(out, create=False)
    run = idle_run(task, recipe, student, store)
    check_prompts(task, recipe, run.prompts)
    return Planner(run, store, read_size(Path(student.folder)), frozenset(force)).plan()
