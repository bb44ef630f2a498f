"""The verb `search`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfguide.cli_options import (
    AsJson,
    Changes,
    DryRun,
    LabelsSource,
    ModelPath,
    OutFolder,
    RecipeName,
    TaskKind,
    goes_on,
    recipe_settings,
)

if TYPE_CHECKING:
    from selfguide.search import Search

app = typer.Typer()


@app.command()
def search(
    paths: Annotated[list[str], typer.Argument(metavar="TASK...", help="Held-in tasks: files, folders, patterns.")],
    grid: Annotated[
        str, typer.Option("--grid", "-g", help="authors, authors-full, or a YAML file of keys and values to try.")
    ] = "authors",
    recipe: RecipeName = "paper",
    model: ModelPath = "",
    out: OutFolder = Path("runs/search"),
    changes: Changes = [],  # noqa: B006  (typer wants a list)
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    dry_run: DryRun = False,
    kind: TaskKind = None,
    labels_from: LabelsSource = None,
    as_json: AsJson = False,
) -> None:
    """Find the recipe whose worst gain over tasks is the best, on validation rows; one for each kind of task."""
    from selfguide.grid import read_grid
    from selfguide.progress import stderr_line
    from selfguide.recipefile import load_recipe
    from selfguide.search import Search, notices, plan_search
    from selfguide.tasks import find_tasks, load_task

    loaded = load_recipe(recipe, recipe_settings(changes, model))
    tasks = [load_task(path, kind=kind, labels_from=labels_from) for path in find_tasks(paths)]
    wanted = Search(tasks, loaded, recipe, read_grid(grid))
    for notice in notices(wanted):
        stderr_line(f"notice: {notice}")
    if dry_run:
        plan = plan_search(wanted, out)
        typer.echo(json.dumps(plan, indent=1)) if as_json else _show_plan(plan)
    else:
        _run(wanted, out, retry_failed=retry_failed, as_json=as_json)


def _show_plan(plan: Mapping[str, Any]) -> None:
    from selfguide.sizes import readable_bytes
    from selfguide.tables import make_table, show

    heads = {
        "task": "task", "kind": "kind", "n": "rows", "points": "points", "syntheses": "syntheses", "done": "done",
        "trainings": "trainings", "evaluations": "evaluations",
    }  # fmt: skip
    rows = [[*(line[key] for key in heads), readable_bytes(line["weights_bytes"])] for line in plan["tasks"]]
    total = readable_bytes(sum(line["weights_bytes"] for line in plan["tasks"]))
    show(make_table([*heads.values(), "weights"], rows), f"{total} of weights on disk in all")


def _run(wanted: Search, out: Path, *, retry_failed: bool, as_json: bool) -> None:
    import asyncio

    from selfguide.errors import TaskFailed
    from selfguide.search import search_tasks
    from selfguide.sweepview import SweepView

    with goes_on(), SweepView() as view:
        searching = search_tasks(wanted, out, hear=view.hear, retry_failed=retry_failed, command=sys.argv[1:])
        document = asyncio.run(searching)
    typer.echo(json.dumps(document, indent=1) if as_json else (out / "search.md").read_text(encoding="utf-8"))
    if lost := [one["kind"] for one in document["kinds"] if one["winner"] is None]:
        raise TaskFailed(f"no grid point came to an end on all {' or '.join(lost)} tasks; {out / 'search.md'} says why")
