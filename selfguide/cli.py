"""The command line: thin verbs. Heavy libraries are imported by the verb that needs them, never by `--help`.

Exit codes: 0 done; 1 the task came to no end; 2 a mistake that the user can mend; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from selfguide.errors import TaskFailed, UserError

app = typer.Typer(
    name="selfguide", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="A language model writes, filters and learns from its own training data (SELF-GUIDE, arXiv 2407.12874).",
    epilog="First steps: selfguide run TASK.json --recipe smoke (a random student, a minute on a CPU), then --model.",
)  # fmt: skip

TaskFile = Annotated[
    Path, typer.Argument(help="Task file: NI-V2 JSON, or your own JSON or YAML with instruction and examples.")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe (see `selfguide recipes`) or a YAML file.")
]
ModelPath = Annotated[str, typer.Option("--model", "-m", help="The student: a model folder, a hub name, or `random`.")]
OutFolder = Annotated[
    Path, typer.Option("--out", "-o", help="Run folder. The same command again goes on where it ended.")
]
Changes = Annotated[
    list[str], typer.Option("--set", "-s", help="Change the recipe: --set synthesis.lag=10 (repeatable).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def run(
    task: TaskFile,
    recipe: RecipeName = "default",
    model: ModelPath = "",
    out: OutFolder = Path("runs/latest"),
    changes: Changes = [],  # noqa: B006  (typer wants a list)
    force: Annotated[
        list[str], typer.Option("--force", help="Make a stage anew: synthesis, curation, finetuning, evaluation.")
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Take one task from its instruction to a finetuned adapter and an honest comparison."""
    import asyncio

    from selfguide import api
    from selfguide.progress import ProgressView
    from selfguide.recipefile import load_recipe, parse_change
    from selfguide.tasks import load_task

    settings = dict(map(parse_change, changes)) | ({"model.path": model} if model else {})
    loaded = load_recipe(recipe, settings)
    loaded_task = load_task(task)
    with ProgressView() as progress:
        asyncio.run(api.run(loaded_task, loaded, out, force=force, progress=progress))
    _write_report(out, as_json=as_json)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")], as_json: AsJson = False) -> None:
    """Write report.md and report.json from a run folder's files alone, and print the report."""
    _write_report(folder, as_json=as_json)


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="Show this recipe, whole.")] = "",
    changes: Changes = [],  # noqa: B006
    fields: Annotated[bool, typer.Option("--fields", help="List every key with its default and its meaning.")] = False,
) -> None:
    """List the shipped recipes, show one with all its values, or explain every key."""
    from selfguide.recipefile import describe_fields, load_recipe, parse_change, shipped_recipes

    if fields:
        typer.echo("\n".join(describe_fields()))
    elif name:
        typer.echo(json.dumps(load_recipe(name, dict(map(parse_change, changes))).model_dump(mode="json"), indent=1))
    else:
        for recipe, path in shipped_recipes().items():
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            typer.echo(f"{recipe:10} {first}")


def _write_report(folder: Path, *, as_json: bool) -> None:
    from selfguide.report import write_report

    document, markdown = write_report(folder)
    typer.echo(json.dumps(document, indent=1) if as_json else markdown)


def main() -> None:
    """The console script: the user's mistakes are one line, bugs keep their traceback."""
    from selfguide.text import printable

    try:
        app()
    except UserError as error:
        print(f"selfguide: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except TaskFailed as error:
        print(f"selfguide: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("selfguide: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
