"""Commands before they are submitted, and the job server's client, without a server."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

from cluster import submit as ray_jobs
from selfguide import cli
from selfguide.errors import UserError
from selfguide.submission import check_submission

SENTIMENT = Path(cli.__file__).parent / "examples" / "sentiment.json"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working dir with a task in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(SENTIMENT, folder)
    return folder


GOOD = ["run", "sentiment.json", "--recipe", "smoke", "--out", "/shared/out"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nonsense"], "nonsense: is nothing to submit; choose run"),
        (["run"], "run: Missing argument 'task'"),
        ([*GOOD, "--nonsense"], "run: No such option: --nonsense"),
        ([*GOOD, "--kind", "odd"], "Invalid value for '--kind'"),
        ([*GOOD, "--set", "synthesis.lagg=1"], "synthesis.lagg: no such key; did you mean lag?"),
        ([*GOOD, "--recipe", "smok"], "did you mean smoke?"),
        ([*GOOD, "--recipe", "paper"], "no student: name one with --model"),
        ([*GOOD, "--out", "runs/mine"], "--out runs/mine: is relative"),
        (GOOD[:-2], "--out runs/latest: is relative"),
        (["run", "none.json", *GOOD[2:]], "none.json: matches no file"),
        (["run", "../outside.json", *GOOD[2:]], "../outside.json: lies outside the working dir"),
        (["run", "ignored/sentiment.json", *GOOD[2:]], "would not be uploaded"),
        (["run", "runs/sentiment.json", *GOOD[2:]], "would not be uploaded"),
        (["run", "broken.json", *GOOD[2:]], "broken.json"),
        (["evaluate", "*.json", *GOOD[2:]], "broken.json"),
    ],
)  # fmt: skip
def test_a_command_that_cannot_succeed_is_refused_before_a_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, argv: list[str], said: str
) -> None:
    (work / "ignored").mkdir()
    (work / "runs").mkdir()
    (work / ".gitignore").write_text("ignored/\n")
    (work / "broken.json").write_text("{}")
    for place in (work.parent / "outside.json", work / "ignored" / SENTIMENT.name, work / "runs" / SENTIMENT.name):
        shutil.copy(SENTIMENT, place)
    monkeypatch.chdir(work)
    monkeypatch.setattr(ray_jobs, "connect", lambda address: pytest.fail("a server was asked"))
    monkeypatch.setattr(sys, "argv", ["selfguide", "submit", "--", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def verbs() -> Any:
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def test_what_only_the_cluster_can_have_is_said_not_refused(work: Path) -> None:
    assert check_submission(verbs(), GOOD, work) == []
    assert check_submission(verbs(), ["run", "/none/on/this/machine.json", *GOOD[2:]], work) == []
    task = str(work / SENTIMENT.name)
    assert check_submission(verbs(), ["run", task, *GOOD[2:]], work) == [
        f"{task}: is not uploaded; the cluster must have it at this path"
    ]


def test_no_gigabyte_is_uploaded(work: Path) -> None:
    for folder in (".git", ".venv", "runs", "data"):
        (work / folder).mkdir()
        with (work / folder / "large.bin").open("wb") as file:
            file.truncate(ray_jobs.MAX_UPLOAD_BYTES)  # a hole: no block of the disk is taken
    with pytest.raises(UserError, match=r"100 MiB would be uploaded, .*largest: data/large.bin, 100 MiB"):
        check_submission(verbs(), GOOD, work)
    (work / ".rayignore").write_text("data\n")
    assert check_submission(verbs(), GOOD, work) == []
    assert sorted(path.name for path in ray_jobs.uploaded_files(work)) == [".rayignore", "sentiment.json"]


class Server:
    """The job server's client, in memory."""

    def __init__(self, *known: SimpleNamespace) -> None:
        self.known = {one.submission_id: one for one in known}
        self.faster: list[SimpleNamespace] = []
        self.logs: list[list[str | Exception]] = []
        self.refusals = 0

    def get_address(self) -> str:
        return "http://head:8265"

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.known.values())

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return self.known[job_id]

    def submit_job(self, *, submission_id: str, entrypoint: str, metadata: dict[str, str], runtime_env: Any) -> None:
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        for other in self.faster:
            self.known[other.submission_id] = other
        self.faster = []
        if submission_id in self.known:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.known[submission_id] = details(submission_id, "PENDING", metadata["selfguide_command"])
        self.known[submission_id].sent = (entrypoint, runtime_env)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for chunk in self.logs.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


def details(job_id: str, status: str, command: str = "selfguide run x") -> SimpleNamespace:
    return SimpleNamespace(
        submission_id=job_id, status=status, metadata={"selfguide_command": command}, entrypoint="", message="",
        start_time=1000, end_time=None, driver_exit_code=None,
    )  # fmt: skip


def begin(server: Server, *args: str) -> tuple[str, bool]:
    job, new = ray_jobs.begin_job(server, "job", args, Path("/work"), {"K": "V"}, {"env_vars": {"A": "B"}})
    return job.id, new


def test_of_two_that_submit_at_once_one_is_first_and_the_other_follows_it() -> None:
    server = Server(details("job", "SUCCEEDED"), details("job-2", "FAILED"), details("job-x", "RUNNING"))
    server.faster = [details("job-3", "RUNNING")]
    assert begin(server, "run", "x") == ("job-3", False)
    server.known["job-3"].status = "STOPPED"
    assert begin(server, "run", "x") == ("job-4", True)
    with pytest.raises(ray_jobs.SubmitError, match=r"job-4: is at work on another command \(selfguide run x\)"):
        begin(server, "run", "y")


def test_jobs_of_others_are_not_listed_and_keep_their_ids() -> None:
    foreign = details("job", "RUNNING", "python train.py")
    server = Server(foreign, details("kube", "RUNNING", "selfguide sweep x"))
    assert [job.id for job in ray_jobs.list_jobs(server)] == ["kube"]
    with pytest.raises(ray_jobs.SubmitError, match=r"job: is at work on another command \(python train.py\)"):
        begin(server, "run", "x")
    foreign.status = "SUCCEEDED"
    assert begin(server, "run", "x") == ("job-2", True)


def test_a_head_that_has_only_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_RETRY_S", 0.0)
    server = Server()
    server.refusals = 7
    assert begin(server, "run", "x") == ("job", True)
    monkeypatch.setattr(ray_jobs, "_AGENT_S", -1.0)
    gone = Server()
    gone.refusals = 1
    with pytest.raises(ray_jobs.SubmitError, match="No available agent"):
        begin(gone, "run", "x")


def test_a_job_is_sent_with_its_cluster_its_folder_and_its_environment() -> None:
    server = Server()
    begin(server, "run", "a b.json", "--out", "/x")
    entrypoint, environment = server.known["job"].sent
    assert entrypoint == "exec selfguide run --set cluster.address=auto 'a b.json' --out /x"
    assert (environment["working_dir"], {"K": "V", "A": "B"}.items() <= environment["env_vars"].items()) == (
        "/work",
        True,
    )


def test_a_log_whose_connection_drops_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_RETRY_S", 0.0)
    server = Server(details("job", "RUNNING"))
    server.logs = [
        ["first ", "sec", ConnectionError()],
        [RuntimeError()],
        ["first second", ConnectionError()],
        ["first second third"],
    ]
    printed: list[str] = []

    def write(text: str) -> None:
        printed.append(text)
        if "third" in text:
            server.known["job"].status = "SUCCEEDED"

    assert ray_jobs.follow_job(server, "job", write).state == "done"
    assert printed == ["first ", "sec", "ond", " third"]
    server.known["job"].status = "RUNNING"
    server.logs = [[ConnectionError("gone")] for _ in range(10)]
    with pytest.raises(ray_jobs.SubmitError, match="does not answer any more"):
        ray_jobs.follow_job(server, "job", write)


@pytest.mark.parametrize(
    ("status", "exit_code", "code", "said"),
    [
        ("SUCCEEDED", 0, 0, "job: done"),
        ("FAILED", 1, 1, "selfguide: job failed: the task's own reason"),
        ("FAILED", 2, 2, "selfguide: job failed: the task's own reason"),
        ("FAILED", 127, 1, "selfguide: job failed: the cluster has no selfguide on its PATH"),
        ("FAILED", None, 1, "selfguide: job failed: the task's own reason"),
        ("STOPPED", None, 130, "job: stopped"),
    ],
)  # fmt: skip
def test_who_follows_a_job_ends_as_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    status: str, exit_code: int | None, code: int, said: str,
) -> None:  # fmt: skip
    one = details("job", status)
    one.driver_exit_code, one.message = exit_code, "failed, the last lines:\nselfguide: the task's own reason\n"
    server = Server(one)
    server.logs = [["a \x1b[2Jlog\r\n"]]
    monkeypatch.setattr(ray_jobs, "connect", lambda address: server)
    monkeypatch.setattr(sys, "argv", ["selfguide", "logs", "job", "--follow"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code or 0, out) == (code, "a \\x1b[2Jlog\n")
    assert err.startswith(said)


@pytest.mark.parametrize(
    "argv", [["--env", "K"], ["--name", "a b"], ["--runtime-env", "none.yaml"], ["--working-dir", "none"]]
)
def test_options_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfguide", "submit", *argv, *GOOD])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"selfguide: {argv[0]} ")
