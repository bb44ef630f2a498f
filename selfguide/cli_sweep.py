"""The verb `sweep`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfguide.cli_options import (
    AsJson,
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
    from selfguide.sweep.plan import Sweep

app = typer.Typer()


@app.command()
def sweep(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Task files, folders of them, an NI-V2 clone, patterns.")
    ],
    split: Annotated[
        str, typer.Option("--split", help="Of a clone the tasks of one split: test, train, excluded, xlingual/test.")
    ] = "",
    recipe: RecipeName = "default",
    model: ModelPath = "",
    out: OutFolder = Path("runs/sweep"),
    changes: Changes = [],  # noqa: B006  (typer wants a list)
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    labels_from: LabelsSource = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take many tasks through the method at once, over all engines and trainers of a cluster.

    The same command goes on where it ended, also with other tasks or a changed recipe: what is done already is not done
    again. A task that fails is listed with its reason and does not end the others; the exit code is then 1. With --json
    events are printed as they happen, one a line.
    """
    from selfguide.recipefile import load_recipe
    from selfguide.sweep.plan import plan_sweep

    loaded = load_recipe(recipe, recipe_settings(changes, model))
    planned = plan_sweep(paths, loaded, split=split, labels_from=labels_from)
    _tell_left_out(planned)
    if dry_run:
        _show_plan(planned, out, retry_failed=retry_failed, as_json=as_json)
        return
    from selfguide.errors import TaskFailed
    from selfguide.sweep.session import sweep_all
    from selfguide.sweepview import SweepView

    with goes_on(), SweepView(json=as_json) as view:
        outcomes = sweep_all(planned, loaded, out, hear=view.hear, retry_failed=retry_failed, command=sys.argv[1:])
    _write_report(out, quiet=as_json)
    if failed := [one for one in outcomes if one.state == "failed"]:
        reasons = f"; the first: {failed[0].task}: {failed[0].reason}"
        raise TaskFailed(f"{len(failed)} of {len(outcomes)} tasks failed, --retry-failed tries them again{reasons}")


def _tell_left_out(planned: Sweep) -> None:
    from selfguide.progress import stderr_line

    absent = planned.subject["absent"]
    for one in planned.invalid:
        stderr_line(f"left out: {one['reason']}")
    if absent:
        some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        stderr_line(f"{len(absent)} tasks of the split are absent and left out: {some}")


def _show_plan(planned: Sweep, out: AnyPath, *, retry_failed: bool, as_json: bool) -> None:
    """What the command would do, by the outcomes that are there."""
    from selfguide.sweep.session import settled_states

    states = settled_states(planned, out, retry_failed=retry_failed)
    counts = {name: sum(one == name for one in states.values()) for name in ("done", "failed", "to do")}
    if as_json:
        typer.echo(json.dumps({"out": str(out), **counts, "tasks": states}, indent=1))
        return
    typer.echo(
        f"{len(states):,} tasks: {counts['done']:,} done, {counts['failed']:,} failed, {counts['to do']:,} to do"
    )


def _write_report(out: AnyPath, *, quiet: bool) -> None:
    from selfguide.report import write_report

    _, markdown = write_report(out)
    if not quiet:
        typer.echo(markdown)
