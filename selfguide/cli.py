"""The command line: thin verbs. Heavy libraries are imported by the verb that needs them, never by `--help`.

Exit codes: 0 done; 1 the task came to no end; 2 a mistake that the user can mend; 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from engines.files import AnyPath
from engines.tokenizer import spare_pytorch
from selfguide import cli_checks, cli_demo, cli_replicate, cli_search, cli_submit, cli_sweep
from selfguide.cli_options import (
    AsJson,
    Assume,
    Changes,
    DryRun,
    LabelsSource,
    ModelPath,
    OutFolder,
    RecipeName,
    RunFolder,
    TaskFile,
    TaskKind,
    goes_on,
    recipe_settings,
)
from selfguide.errors import TaskFailed, UserError

app = typer.Typer(
    name="selfguide", invoke_without_command=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="A language model writes, filters and learns from its own training data (SELF-GUIDE, arXiv 2407.12874).",
    epilog="Without a verb, selfguide says what to do next here.",
)  # fmt: skip

app.add_typer(cli_demo.app)
app.add_typer(cli_checks.app)
app.add_typer(cli_sweep.app)
app.add_typer(cli_replicate.app)
app.add_typer(cli_search.app)
app.add_typer(cli_submit.app)


@app.callback()
def begin(context: typer.Context) -> None:
    """Without a verb: the help, and what to do next here."""
    if context.invoked_subcommand is None:
        from selfguide.nextstep import next_step
        from selfguide.text import printable

        typer.echo("\n".join([context.get_help(), "", *map(printable, next_step(Path.cwd()))]))


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
    dry_run: DryRun = False,
    assume: Assume = [],  # noqa: B006
    kind: TaskKind = None,
    labels_from: LabelsSource = None,
    as_json: AsJson = False,
) -> None:
    """Take one task from its instruction to a finetuned adapter and an honest comparison."""
    import asyncio

    from selfguide.recipefile import load_recipe
    from selfguide.tasks import load_task

    loaded = load_recipe(recipe, recipe_settings(changes, model))
    loaded_task = load_task(task, kind=kind, labels_from=labels_from)
    if dry_run:
        from selfguide.estimate import document, parse_assumptions, plan_run, show_plans

        estimate = plan_run(loaded_task, loaded, out, force, parse_assumptions(assume))
        typer.echo(json.dumps(document(estimate, out), indent=1)) if as_json else show_plans(estimate, out)
        return
    from selfguide import api
    from selfguide.progress import ProgressView

    with goes_on(), ProgressView() as progress:
        asyncio.run(api.run(loaded_task, loaded, out, force=force, progress=progress, command=sys.argv[1:]))
    _write_report(out, as_json=as_json)


@app.command()
def validate(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Task files, folders of them, an NI-V2 clone, patterns.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Hold the tasks against this recipe too.")] = "",
    model: ModelPath = "",
    kind: TaskKind = None,
    labels_from: LabelsSource = None,
    every: Annotated[bool, typer.Option("--all", help="List every task, however many there are.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say of each task whether it loads and what is odd about it; with a student, whether its prompts fit."""
    from dataclasses import asdict

    from selfguide import validation
    from selfguide.recipefile import load_recipe

    loaded = load_recipe(recipe or "default", {"model.path": model} if model else {}) if recipe or model else None
    verdicts = validation.validate(paths, kind=kind, labels_from=labels_from, recipe=loaded)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in verdicts], indent=1))
    else:
        validation.show_verdicts(verdicts, every=every)
    if validation.num_errors(verdicts):
        raise typer.Exit(2)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A row a line: task, prediction, references.")],
    tasks: Annotated[Path | None, typer.Option("--tasks", help="Task files, for categories and languages.")] = None,
    gpt2: Annotated[
        str,
        typer.Option(
            "--gpt2", help="GPT-2's tokenizer, a folder or openai-community/gpt2, for other languages' ROUGE-L."
        ),
    ] = "",
    authors: Annotated[bool, typer.Option("--authors", help="Add the SELF-GUIDE authors' own metrics.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score predictions with the official metrics: exact match and ROUGE-L, by task, by category and over all."""
    from selfguide import scoring
    from selfguide.gpt2 import load_gpt2
    from selfguide.progress import stderr_line

    tokenizer = load_gpt2(gpt2) if gpt2 else None
    document = scoring.score_file(file, tasks, tokenizer, authors=authors)
    for notice in document["notices"]:
        stderr_line(f"notice: {notice}")
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        scoring.show_scores(document)


data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Fetch public collections of tasks.")
app.add_typer(data, name="data")


@data.command("ni-v2")
def ni_v2(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the clone is made, or goes on.")],
    url: Annotated[str, typer.Option("--from", help="A mirror. [default: allenai/natural-instructions]")] = "",
    commit: Annotated[str, typer.Option("--commit", help="40 hex digits, a tag or a branch. [default: pinned]")] = "",
    as_json: AsJson = False,
) -> None:
    """Fetch one commit of Super-NaturalInstructions (some gigabytes), and say what its licences are."""
    from selfguide import nidata

    clone = nidata.fetch_clone(folder, url or nidata.URL, commit or nidata.COMMIT)
    if as_json:
        typer.echo(json.dumps(nidata.document(clone), indent=1))
    else:
        nidata.show_clone(clone)


@app.command()
def report(folder: RunFolder, as_json: AsJson = False) -> None:
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


def _write_report(folder: AnyPath, *, as_json: bool) -> None:
    from selfguide.report import write_report

    document, markdown = write_report(folder)
    typer.echo(json.dumps(document, indent=1) if as_json else markdown)


def _stdout_is_lost() -> bool:
    """Whether standard output takes nothing more: its disk is full, its reader is gone. What is left is thrown away."""
    try:
        print(flush=True)  # flushing alone tells nothing where it is not buffered
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _listen() -> None:
    """SIGTERM, by which schedulers end jobs, does as Ctrl-C does: it cancels what runs, and leases are given back.

    asyncio sees to that only where Ctrl-C is heard: a script may have it ignored, and Ray has it blocked for its jobs.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _stop)


def _stop(*_: object) -> None:
    """Once: whoever sends it may send it again while we clear up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.raise_signal(signal.SIGINT)


def main() -> None:
    """The console script: the user's mistakes are one line, bugs keep their traceback."""
    from selfguide.text import printable

    spare_pytorch()
    if threading.current_thread() is threading.main_thread():
        _listen()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"selfguide: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if not _stdout_is_lost():
            raise
        print(f"selfguide: standard output cannot be written ({error.strerror}); make room for it", file=sys.stderr)
        sys.exit(2)
    except TaskFailed as error:
        print(f"selfguide: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
