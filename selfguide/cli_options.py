"""Arguments and options that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engines.files import locate

TaskFile = Annotated[
    Path, typer.Argument(help="Task file: NI-V2 JSON, or your own JSON or YAML with instruction and examples.")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe (see `selfguide recipes`) or a YAML file.")
]
ModelPath = Annotated[str, typer.Option("--model", "-m", help="The student: a folder, a hub name, `nano` or `random`.")]
OutFolder = Annotated[
    Any,  # Path | Url, of which typer would make a Path
    typer.Option(
        "--out", "-o", parser=locate, metavar="FOLDER_OR_URL",
        help="Run folder, or s3://bucket/folder, gs://bucket/folder. The same command again goes on where it ended.",
    ),
]  # fmt: skip
RunFolder = Annotated[Any, typer.Argument(parser=locate, metavar="FOLDER_OR_URL", help="A run folder.")]
Changes = Annotated[
    list[str], typer.Option("--set", "-s", help="Change the recipe: --set synthesis.lag=10 (repeatable).")
]
TaskKind = Annotated[
    Literal["classification", "generation"] | None,
    typer.Option("--kind", help="What the tasks are, whatever their files say."),
]
LabelsSource = Annotated[
    Literal["examples", "task", "instances"] | None,
    typer.Option("--labels-from", help="Where labels come from; instances are the test answers, which is reported."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Assume = Annotated[
    list[str],
    typer.Option(
        "--assume", help="With --dry-run: NAME=VALUE for what is not measured yet, such as params=7e9; or `defaults`."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@contextmanager
def goes_on() -> Iterator[None]:
    """For verbs that resume: whoever stops one is told so, once the progress is off the screen."""
    try:
        yield
    except KeyboardInterrupt:
        print("selfguide: stopped; the same command goes on from here", file=sys.stderr)
        raise


def recipe_settings(changes: list[str], model: str) -> dict[str, Any]:
    """The changes to a recipe that `--set` and `--model` ask for."""
    from selfguide.recipefile import parse_change

    return dict(map(parse_change, changes)) | ({"model.path": model} if model else {})
