"""A sweep on simulated engines: what it is of, what it makes again and what not, and what becomes of what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from cluster.lane import Lane, Ticket
from selfguide.api import Session
from selfguide.cli import app
from selfguide.config import Recipe
from selfguide.errors import UserError
from selfguide.methods import self_guide
from selfguide.recipefile import load_recipe
from selfguide.records import ACCEPTED
from selfguide.store import Artifact, RunStore
from selfguide.sweep import Job, Outcome, run_jobs
from selfguide.sweep.plan import Sweep, plan_sweep
from selfguide.taskrun import TaskRun
from selfguide.tasks import load_task
from tests.conftest import REPO, OpenSimulated

FEW_ROWS = {
    "synthesis.target_rows": None, "synthesis.num_candidates": 12, "evaluation.num_instances": 8,
    "engine.tokens_per_s": 2000, "engine.simulation.prefix_cache_tokens": 10_000,
    "finetuning.simulated_tokens_per_s": 1e6,
}  # fmt: skip


def write_task(folder: Path, name: str, **changes: Any) -> Path:
    """A task file in a form of one's own."""
    content = {
        "instruction": f"Say whether the review of {name} is good or bad.", "labels": ["good", "bad"],
        "examples": [{"input": "It works.", "output": "good"}, {"input": "It broke.", "output": "bad"}],
        "instances": [{"input": f"Review {i} of {name}.", "output": ["good"]} for i in range(8)],
    }  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content | changes))
    return path


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with one dotted key changed."""
    content = recipe.model_dump()
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    section[last] = value
    return Recipe.model_validate(content)


# ---- jobs and plans


@pytest.fixture
def job() -> Job:
    return Job("a.json", "a", "1" * 64, load_recipe("simulated"), "2" * 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cluster.num_engines", 7),
        ("cluster.limits.max_deaths", 3),
        ("engine.max_num_seqs", 8),
        ("engine.tokens_per_s", 1.0),
        ("engine.faults.die_after", 5),
        ("finetuning.simulated_tokens_per_s", 10.0),
    ],
)
def test_where_and_how_fast_is_no_other_job(job: Job, key: str, value: Any) -> None:
    assert replace(job, recipe=changed(job.recipe, key, value)).key == job.key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("engine.max_model_len", 512),
        ("synthesis.sampling.temperature", 0.5),
        ("finetuning.learning_rate", 1e-4),
        ("evaluation.num_instances", 3),
    ],
)
def test_other_rows_are_another_job(job: Job, key: str, value: Any) -> None:
    assert replace(job, recipe=changed(job.recipe, key, value)).key != job.key


@pytest.mark.parametrize(
    "changes",
    [{"task": "b"}, {"task_digest": "3" * 64}, {"student": "3" * 64}, {"method": "m:f"}, {"options": {"a": 1}}],
)
def test_another_task_student_or_method_is_another_job(job: Job, changes: dict[str, Any]) -> None:
    assert replace(job, **changes).key != job.key


def test_neither_the_files_place_nor_the_expected_work_is_another_job(job: Job) -> None:
    assert replace(job, source="elsewhere/a.json", cost=9.0).key == job.key


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of NI-V2: two tasks, and a split that names one of them and one that is absent."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for name in "ab":
        write_task(tmp_path / "tasks", name)
    (tmp_path / "splits" / "default" / "test_tasks.txt").write_text("b\ngone\n")
    return tmp_path


def names(planned: Sweep) -> list[str]:
    return [job.task for job in planned.jobs]


def test_a_split_names_its_tasks_and_what_is_absent_is_told(clone: Path, smoke_recipe: Recipe) -> None:
    planned = plan_sweep([str(clone)], smoke_recipe, split="test")
    assert names(planned) == ["b"]
    assert planned.subject["absent"] == ["gone"]
    planned = plan_sweep([str(clone)], smoke_recipe)
    assert {one["task"]: one["in_official_test"] for one in planned.subject["tasks"]} == {"a": False, "b": True}
    assert [one["job"] for one in planned.subject["tasks"]] == [job.key for job in planned.jobs]


def test_a_file_that_is_no_task_is_told_by_its_name_and_left_out(clone: Path, smoke_recipe: Recipe) -> None:
    (clone / "tasks" / "bad.json").write_text("{}")
    planned = plan_sweep([str(clone)], smoke_recipe)
    assert names(planned) == ["a", "b"]
    [invalid] = planned.invalid
    assert invalid["source"] == "bad.json"
    assert invalid["reason"].startswith("bad.json: ")


def test_more_work_is_expected_of_more_rows(tmp_path: Path, smoke_recipe: Recipe) -> None:
    instances = [{"input": "A long review. " * 20, "output": ["good"]} for _ in range(30)]
    files = [write_task(tmp_path, "few"), write_task(tmp_path, "many", instances=instances)]
    few, many = plan_sweep(list(map(str, files)), smoke_recipe).jobs
    assert few.cost < many.cost


def test_a_plan_that_cannot_be_is_refused(clone: Path, smoke_recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_task(other, "a")
    for paths, split, said in (
        ([clone, other], "", "holds a task a, as .* does; rename one"),
        ([clone], "tset", "--split tset: there is no such split; name one of train, test"),
        ([other], "test", "other: holds no splits/"),
        ([clone], "train", "train_tasks.txt"),
    ):
        with pytest.raises(UserError, match=said):
            plan_sweep(list(map(str, paths)), smoke_recipe, split=split)
    (other / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"none of 1 files is a task; the first: a\.json: "):
        plan_sweep([str(other)], smoke_recipe)


# ---- three calls in one run folder: tasks; the same and more, some of which fail; those again


async def stumble(run: TaskRun, *, mended: str) -> dict[str, Any]:
    """A method with a bug, until the file `mended` is there."""
    if not Path(mended).exists():
        raise ZeroDivisionError("a bug\nin two lines")
    return {"seen": run.task.name, "pytorch": "torch" in sys.modules}


@dataclass(frozen=True)
class Swept:
    """What the calls of `run_jobs` returned and what they left behind, by the job's name below."""

    out: Path
    calls: Sequence[Mapping[str, Outcome]]
    events: Sequence[Sequence[Mapping[str, Any]]]
    heard: Sequence[Sequence[Mapping[str, Any]]]


@pytest_asyncio.fixture(scope="module")
async def session(open_simulated: OpenSimulated) -> AsyncIterator[Session]:
    async with open_simulated(**FEW_ROWS, **{"cluster.num_engines": 2, "engine.per_actor": 2}) as session:
        yield session


@pytest_asyncio.fixture(scope="module")
async def swept(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("sweep")
    tasks, out = folder / "tasks", folder / "run"
    tasks.mkdir()
    for name in ("a", "b", "c", "bad", "buggy", "edited"):
        write_task(tasks, name)
    recipe, of = session.recipe, {job.task: job for job in plan_sweep([str(tasks)], session.recipe).jobs}
    first = {"a": of["a"], "b": of["b"]}
    faulty = {
        "bad": replace(of["bad"], recipe=changed(recipe, "finetuning.min_rows", 1000)),
        "buggy": replace(of["buggy"], method="tests.test_sweep:stumble", options={"mended": str(folder / "mended")}),
        "edited": of["edited"],
    }
    variants = {
        key: replace(of["a"], recipe=changed(recipe, key, value))
        for key, value in (
            ("finetuning.learning_rate", 1e-4), ("evaluation.num_instances", 4), ("synthesis.sampling.temperature", 0.5)
        )
    }  # fmt: skip
    calls: list[dict[str, Outcome]] = []
    events: list[list[dict[str, Any]]] = []
    heard: list[list[Mapping[str, Any]]] = []

    async def call(jobs: Mapping[str, Job], *, retry_failed: bool = False) -> None:
        told: list[Mapping[str, Any]] = []
        outcomes = await run_jobs(
            list(jobs.values()), out, session=session, hear=told.append, retry_failed=retry_failed
        )
        calls.append(dict(zip(jobs, outcomes, strict=True)))
        lines = [json.loads(line) for line in (out / "sweep" / "events.jsonl").read_text().splitlines()]
        events.append(lines[sum(map(len, events)) :])
        heard.append(told)

    RunStore(out)
    (out / "sweep").mkdir()
    await call(first)
    write_task(tasks, "edited", instruction="Now it is another task: good or bad?")
    await call({"a": of["a"], "c": of["c"], **faulty, **variants})  # b was taken away
    await call({"a": of["a"], **faulty})
    (folder / "mended").touch()
    [edited] = plan_sweep([str(tasks / "edited.json")], recipe).jobs
    await call({"a": of["a"], **faulty, "edited": edited}, retry_failed=True)
    return Swept(out, calls, events, heard)


async def test_a_sweep_ends_with_every_tasks_comparison(swept: Swept) -> None:
    for name in "ab":
        outcome = swept.calls[0][name]
        assert (outcome.state, outcome.error, outcome.reason) == ("done", None, None)
        assert outcome.result is not None
        assert (swept.out / outcome.result["comparison"] / "done.json").is_file()
        assert {stage.partition("/")[0] for stage in outcome.stages} == {
            "synthesis", "curation", "finetuning", "evaluation", "comparison"
        }  # fmt: skip
    told = [event for event in swept.heard[0] if event["event"] == "task"]
    assert sorted((one["task"], one["state"], one["reason"]) for one in told) == [
        ("a", "done", None), ("b", "done", None)
    ]  # fmt: skip


async def test_what_is_done_stays_and_only_new_tasks_are_made(swept: Swept) -> None:
    """Of all calls, one has carried out `a` under its first recipe; its outcome is read from then on."""
    assert all(call["a"] == swept.calls[0]["a"] for call in swept.calls)
    assert swept.calls[1]["c"].state == "done"
    lines = [json.loads(line) for line in (swept.out / "sweep" / "outcomes.jsonl").read_text().splitlines()]
    assert [line["job"] for line in lines].count(swept.calls[0]["a"].job) == 1


async def test_a_call_with_nothing_left_starts_nothing(swept: Swept) -> None:
    """Failed tasks stay failed until it is asked to try them again."""
    assert swept.events[2] == swept.heard[2] == []
    assert all(swept.calls[2][name] == swept.calls[1][name] for name in swept.calls[2])


async def test_a_task_of_which_nothing_is_left_fails_alone_with_its_reason(swept: Swept) -> None:
    bad = swept.calls[1]["bad"]
    assert (bad.state, bad.error) == ("failed", "TaskFailed")
    assert bad.reason is not None
    assert "finetuning.min_rows is 1000" in bad.reason
    assert {stage.partition("/")[0] for stage in bad.stages} >= {"synthesis", "curation"}
    again = swept.calls[3]["bad"]
    assert again.reason == bad.reason
    assert again.began > bad.ended
    assert not {stage for stage in again.stages if stage.startswith("synthesis")}


async def test_a_file_that_changes_meanwhile_is_not_swept_as_what_it_was(swept: Swept) -> None:
    edited = swept.calls[1]["edited"]
    assert (edited.state, edited.error) == ("failed", "UserError")
    assert edited.reason is not None
    assert edited.reason.endswith("edited.json: was changed while the sweep went on; run the same command again")
    assert swept.calls[3]["edited"].state == "done"
    assert swept.calls[3]["edited"].job != edited.job


async def test_a_bug_is_told_with_its_traceback_and_ends_nothing_else(swept: Swept) -> None:
    buggy = swept.calls[1]["buggy"]
    assert (buggy.state, buggy.error, buggy.reason) == ("failed", "ZeroDivisionError", "a bug")
    assert buggy.traceback is not None
    assert "in stumble" in buggy.traceback
    mended = swept.calls[3]["buggy"]
    assert (mended.state, mended.result) == ("done", {"seen": "buggy", "pytorch": False})


UNTUNED = {"base", "few_shot_icl", "filtered_decoding"}


@pytest.mark.parametrize(
    ("key", "stages", "methods"),
    [
        ("finetuning.learning_rate", {"finetuning", "evaluation", "comparison"}, {"self_guide"}),
        ("evaluation.num_instances", {"evaluation", "comparison"}, UNTUNED | {"self_guide"}),
        (
            "synthesis.sampling.temperature",
            {"synthesis", "curation", "finetuning", "evaluation", "comparison"},
            {"self_guide"},
        ),
    ],
)
async def test_a_changed_key_makes_anew_what_it_touches(
    swept: Swept, key: str, stages: set[str], methods: set[str]
) -> None:
    outcome = swept.calls[1][key]
    assert outcome.result is not None, outcome.reason
    assert {stage.partition("/")[0] for stage in outcome.stages} == stages
    place = outcome.result["comparison"]
    [comparison] = [one for one in finished(swept.out, "comparison") if place.endswith(one.path.name)]
    made = {stage.partition("/")[2] for stage in outcome.stages}
    assert {row["method"] for row in comparison.rows() if row["evaluation"] in made} == methods


def finished(out: Path, *stages: str) -> list[Artifact]:
    return [one for task in RunStore(out).tasks() for one in task.artifacts() if one.stage in stages]


async def test_totals_are_the_sums_of_the_ledgers(swept: Swept) -> None:
    """Of the first call, in which nothing was made in vain: every row that was asked for is in a stage's rows."""
    *_, totals, ended = swept.events[0]
    assert (totals["event"], ended["event"], ended["stopped"]) == ("totals", "session_ended", False)
    assert (totals["tasks"], totals["done"], totals["failed"], totals["running"]) == (2, 2, 0, 0)
    made = {stage.partition("/")[2] for one in swept.calls[0].values() for stage in one.stages}
    artifacts = [one for one in finished(swept.out, "synthesis", "evaluation") if one.path.name in made]
    for tokens in ("output_tokens", "cached_tokens"):
        assert totals[tokens] == sum(one.marker[tokens] for one in artifacts) > 0
    rows = proof_tokens = 0
    for one in artifacts:
        rows += one.marker["ledger"]["candidates"]
        rows += sum(row["state"] == ACCEPTED for row in one.rows()) if one.stage == "synthesis" else 0  # annotated
    for one in finished(swept.out, "finetuning"):
        if one.path.name in made:
            canaries = one.marker["train"]["canaries"]
            rows += 2 * len(canaries)  # as the untuned and as the tuned student says them
            proof_tokens += 2 * sum(len(c["prefix_ids"]) + len(c["completion_ids"]) for c in canaries)
    assert totals["rows"] == rows
    assert totals["prompt_tokens"] == proof_tokens + sum(one.marker["prompt_tokens"] for one in artifacts)


async def test_the_driver_hears_counts_and_paths_not_rows(swept: Swept) -> None:
    sweep = swept.out / "sweep"
    for name in ("outcomes.jsonl", "events.jsonl"):
        assert max(map(len, (sweep / name).read_text().splitlines())) < 4096
    assert max(len(json.dumps(event)) for told in swept.heard for event in told) < 4096
    rows = (row for one in finished(swept.out, "synthesis") for row in one.rows())
    texts = {row["input"] for row in rows if len(row["input"] or "") > 20}
    written = (sweep / "outcomes.jsonl").read_text() + json.dumps(swept.heard)
    assert texts
    assert not [text for text in texts if json.dumps(text)[1:-1] in written]


# ---- the command

SELFGUIDE = str(Path(sys.executable).with_name("selfguide"))


def test_the_command_stops_goes_on_and_then_finds_nothing_to_do(random_student: Path, tmp_path: Path) -> None:
    """SIGTERM, by which jobs are stopped, does what Ctrl-C does, also where Ctrl-C is ignored, as in jobs."""
    (tmp_path / "tasks").mkdir()
    for name in ("a", "b"):
        write_task(tmp_path / "tasks", name)
    out = tmp_path / "run"
    command = [SELFGUIDE, "sweep", str(tmp_path / "tasks"), "--recipe", "simulated", "--out", str(out), "--json"]
    command += ["--model", str(random_student), "--set", "engine.simulation.start_s=0"]
    command += ["--set", "synthesis.num_candidates=40", "--set", "finetuning.simulated_tokens_per_s=1e6"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    first = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert first.stdout is not None
    for line in first.stdout:
        if json.loads(line).get("active"):
            first.send_signal(signal.SIGTERM)
            break
    _, said = first.communicate()
    assert (first.returncode, said) == (130, "selfguide: stopped; the same command goes on from here\n")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(event["version"] == 1 for event in events)
    assert events[-1]["event"] == "session_ended"
    assert sorted(event["task"] for event in events if event["event"] == "task") == ["a", "b"]
    files = [path for folder in ("sweep", "tasks") for path in (out / folder).rglob("*.*") if path.name != "sweep.json"]
    before = [path.stat() for path in files]
    again = CliRunner().invoke(app, command[1:])
    assert (again.exit_code, again.output) == (0, "")
    assert [(one.stat().st_ino, one.stat().st_mtime_ns) for one in files] == [
        (one.st_ino, one.st_mtime_ns) for one in before
    ]
    planned = CliRunner().invoke(app, [*command[1:], "--dry-run"])
    assert json.loads(planned.stdout)["tasks"] == {"a": "done", "b": "done"}


def test_make_says_where_tasks_come_from_before_anything_is_installed() -> None:
    command = ["make", "-C", str(REPO), "sweep", "NI=/none", "PYTHON=false"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "\nselfguide data ni-v2 /none fetches NI-V2" in f"\n{done.stdout}"


# ---- full weights


async def test_full_weights_have_engines_of_their_own(
    open_simulated: OpenSimulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every tuned student would push the untuned one out of its engine, and be pushed out by the next task."""
    taken: dict[str, set[str]] = {}
    take = Lane.take

    def record(lane: Lane, ticket: Ticket, wire_id: str) -> None:
        taken.setdefault(lane.name, set()).add(ticket.adapter.kind if ticket.adapter else "untuned")
        take(lane, ticket, wire_id)

    monkeypatch.setattr(Lane, "take", record)
    changes = {"finetuning.method": "full", "finetuning.learning_rate": 1e-3, "cluster.num_engines": 2}
    async with open_simulated(**FEW_ROWS, **changes, **{"engine.per_actor": 2}) as session:
        [job] = plan_sweep([str(write_task(tmp_path, "a"))], session.recipe).jobs
        run = session.task_run(load_task(job.source), RunStore(tmp_path / "run"), lambda *_: None)
        assert (await self_guide(run)).adapter.ref.kind == "full"
    assert taken == {"engine-0": {"untuned"}, "engine-1": {"full"}}
