"""The verb `demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from selfguide.cli_options import AsJson, Changes, goes_on, recipe_settings

app = typer.Typer()


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Run folder. The same command goes on where it ended.")
    ] = Path("runs/demo"),
    changes: Changes = [],  # noqa: B006  (typer wants a list)
    as_json: AsJson = False,
) -> None:
    """Run SELF-GUIDE on four small tasks with the embedded student: a few minutes on two CPU cores, no network."""
    from selfguide.nano.demo import demonstrate, show
    from selfguide.progress import ProgressView
    from selfguide.report import write_report

    with goes_on(), ProgressView() as progress:
        found = demonstrate(out, progress, recipe_settings(changes, ""), sys.argv[1:])
    write_report(out)
    typer.echo(json.dumps(found, indent=1)) if as_json else show(found, out / "report.md")
