"""Verbs that look before a run, or at what a run made: doctor, preview, evaluate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from selfguide.cli_options import (
    AsJson,
    Changes,
    LabelsSource,
    ModelPath,
    OutFolder,
    RecipeName,
    TaskFile,
    TaskKind,
    goes_on,
    recipe_settings,
)

app = typer.Typer()


@app.command()
def doctor(
    recipe: RecipeName = "default",
    model: ModelPath = "",
    out: OutFolder = Path("runs/latest"),
    changes: Changes = [],  # noqa: B006  (typer wants a list)
    as_json: AsJson = False,
) -> None:
    """Say in seconds what this machine has, what the recipe needs, and what is wrong; exit code 2 for an error."""
    from dataclasses import asdict

    from selfguide.doctor import examine, show_findings
    from selfguide.recipefile import load_recipe

    findings = examine(load_recipe(recipe, recipe_settings(changes, model)), out)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in findings], indent=1))
    else:
        show_findings(findings)
    if any(one.level == "error" for one in findings):
        raise typer.Exit(2)


@app.command()
def preview(
    task: TaskFile,
    recipe: RecipeName = "default",
    model: ModelPath = "",
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, max=64, help="The first so many rows of a run.")] = 5,
    changes: Changes = [],  # noqa: B006
    kind: TaskKind = None,
    labels_from: LabelsSource = None,
    as_json: AsJson = False,
) -> None:
    """Show a few rows on real engines: prompts as sent, answers, parsing, every filter's verdict. Keeps nothing."""
    import asyncio

    from selfguide.preview import preview_task, show_preview
    from selfguide.progress import ProgressView
    from selfguide.recipefile import load_recipe
    from selfguide.tasks import load_task

    loaded = load_recipe(recipe, recipe_settings(changes, model))
    loaded_task = load_task(task, kind=kind, labels_from=labels_from)
    with ProgressView() as progress:
        document = asyncio.run(preview_task(loaded_task, loaded, rows, progress))
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        show_preview(document)


@app.command()
def evaluate(
    paths: Annotated[list[str], typer.Argument(metavar="TASK...", help="Task files, folders of them, patterns.")],
    model: ModelPath = "",
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="A LoRA in PEFT's layout, from here or from elsewhere.")
    ] = None,
    recipe: RecipeName = "default",
    out: OutFolder = Path("runs/evaluations"),
    changes: Changes = [],  # noqa: B006
    kind: TaskKind = None,
    labels_from: LabelsSource = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on tasks, and with an adapter of it too, by the recipe's evaluation section."""
    import asyncio

    from selfguide.progress import ProgressView
    from selfguide.recipefile import load_recipe
    from selfguide.scorecard import evaluate_tasks, show_scorecard
    from selfguide.tasks import find_tasks, load_task

    loaded = load_recipe(recipe, recipe_settings(changes, model))
    tasks = [load_task(path, kind=kind, labels_from=labels_from) for path in find_tasks(paths)]
    with goes_on(), ProgressView() as progress:
        scoring = evaluate_tasks(tasks, loaded, out, adapter, progress=progress, command=sys.argv[1:])
        document = asyncio.run(scoring)
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        show_scorecard(document)
