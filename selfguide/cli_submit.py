"""Verbs of a command that runs as a job of a Ray cluster: submit, jobs, logs, stop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import submit as ray_jobs
from selfguide.cli_options import AsJson
from selfguide.errors import TaskFailed, UserError

app = typer.Typer()

Address = Annotated[
    str,
    typer.Option(
        "--address", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="The cluster's dashboard, by http or https."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As `submit` and `jobs` say it.")]


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="-- VERB ARGS...", help="As it would run here.")],
    address: Address = ray_jobs.DEFAULT_ADDRESS,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="Copied to the cluster; the command's relative paths start here.")
    ] = Path("."),
    env: Annotated[list[str], typer.Option("--env", help="K=V in the job's environment (repeatable).")] = [],  # noqa: B006
    runtime_env: Annotated[
        Path | None, typer.Option("--runtime-env", help="Ray's runtime environment, a YAML file: pip, image_uri, ...")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The job's id. [default: made from the command]")] = "",
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Stay, and print the job's log.")] = True,
) -> None:
    """Run a command as a job on a Ray cluster. The same command finds its job again, or goes on where it ended."""
    from selfguide.progress import stderr_line
    from selfguide.submission import check_submission, name_job

    if name and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
        raise UserError(f"--name {name}: write up to 64 letters, digits, '.', '_' and '-'")
    settings, variables = _read_runtime_env(runtime_env), dict(map(_parse_variable, env))
    for notice in check_submission(context.find_root().command.commands, command, working_dir):  # type: ignore[attr-defined]
        stderr_line(f"notice: {notice}")
    with _user_errors():
        client = ray_jobs.connect(address)
        job, new = ray_jobs.begin_job(
            client, name or name_job(command), command, working_dir.resolve(), variables, settings
        )
        stderr_line(f"{job.id}: {'submitted' if new else 'is at work already'}; {_how_to_go_on(job.id, address)}")
        if follow:
            _follow(client, job.id, address)
        else:
            typer.echo(job.id)


@app.command()
def jobs(address: Address = ray_jobs.DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the jobs of selfguide on a Ray cluster, oldest first."""
    from dataclasses import asdict

    from selfguide.tables import make_table, show

    with _user_errors():
        found = ray_jobs.list_jobs(ray_jobs.connect(address))
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in found], indent=1))
    else:
        heads = ("id", "state", "began", "ended", "command", "reason")
        rows = [(job.id, job.state, _clock(job.began), _clock(job.ended), job.command, job.reason) for job in found]
        show(make_table(heads, rows) if rows else "no jobs of selfguide on this cluster")


@app.command()
def logs(
    job_id: JobId,
    address: Address = ray_jobs.DEFAULT_ADDRESS,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; with its exit code.")] = False,
) -> None:
    """Print a job's log."""
    with _user_errors():
        client = ray_jobs.connect(address)
        if follow:
            _follow(client, job_id, address)
        else:
            _print_log(ray_jobs.read_log(client, job_id))


@app.command()
def stop(job_id: JobId, address: Address = ray_jobs.DEFAULT_ADDRESS) -> None:
    """Stop a job as Ctrl-C would; submitted again, it goes on."""
    from selfguide.progress import stderr_line

    with _user_errors():
        job = ray_jobs.stop_job(ray_jobs.connect(address), job_id)
    goes_on = "; the same submit command goes on from here" if job.state == "stopped" else " already"
    stderr_line(f"{job.id}: {job.state}{goes_on}")


def _follow(client: Any, job_id: str, address: str) -> None:
    """Prints the log; ends as the job ends."""
    from selfguide.progress import stderr_line

    try:
        job = ray_jobs.follow_job(client, job_id, _print_log)
    except KeyboardInterrupt:
        stderr_line(f"{job_id}: runs on; {_how_to_go_on(job_id, address)}")
        raise
    _end_as(job)
    stderr_line(f"{job.id}: {job.state}")
    if job.state == "stopped":
        raise typer.Exit(130)


def _end_as(job: ray_jobs.ClusterJob) -> None:
    if job.state == "failed":
        raise (UserError if job.exit_code == 2 else TaskFailed)(f"{job.id} failed: {job.reason}")


def _how_to_go_on(job_id: str, address: str) -> str:
    where = "" if address == ray_jobs.DEFAULT_ADDRESS else f" --address {address}"
    return f"selfguide logs {job_id} --follow{where} shows it, selfguide stop {job_id}{where} ends it"


def _print_log(text: str) -> None:
    """As it is, but for what a terminal would obey."""
    from selfguide.text import printable

    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    print("\n".join("\t".join(map(printable, line.split("\t"))) for line in lines), end="", flush=True)


def _clock(seconds: float | None) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else ""


def _read_runtime_env(path: Path | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or {"working_dir", "excludes"} & content.keys():
        raise UserError(f"--runtime-env {path}: holds keys such as pip and env_vars; --working-dir names the folder")
    return content


def _parse_variable(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise UserError(f"--env {text}: write NAME=VALUE")
    return key, value


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ray_jobs.SubmitError as error:
        raise UserError(str(error)) from None
