"""Commands as jobs of a real Ray cluster: dashboard, job server and token, started as a process of its own."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from selfguide import cli
from selfguide.store import leases
from selfguide.submission import name_job

REPO = Path(__file__).parent.parent
SENTIMENT = REPO / "selfguide" / "examples" / "sentiment.json"
RECIPE = """
extends: smoke
engine: {kind: simulated, faults: {hang_after: %d}}
synthesis: {target_rows: null, num_candidates: 160, lag: 16}
finetuning: {simulated_tokens_per_s: 1.0e+6}
evaluation: {controls: []}
cluster: {address: 'ray://elsewhere:10001', limits: {stall_s: 3600}}
"""
"""Its address is not the job's affair: a job joins the cluster that runs it."""
HANGS = RECIPE % 250
"""32 answers of the evaluation, two for each row: it stops with one or two shards of 64 rows on disk, and no more."""
SOUND = RECIPE % 0
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A user's environment, whose RAY_API_SERVER_ADDRESS is the cluster's and who has its token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    ports = free_ports(5)
    user = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}",
    }  # fmt: skip
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "ray-client-server-port")  # fmt: skip
    folder = tempfile.mkdtemp(prefix="sg-", dir="/tmp")  # Ray's sockets want a short path
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1",
        *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)), "--min-worker-port=0",
        "--max-worker-port=0", f"--temp-dir={folder}", "--num-cpus=4", f"--object-store-memory={128 << 20}",
    ]  # fmt: skip
    head = {**user, "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    log = Path(folder) / "head.log"
    with log.open("wb") as out, ExitStack() as stack:
        process = subprocess.Popen(command, env=head, stdout=out, stderr=out, start_new_session=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(end, process)
        wait_until(lambda: answers(user["RAY_API_SERVER_ADDRESS"]), process, log)
        yield user


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def end(process: subprocess.Popen[bytes]) -> None:
    """The head and all that it started: Ray's own farewell takes 20 s."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == 401  # it is up, and asks for the token
    except OSError:
        return False
    raise AssertionError("the cluster asks for no token")


def wait_until(ready: Callable[[], object], process: subprocess.Popen[Any], log: Path) -> None:
    """Until it is so; the process that shall make it so must live."""
    while not ready():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working dir with a task in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(SENTIMENT, folder)
    return folder


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


SelfGuide = Callable[..., Done]


def _call(argv: list[str], work: Path) -> Done:
    os.chdir(work)
    sys.argv, code = ["selfguide", *argv], None
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return Done(int(code or 0), out.getvalue(), err.getvalue())


def open_user(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """A process with this environment, that Ray's client is loaded into once."""
    return ProcessPoolExecutor(1, get_context("spawn"), _become, (environment,))


def _become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def user(environment: dict[str, str]) -> Iterator[ProcessPoolExecutor]:
    with open_user(environment) as user:
        yield user


@pytest.fixture
def selfguide(user: ProcessPoolExecutor, environment: dict[str, str], work: Path) -> SelfGuide:
    """The command by the user; where its environment has `changes`, in a process of its own."""

    def run(*argv: object, **changes: str) -> Done:
        command = list(map(str, argv))
        if not changes:
            return user.submit(_call, command, work).result()
        with open_user(environment | changes) as other:
            return other.submit(_call, command, work).result()

    return run


def listed(selfguide: SelfGuide) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in json.loads(selfguide("jobs", "--json").stdout)}


def synthesized(out: Path) -> dict[int, dict[str, Any]]:
    """Rows of the synthesis that are on disk, in shards or whole."""
    files = [*out.glob("tasks/*/synthesis/*/work/*.parquet"), *out.glob("tasks/*/synthesis/*/rows.parquet")]
    return {row["row"]: row for file in files for row in pq.read_table(file).to_pylist()}


@pytest.mark.timeout(600)  # two runs
def test_a_job_is_followed_joined_stopped_and_resumed_by_the_same_command(
    selfguide: SelfGuide, environment: dict[str, str], work: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = ["run", "sentiment.json", "--recipe", "recipe.yaml", "--out", str(out)]
    name = name_job(command)
    (work / "recipe.yaml").write_text(HANGS)
    with log.open("wb") as file:
        submit = [str(BIN / "selfguide"), "submit", "--", *command]
        first = subprocess.Popen(submit, cwd=work, env=environment, stdout=file, stderr=file)
    wait_until(lambda: "engines ready" in log.read_text() and len(synthesized(out)) >= 64, first, log)
    second = selfguide("submit", "--detach", "--", *command)
    assert (second.returncode, second.stdout) == (0, f"{name}\n")
    assert f"{name}: is at work already" in second.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130
    assert f"{name}: runs on; selfguide logs {name} --follow" in log.read_text()
    job = listed(selfguide)[name]
    assert (job["state"], job["ended"], job["command"]) == ("running", None, " ".join(["selfguide", *command]))

    stopped = selfguide("stop", name)
    assert (stopped.returncode, stopped.stdout) == (0, "")
    assert f"{name}: stopped; the same submit command goes on" in stopped.stderr
    assert selfguide("logs", name, "--follow").returncode == 130
    assert not leases(out), "it was killed, not stopped"
    committed = synthesized(out)
    assert 64 <= len(committed) < 160

    (work / "recipe.yaml").write_text(SOUND)
    resumed = selfguide("submit", "--", *command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{name}-2: submitted" in resumed.stderr
    assert "# SELF-GUIDE report" in resumed.stdout
    final = synthesized(out)
    assert len(final) == 160
    assert all(final[key] == row for key, row in committed.items()), "a committed row was changed"
    events = next(out.glob("tasks/*/synthesis/*/events.jsonl")).read_text().splitlines()
    assert [one["epoch"] for one in map(json.loads, events) if one["event"] == "begin"] == [1, 2]
    states = {key: job["state"] for key, job in listed(selfguide).items()}
    assert (states[name], states[f"{name}-2"]) == ("stopped", "done")


@pytest.mark.timeout(300)
def test_a_job_that_fails_ends_with_its_reason_and_its_exit_code(
    selfguide: SelfGuide, work: Path, tmp_path: Path
) -> None:
    (work / "recipe.yaml").write_text(SOUND.replace("hang_after: 0", "refuse_share: 1"))
    command = ["run", "sentiment.json", "--recipe", "recipe.yaml", "--out", tmp_path / "out"]
    failed = selfguide("submit", "--name", "poor", "--", *command)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    said = failed.stderr.splitlines()[-1]
    assert re.fullmatch(r"selfguide: poor failed: sentiment: .*rows failed in synthesis.*", said)
    job = listed(selfguide)["poor"]
    assert (job["state"], job["exit_code"], f"selfguide: poor failed: {job['reason']}") == ("failed", 1, said)
    table = selfguide("jobs").stdout.splitlines()
    assert [line.split()[:2] for line in table if "poor" in line] == [["poor", "failed"]]
    assert said.removeprefix("selfguide: poor failed: ") in selfguide("logs", "poor").stdout
    assert selfguide("stop", "poor").stderr == "poor: failed already\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "no Ray job server answers (ConnectionError)"),
        ({"RAY_API_SERVER_ADDRESS": "127.0.0.1:8265"}, "is no address of a job server; write the dashboard's"),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, "the cluster wants its own token"),
        ({"RAY_AUTH_MODE": "disabled"}, "the cluster wants its own token"),
    ],
)  # fmt: skip
def test_a_cluster_that_is_not_there_or_asks_for_a_token_is_exit_code_2(
    selfguide: SelfGuide, changes: dict[str, str], said: str
) -> None:
    done = selfguide("jobs", **changes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("selfguide: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_an_address_on_the_command_line_wins_over_the_environment(
    selfguide: SelfGuide, environment: dict[str, str]
) -> None:
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    assert selfguide("jobs", "--address", environment["RAY_API_SERVER_ADDRESS"], **elsewhere).returncode == 0


def test_a_job_that_is_not_there(selfguide: SelfGuide) -> None:
    for verb in (["logs"], ["logs", "--follow"], ["stop"]):
        done = selfguide(*verb, "none")
        assert (done.returncode, done.stderr) == (
            2,
            "selfguide: none: there is no such job; selfguide jobs lists them\n",
        )
