"""Engines and trainers in turn: engines answer nothing while jobs train, and nobody waits forever, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.fleet import start_engines, stop_engines
from cluster.placement import ClusterSpec, Limits, Placement
from cluster.pool import Pool
from cluster.trainers import Trainers, TrainerShape
from cluster.turns import Turns
from engines.types import EngineSpec, Request, Sampling, TrainSpec, Work
from selfguide.curation import curate
from selfguide.finetuning import Adapter, finetune
from selfguide.store import RunStore
from selfguide.synthesis import synthesize
from selfguide.tasks import load_task
from tests.conftest import EXAMPLES, OpenSimulated
from tests.training import make_work, trainers

pytestmark = pytest.mark.usefixtures("others_aside", "ray_cluster")
IN_TURN = Placement(0, 0, time_shared=True)
SLOW = 5.0
"""Tokens per second and row: an answer takes from half a second to two and a half."""


async def until(true: Callable[[], object], *jobs: asyncio.Task[Any]) -> None:
    """Waits; none of `jobs` may end before."""
    while not true():
        assert not [job for job in jobs if job.done()]
        await asyncio.sleep(0.01)


@asynccontextmanager
async def some_engines(num_engines: int = 1, **spec: Any) -> AsyncIterator[tuple[Pool, list[Any]]]:
    """Engines with an actor each."""
    spec = {"kind": "simulated", "per_actor": 1, **spec}
    cluster = ClusterSpec(num_engines=num_engines, limits=Limits(canary_s=0))
    fleet = await start_engines(EngineSpec("none", **spec), cluster, IN_TURN)
    pool = Pool(fleet)
    try:
        yield pool, list(fleet.actors)
    finally:
        await pool.close()
        stop_engines(fleet)


@asynccontextmanager
async def some_turns(engines: Sequence[Any], turn_tasks: int = 1) -> AsyncIterator[tuple[Turns, list[int]]]:
    """Turns, and a list that gets an entry at the end of each night."""
    nights: list[int] = []

    async def at_dawn() -> None:
        nights.append(len(nights) + 1)

    turns = Turns(engines, turn_tasks, at_dawn)
    try:
        yield turns, nights
    finally:
        turns._days.cancel()
        with suppress(asyncio.CancelledError):
            await turns._days


async def answer(pool: Pool, count: int, prefix: str = "row") -> int:
    rows: list[Work] = [Request(f"{prefix}-{i}", [i, 1, 2], Sampling(seed=i)) for i in range(count)]
    return len([one async for one in pool.generate(rows)])


async def in_flight(actor: Any) -> int:
    [stats] = await actor.stats.remote()
    return int(stats.in_flight)


async def answers_of(actor: Any) -> int:
    """Rows that the engine has answered, beside the canary at its start."""
    [stats] = await actor.stats.remote()
    return int(stats.requests) - 1


class Jobs:
    """Jobs that note when they begin, and end when they are told to."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.begun: list[int] = []
        self.may_end = asyncio.Event()
        self.busy = 0

    def start(self, number: int) -> asyncio.Task[int]:
        async def work() -> int:
            self.begun.append(number)
            self.busy += 1
            try:
                await self.may_end.wait()
            finally:
                self.busy -= 1
            return number

        return asyncio.create_task(self._turns.by_night(work))


async def test_jobs_that_wait_train_in_one_night_and_rows_wait_for_the_morning() -> None:
    async with some_engines(2) as (pool, actors), some_turns(actors, turn_tasks=3) as (turns, nights):
        jobs = Jobs(turns)
        started = [jobs.start(number) for number in range(3)]
        await until(lambda: len(jobs.begun) == 3, *started)
        late = jobs.start(3)  # comes in the night, and is let in
        await until(lambda: len(jobs.begun) == 4, late)
        rows = asyncio.create_task(answer(pool, 50))
        await until(lambda: pool.counts.dispatched == 50, *started, rows)
        assert await asyncio.gather(*(one.sleep.remote() for one in actors)) == [None, None]
        assert [await answers_of(one) for one in actors] == [0, 0], "an engine answered at night"
        jobs.may_end.set()
        assert await asyncio.gather(*started, late) == [0, 1, 2, 3]
        assert await rows == 50
        assert nights == [1]


async def test_a_night_begins_once_engines_are_idle_and_not_before() -> None:
    async with some_engines(tokens_per_s=SLOW) as (pool, actors), some_turns(actors, turn_tasks=5) as (turns, _):
        rows = asyncio.create_task(answer(pool, 200))
        while not await in_flight(actors[0]):
            await asyncio.sleep(0.01)
        assert await turns.by_night(lambda: answers_of(actors[0])) == 200, (
            "the engine had work, and too few jobs waited"
        )
        assert await rows == 200


async def test_a_night_that_is_long_enough_gives_the_engines_their_turn() -> None:
    """Jobs that never end to come: rows are answered all the same, after four turns' worth of jobs."""
    async with some_engines() as (pool, actors), some_turns(actors, turn_tasks=1) as (turns, nights):
        jobs = Jobs(turns)
        started = [jobs.start(number) for number in range(11)]
        await until(lambda: len(jobs.begun) == 4, *started)
        rows = asyncio.create_task(answer(pool, 20))
        await until(lambda: pool.counts.dispatched == 20, *started)
        assert len(jobs.begun) == 4, "more than four turns' worth in one night"
        jobs.may_end.set()
        assert await rows == 20
        assert await asyncio.gather(*started) == list(range(11))
        await until(lambda: len(nights) == 3)


async def test_a_cancelled_job_ends_its_night() -> None:
    async with some_engines() as (pool, actors), some_turns(actors) as (turns, nights):
        jobs = Jobs(turns)
        running = jobs.start(0)
        await until(lambda: jobs.busy, running)
        waiting = asyncio.create_task(answer(pool, 10))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert jobs.busy == 0
        assert await waiting == 10
        assert nights == [1]
        never = jobs.start(1)
        await asyncio.sleep(0)
        never.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never
        assert await answer(pool, 10, "later") == 10
        assert jobs.begun == [0]


async def test_an_engine_that_dies_at_night_gets_its_device_and_sleeps_before_the_job_goes_on() -> None:
    async with some_engines(2) as (pool, actors), some_turns(actors) as (turns, nights):
        jobs = Jobs(turns)
        job = jobs.start(0)
        await until(lambda: jobs.busy, job)
        [pid, *_] = await actors[0].pids.remote()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(jobs.begun) == 2, job)  # broken off, and begun again once both slept
        rows = asyncio.create_task(answer(pool, 50))
        await until(lambda: pool.counts.dispatched, job)
        assert [await answers_of(one) for one in actors] == [0, 0]
        jobs.may_end.set()
        assert await job == 0
        assert await rows == 50
        assert nights == [1]


async def test_an_engine_that_is_lost_for_good_holds_up_nobody() -> None:
    async with some_engines(2) as (_, actors), some_turns(actors) as (turns, nights):
        jobs = Jobs(turns)
        job = jobs.start(0)
        await until(lambda: jobs.busy, job)
        ray.kill(actors[0])
        jobs.may_end.set()
        assert await job == 0
        await until(lambda: nights)
        assert await in_flight(actors[1]) == 0


# ---- with real trainers


async def test_a_killed_queue_leaves_no_engine_asleep_and_loses_no_job(
    spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    work = make_work(tmp_path / "work")
    async with some_engines() as (pool, actors):
        opened = Trainers([TrainerShape({"num_cpus": 1})], actors, turn_tasks=1)
        job = asyncio.create_task(opened.train(replace(spec, epochs=25), rows, work))
        await until(lambda: list(work.glob("checkpoint-*/trainer_state.json")), job)
        held = asyncio.create_task(answer(pool, 10))
        ray.kill(opened._queue, no_restart=False)
        result = await job
        assert await held == 10
        assert result.epochs == 25
        assert await answer(pool, 10, "later") == 10
        opened.stop()
        await until(lambda: not trainers())


async def test_engines_of_a_queue_whose_clients_are_gone_are_woken() -> None:
    """Nobody asks the new queue for anything."""
    async with some_engines() as (pool, actors):
        opened = Trainers([TrainerShape({"num_cpus": 1})], actors, turn_tasks=1)
        await opened._queue.cancel.remote("none", "")  # it is there
        await actors[0].sleep.remote()
        rows = asyncio.create_task(answer(pool, 10))
        ray.kill(opened._queue, no_restart=False)
        assert await rows == 10
        opened.stop()


async def test_trainers_stay_warm_for_a_night_and_leave_the_gpu_at_dawn(
    spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    """Two jobs, one process; it is gone before the engine answers again."""
    async with some_engines() as (pool, actors):
        opened = Trainers([TrainerShape({"num_cpus": 1}, stays=False)], actors, turn_tasks=2)
        works = [make_work(tmp_path / name) for name in "ab"]
        seen: set[int] = set()

        def note(step: dict[str, Any]) -> None:
            seen.update(trainers())

        jobs = [asyncio.create_task(opened.train(replace(spec, epochs=1), rows, work, note)) for work in works]
        await asyncio.gather(*jobs)
        assert await answer(pool, 10) == 10
        await until(lambda: not trainers())
        assert len(seen) == 1
        opened.stop()


async def test_two_tasks_that_train_at_once_do_not_wait_for_each_other(
    open_simulated: OpenSimulated, tmp_path: Path
) -> None:
    """Both need the engines before and after, and every engine asleep in between."""
    task = load_task(EXAMPLES / "sentiment.json")
    settings = {"cluster.share": "turns", "cluster.turn_tasks": 2, "finetuning.epochs": 1}

    async with open_simulated(**settings) as session:

        async def learn(name: str) -> Adapter:
            run = session.task_run(task, RunStore(tmp_path / name), lambda task, stage, counts: None)
            adapter = await finetune(run, await curate(run, await synthesize(run)))
            assert await answer(run.pool, 10, name) == 10
            return adapter

        one, other = await asyncio.gather(learn("one"), learn("other"))
    assert one.ref.digest == other.ref.digest
