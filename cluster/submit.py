"""Ray Jobs: submit a command to a cluster, find it again, follow its log, stop it. Plain functions over Ray's client.

A job has an id made from its command, so the command itself finds it again: no two of one id ever run, and the next
one after an end counts on (`run-1a2b3c4d`, `run-1a2b3c4d-2`). The job server refuses an id that it knows, which
settles who is first where two submit at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
MAX_UPLOAD_BYTES = 100 << 20
"""The head keeps the working dir in memory, and every node fetches it: data belongs on the shared storage."""
_EXCLUDES = (".git", ".venv", "__pycache__", "/runs")
_STOP_WAIT_S = 60
_STOP = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
"""Seconds between SIGTERM and SIGKILL: time to leave shards and leases in order."""
_CONNECT_S, _AGENT_S = 5.0, 60.0
_MAX_DROPS, _RETRY_S, _MAX_RACES = 5, 1.0, 5
_COMMAND_KEY = "selfguide_command"

State = Literal["pending", "running", "done", "failed", "stopped"]
_STATES: dict[str, State] = {
    "PENDING": "pending", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped",
}  # fmt: skip


class SubmitError(Exception):
    """The cluster cannot be reached, or refuses. One line: what, and the remedy."""


@dataclass(frozen=True)
class ClusterJob:
    """A job as the cluster knows it. `exit_code` and `reason` (one line) are there once it has failed."""

    id: str
    state: State
    command: str
    began: float | None
    ended: float | None
    exit_code: int | None
    reason: str | None

    @property
    def at_work(self) -> bool:
        return self.state in ("pending", "running")


def connect(address: str) -> Any:
    """A client of the job server at the dashboard's address. It is sent a token only where it asks for one.

    Raises `SubmitError` within seconds where no server answers.
    """
    import requests

    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"{address}: is no address of a job server; write the dashboard's, such as {DEFAULT_ADDRESS}")
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=_CONNECT_S)
        found = f"HTTP {answer.status_code}"
    except requests.RequestException as error:
        answer, found = None, type(error).__name__
    if answer is None or answer.status_code not in (200, 401, 403):
        raise SubmitError(
            f"{address}: no Ray job server answers ({found}); start Ray with its dashboard (ray start --head, "
            "ray[default]), open a tunnel to it, or name it with --address"
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the environment override the address that it is given
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _explained(address):
        if answer.status_code == 401:
            _use_token()
        return JobSubmissionClient(address)


def uploaded_files(working_dir: Path) -> dict[Path, int]:
    """Path and size in bytes of what Ray would upload: all but .gitignore's, .rayignore's and our own excludes."""
    from ray._private.runtime_env import packaging

    found: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[path] = path.stat().st_size

    excludes = [packaging._get_excludes(working_dir, list(_EXCLUDES))]
    heeded = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    quiet = logging.getLogger(f"{__name__}.upload")
    packaging._dir_travel(working_dir, excludes, note, include_gitignore=heeded, logger=quiet)
    return found


def begin_job(
    client: Any,
    name: str,
    args: Sequence[str],
    working_dir: Path,
    env: Mapping[str, str],
    runtime_env: Mapping[str, Any],
) -> tuple[ClusterJob, bool]:
    """Submits `selfguide ARGS`; where a job of this name is at work, returns that one. The flag: it is new.

    The job joins the cluster that runs it, whatever address its recipe names. `runtime_env` is Ray's.
    """
    verb, *rest = args
    command = shlex.join(["selfguide", *args])
    entrypoint = shlex.join(["exec", "selfguide", verb, "--set", "cluster.address=auto", *rest])
    environment = {
        **runtime_env,
        "working_dir": str(working_dir),
        "excludes": [*_EXCLUDES],
        "env_vars": {**_STOP, **runtime_env.get("env_vars", {}), **env},
    }
    for _ in range(_MAX_RACES):
        earlier = [job for job in _all_jobs(client) if re.fullmatch(rf"{re.escape(name)}(-\d+)?", job.id)]
        for job in earlier:
            if job.at_work and job.command != command:
                raise SubmitError(f"{job.id}: is at work on another command ({job.command}); choose another --name")
            if job.at_work:
                return job, False
        new = f"{name}-{len(earlier) + 1}" if earlier else name
        with _explained(client.get_address()):
            try:
                _submit(
                    client, entrypoint=entrypoint, submission_id=new, runtime_env=environment,
                    metadata={_COMMAND_KEY: command},
                )  # fmt: skip
            except RuntimeError as error:
                if "already exists" in str(error):  # somebody was faster
                    continue
                raise
        return find_job(client, new), True
    raise SubmitError(f"{name}: others submit it at the same time; choose another --name")


def _submit(client: Any, **job: Any) -> None:
    """A head that has only just started has nobody yet who takes jobs."""
    until = time.monotonic() + _AGENT_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(_RETRY_S)


def list_jobs(client: Any) -> list[ClusterJob]:
    """The jobs that run selfguide, oldest first, those of other submitters (KubeRay's) too."""
    return [job for job in _all_jobs(client) if job.command.removeprefix("exec ").startswith("selfguide ")]


def _all_jobs(client: Any) -> list[ClusterJob]:
    with _explained(client.get_address()):
        jobs = [_read_job(one) for one in client.list_jobs() if one.submission_id]
    return sorted(jobs, key=lambda job: job.began or 0.0)


def find_job(client: Any, job_id: str) -> ClusterJob:
    with _explained(client.get_address(), job_id):
        return _read_job(client.get_job_info(job_id))


def read_log(client: Any, job_id: str) -> str:
    with _explained(client.get_address(), job_id):
        return str(client.get_job_logs(job_id))


def follow_job(client: Any, job_id: str, write: Callable[[str], None]) -> ClusterJob:
    """Hands the log to `write` as it grows, and returns the job once it has ended. A dropped connection is taken up
    again where it broke off; `SubmitError` where the server stays away."""
    find_job(client, job_id)
    return asyncio.run(_follow(client, job_id, write))


async def _follow(client: Any, job_id: str, write: Callable[[str], None]) -> ClusterJob:
    from aiohttp import ClientError

    shown = drops = 0
    while True:
        seen = 0
        try:
            async for chunk in client.tail_job_logs(job_id):  # from the beginning, each time
                new, seen = chunk[max(0, shown - seen) :], seen + len(chunk)
                if new:
                    write(new)
                    shown, drops = seen, 0
            job = find_job(client, job_id)
            if not job.at_work:
                return job
        except (RuntimeError, OSError, ClientError, SubmitError) as error:
            drops += 1
            if drops > _MAX_DROPS:
                raise SubmitError(f"{job_id}: its server does not answer any more ({error})") from None
        await asyncio.sleep(_RETRY_S)


def stop_job(client: Any, job_id: str) -> ClusterJob:
    """Stops the job as Ctrl-C would, and returns it once it has ended. One that has ended stays as it is."""
    until = time.monotonic() + 2 * _STOP_WAIT_S
    with _explained(client.get_address(), job_id):
        client.stop_job(job_id)
    while (job := find_job(client, job_id)).at_work:
        if time.monotonic() > until:
            raise SubmitError(f"{job_id}: does not end; look at its log, and stop it again")
        time.sleep(0.2)
    return job


def _use_token() -> None:
    """As `ray.init` does where it joins a cluster: this machine's token, unless RAY_AUTH_MODE forbids it."""
    from ray._private.authentication import authentication_token_setup

    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


@contextmanager
def _explained(address: str, job_id: str = "") -> Iterator[None]:
    """Ray's errors as `SubmitError`, one line each."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise SubmitError(
            f"{address}: the cluster wants its own token; put it into ~/.ray/auth_token, or name its file in "
            "RAY_AUTH_TOKEN_PATH, and leave RAY_AUTH_MODE unset or token"
        ) from None
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        if job_id and "does not exist" in str(error):
            raise SubmitError(f"{job_id}: there is no such job; selfguide jobs lists them") from None
        raise SubmitError(f"{address}: {_last_line(str(error))}") from error


def _read_job(details: Any) -> ClusterJob:
    state = _STATES[str(details.status)]
    failed = state == "failed"
    command = (details.metadata or {}).get(_COMMAND_KEY, details.entrypoint)
    return ClusterJob(
        details.submission_id, state, command, _seconds(details.start_time), _seconds(details.end_time),
        details.driver_exit_code if failed else None, _reason(details) if failed else None,
    )  # fmt: skip


def _reason(details: Any) -> str:
    """What selfguide itself said last, or else the last line of Ray's account."""
    if details.driver_exit_code == 127:
        return "the cluster has no selfguide on its PATH; install it on every node and start Ray from that environment"
    lines = str(details.message).splitlines()
    own = [line.removeprefix("selfguide: ") for line in lines if line.startswith("selfguide: ")]
    return own[-1] if own else _last_line(str(details.message))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason is known")


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
