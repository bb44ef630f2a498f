"""The verb `replicate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfguide.cli_options import (
    AsJson,
    Assume,
    Changes,
    DryRun,
    LabelsSource,
    ModelPath,
    OutFolder,
    RecipeName,
    goes_on,
    recipe_settings,
)

if TYPE_CHECKING:
    from engines.files import AnyPath
    from selfguide.config import Recipe
    from selfguide.replication import Chosen

app = typer.Typer()


@app.command()
def replicate(
    folder: Annotated[
        Path, typer.Argument(metavar="[NI_DIR]", help="A clone of NI-V2, as `selfguide data ni-v2` makes it.")
    ] = Path("natural-instructions"),
    only: Annotated[
        list[str], typer.Option("--only", help="Of the authors' tasks this one, by number: 1516 (repeatable).")
    ] = [],  # noqa: B006  (typer wants a list)
    recipe: RecipeName = "paper",
    model: ModelPath = "",
    out: OutFolder = Path("runs/replication"),
    changes: Changes = [],  # noqa: B006
    dry_run: DryRun = False,
    assume: Assume = [],  # noqa: B006
    labels_from: LabelsSource = None,
    as_json: AsJson = False,
) -> None:
    """Run the SELF-GUIDE authors' own tasks, by their split and metrics, and report beside their published figures.

    Without --model, with their student.
    """
    from selfguide.progress import stderr_line
    from selfguide.recipefile import load_recipe
    from selfguide.replication import choose_tasks, settings

    loaded = load_recipe(recipe, settings(recipe_settings(changes, model)))
    chosen = choose_tasks(folder, only, labels_from)
    if chosen.absent:
        stderr_line(f"absent from {folder}, and left out: {', '.join(chosen.absent)}")
    if dry_run:
        _estimate(chosen, loaded, out, assume, as_json=as_json)
    else:
        _run(chosen, loaded, out, as_json=as_json)


def _estimate(chosen: Chosen, recipe: Recipe, out: AnyPath, assume: list[str], *, as_json: bool) -> None:
    from selfguide.estimate import document_tasks, parse_assumptions, plan_run, show_tasks

    assumed = parse_assumptions(assume or ["defaults"])
    estimates = [plan_run(task, recipe, out, assumed=assumed) for task in chosen.tasks.values()]
    if as_json:
        typer.echo(json.dumps({**document_tasks(estimates, out), "absent": list(chosen.absent)}, indent=1))
    else:
        show_tasks(estimates, out)


def _run(chosen: Chosen, recipe: Recipe, out: AnyPath, *, as_json: bool) -> None:
    import asyncio

    from selfguide.errors import TaskFailed
    from selfguide.progress import ProgressView, stderr_line
    from selfguide.replication import replicate
    from selfguide.report import write_report

    with goes_on(), ProgressView() as progress:
        running = replicate(chosen, recipe, out, progress=progress, say=stderr_line, command=sys.argv[1:])
        failed = asyncio.run(running)
    document, markdown = write_report(out)
    typer.echo(json.dumps(document, indent=1) if as_json else markdown)
    if failed:
        names = ", ".join(failed)
        raise TaskFailed(f"{len(failed)} of {len(chosen.tasks)} tasks failed ({names}); the same command tries again")
