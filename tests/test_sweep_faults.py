"""A sweep whose processes die: every job comes to its end, its rows are those of a calm sweep, and only who was alone
at a death is blamed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from benchmarks.kill_drill import content
from benchmarks.processes import descendants
from selfguide.api import Session
from selfguide.store import RunStore
from selfguide.sweep import Job, Outcome, run_jobs
from selfguide.sweep.plan import plan_sweep
from selfguide.taskrun import TaskRun
from tests.conftest import OpenSimulated
from tests.test_sweep import FEW_ROWS, write_task

SLOW = {"engine.tokens_per_s": 40, "synthesis.num_candidates": 80, "finetuning.simulated_tokens_per_s": 3e4}
"""Some seconds a task: time enough to be killed in."""
TWO_ENGINES = {"cluster.num_engines": 2, "engine.per_actor": 2}


async def end_the_process(run: TaskRun) -> None:
    os._exit(9)


def plan(session: Session, folder: Path, num_tasks: int) -> list[Job]:
    paths = [str(write_task(folder, f"task{number}")) for number in range(num_tasks)]
    return list(plan_sweep(paths, session.recipe).jobs)


def processes(title: str) -> list[int]:
    """Of this test's Ray, the oldest first."""
    return sorted(pid for pid, command in descendants(os.getpid()).items() if command.startswith(title))


def rows_of(out: Path) -> dict[str, list[Any]]:
    """Every finished stage's rows, by its place."""
    return {
        f"{task.root.name}/{one.stage}/{one.path.name}": [content(row) for row in one.rows()]
        for task in RunStore(out).tasks()
        for one in task.artifacts()
    }


async def begun(out: Path) -> None:
    """Once rows of some task are on the disk."""
    while not list(out.glob("tasks/*/synthesis/*/work/rows-*")):
        await asyncio.sleep(0.02)


def all_done(outcomes: list[Outcome]) -> None:
    assert [(one.task, one.reason) for one in outcomes if one.state != "done"] == []


TITLES = ("ray::RunnerActor", "ray::EngineActor", "ray::TrainerActor.train", "ray::TrainerQueue")


@dataclass(frozen=True)
class Calm:
    """A sweep that nobody has disturbed, and the session that it leaves for others. `before` are earlier tests'
    processes."""

    session: Session
    jobs: list[Job]
    out: Path
    before: set[int]


@pytest_asyncio.fixture(scope="module")
async def calm(open_simulated: OpenSimulated, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Calm]:
    before, folder = {pid for one in TITLES for pid in processes(one)}, tmp_path_factory.mktemp("calm")
    async with open_simulated(**{**FEW_ROWS, **SLOW, **TWO_ENGINES}) as session:
        jobs = plan(session, folder, 3)
        all_done(await run_jobs(jobs, folder / "run", session=session))
        yield Calm(session, jobs, folder / "run", before)


@pytest.mark.parametrize("title", TITLES)
async def test_whoever_dies_the_rows_are_those_of_a_calm_sweep(calm: Calm, tmp_path: Path, title: str) -> None:
    others = {*calm.before, *processes("ray::RunnerActor")}
    sweep = asyncio.create_task(run_jobs(calm.jobs, tmp_path / "killed", session=calm.session))
    await begun(tmp_path / "killed")
    while not (ours := [pid for pid in processes(title) if pid not in others]):
        assert not sweep.done()
        await asyncio.sleep(0.02)
    os.kill(ours[0], signal.SIGKILL)
    all_done(await sweep)
    assert rows_of(tmp_path / "killed") == rows_of(calm.out)


async def test_a_task_that_ends_its_runner_fails_alone(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    async with open_simulated(**FEW_ROWS) as session:
        jobs = plan(session, tmp_path, 3)
        bad = Job(
            jobs[0].source, jobs[0].task, jobs[0].task_digest, session.recipe, jobs[0].student,
            method="tests.test_sweep_faults:end_the_process", cost=1e12,
        )  # fmt: skip
        bad_outcome, *others = await run_jobs([bad, *jobs[1:]], tmp_path / "run", session=session)
    all_done(others)
    assert (bad_outcome.state, bad_outcome.error) == ("failed", "RunnerDied")
    assert "alone" in str(bad_outcome.reason)


async def test_an_engine_that_answers_wrongly_is_replaced(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    """After its first hundred answers it is wrong; the canary finds it, and the sweep comes to its end."""
    faults = {"wrong_after": 100}
    changes = {**FEW_ROWS, **SLOW, **TWO_ENGINES, "engine.faults": faults, "cluster.limits.canary_s": 0.5}
    async with open_simulated(**changes) as session:
        all_done(await run_jobs(plan(session, tmp_path, 2), tmp_path / "run", session=session))
        assert max(stats.life for stats in await session.pool.stats()) > 1
