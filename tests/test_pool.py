"""The pool on simulated engines and a real Ray: one answer per row, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import ray

from cluster.berth import Berth
from cluster.engine_actor import Parcel, Reply
from cluster.fleet import EnginesLost, Fleet, start_engines, stop_engines
from cluster.placement import ClusterSpec, Limits, Placement
from cluster.pool import TURN_ROWS, Pool
from engines.types import (
    AdapterRef,
    Completion,
    EngineSpec,
    Faults,
    Outcome,
    Request,
    RequestFailed,
    Sampling,
    Score,
    ScoreRequest,
    Work,
)

POISON = (7, 7, 7)
PATIENT = Limits()
ON_CPU = Placement(0, 0, time_shared=False)


class OpenPool(Protocol):
    """Starts simulated engines and a client of them; keywords are those of `EngineSpec`."""

    def __call__(
        self, num_engines: int = 1, limits: Limits = ..., **spec: Any
    ) -> AbstractAsyncContextManager[tuple[Pool, Fleet]]: ...


@pytest.fixture
def open_pool(ray_cluster: dict[str, float]) -> OpenPool:
    @asynccontextmanager
    async def open_one(
        num_engines: int = 1, limits: Limits = PATIENT, **spec: Any
    ) -> AsyncIterator[tuple[Pool, Fleet]]:
        cluster = ClusterSpec(num_engines=num_engines, limits=limits)
        fleet = await start_engines(EngineSpec("none", kind="simulated", **spec), cluster, ON_CPU)
        pool = Pool(fleet)
        try:
            yield pool, fleet
        finally:
            await pool.close()
            stop_engines(fleet)

    return open_one


def make_rows(count: int, prefix: str = "row", **fields: Any) -> list[Work]:
    return [Request(f"{prefix}-{i}", [i, 1, 2], Sampling(seed=i), **fields) for i in range(count)]


async def collect(pool: Pool, rows: Sequence[Work], affinity: str = "") -> dict[str, Outcome]:
    """Answers by id; fails where a row has two."""
    answers = [outcome async for outcome in pool.generate(rows, affinity)]
    assert not [name for name, count in Counter(one.id for one in answers).items() if count > 1]
    return {one.id: one for one in answers}


def failed(answers: dict[str, Outcome]) -> dict[str, str]:
    return {name: one.error for name, one in answers.items() if isinstance(one, RequestFailed)}


async def in_flight(pool: Pool) -> None:
    """Returns once some rows are answered and others are not."""
    while not pool.counts.answered:
        await asyncio.sleep(0.01)


async def num_asked(pool: Pool) -> list[int]:
    """Rows that each engine has answered, without its canary."""
    return [stats.requests - 1 for stats in await pool.stats()]


def ids(rows: Sequence[Work]) -> set[str]:
    return {row.id for row in rows}


async def test_every_request_gets_one_answer_of_its_kind(open_pool: OpenPool) -> None:
    rows = make_rows(300)
    rows += [ScoreRequest(f"score-{i}", [1], [2, 3]) for i in range(100)]
    async with open_pool(2, max_num_seqs=64) as (pool, _):
        answers = await collect(pool, rows)
        counts = pool.counts
    assert answers.keys() == ids(rows)
    for row in rows:
        assert type(answers[row.id]) is (Completion if isinstance(row, Request) else Score)
    assert (counts.dispatched, counts.answered, counts.stale, counts.deaths) == (400, 400, 0, 0)


async def test_two_clients_of_one_engine_get_their_own_answers(open_pool: OpenPool) -> None:
    async with open_pool() as (pool, fleet):
        other = Pool(fleet)
        same_names = [Request(f"row-{i}", [i, 9], Sampling(n=2, seed=i)) for i in range(200)]
        ours, theirs = await asyncio.gather(collect(pool, make_rows(200)), collect(other, same_names))
        await other.close()
    assert ours.keys() == theirs.keys()
    assert {len(one.samples) for one in ours.values() if isinstance(one, Completion)} == {1}
    assert {len(one.samples) for one in theirs.values() if isinstance(one, Completion)} == {2}


async def test_a_row_that_the_engine_refuses_fails_alone(open_pool: OpenPool) -> None:
    async with open_pool(faults=Faults(refuse_share=0.2)) as (pool, _):
        answers = await collect(pool, make_rows(200))
        assert pool.counts.deaths == 0
    assert len(answers) == 200
    assert 0 < len(failed(answers)) < 100
    assert set(failed(answers).values()) == {"refused"}


async def test_adapters_may_be_mixed(open_pool: OpenPool) -> None:
    refs = [None, AdapterRef("a", "", 8, ""), AdapterRef("b", "", 8, ""), AdapterRef("full", "", 0, "", "full")]
    rows = [Request(f"{i}-{row}", [row], Sampling(seed=0), ref) for row in range(20) for i, ref in enumerate(refs)]
    async with open_pool() as (pool, _):
        mixed = await collect(pool, rows)
        apart: dict[str, Outcome] = {}
        for ref in refs:
            apart |= await collect(pool, [row for row in rows if row.adapter == ref])
    assert mixed == apart
    assert len({answer.samples for answer in mixed.values() if isinstance(answer, Completion)}) == len(rows)


# ---- deaths


async def test_rows_in_flight_at_a_death_are_answered_once(open_pool: OpenPool, tmp_path: Path) -> None:
    rows = make_rows(200)
    async with open_pool(2) as (pool, _):
        undisturbed = await collect(pool, rows)
    faults = Faults(die_after=30, deaths=2, marker=str(tmp_path))
    async with open_pool(2, faults=faults) as (pool, _):
        answers = await collect(pool, rows)
        counts = pool.counts
    assert len(list(tmp_path.iterdir())) == 2
    assert answers == undisturbed
    assert counts.deaths >= 1
    assert counts.answered == 200
    assert counts.dispatched > 200
    assert counts.stale == 0


async def test_an_engine_killed_from_outside_loses_nothing(open_pool: OpenPool) -> None:
    """Once with rows in flight, once idle: the next rows find it gone."""
    async with open_pool(tokens_per_s=8) as (pool, fleet):
        job = asyncio.create_task(collect(pool, make_rows(300)))
        await in_flight(pool)
        os.kill((await fleet.actors[0].pids.remote())[0], signal.SIGKILL)
        first = await job
        os.kill((await fleet.actors[0].pids.remote())[0], signal.SIGKILL)
        second = await collect(pool, make_rows(100))
    assert len(first) == 300
    assert len(second) == 100
    assert not failed(first | second)


async def test_only_poison_rows_are_quarantined(open_pool: OpenPool) -> None:
    rows = make_rows(8)
    poison = {"row-3", "row-6"}
    rows = [Request(r.id, [*POISON], Sampling(seed=1)) if r.id in poison else r for r in rows]
    async with open_pool(2, faults=Faults(poison=POISON)) as (pool, _):
        answers = await collect(pool, rows)
        assert pool.counts.poisoned == 2
    assert answers.keys() == ids(rows)
    assert failed(answers) == dict.fromkeys(poison, "poison")


async def test_a_neighbours_poison_is_never_blamed_on_mine(open_pool: OpenPool) -> None:
    """The other client's rows wait at the engine's door, or are inside, while the poison row kills it."""
    async with open_pool(faults=Faults(poison=POISON), tokens_per_s=1000) as (pool, fleet):
        other = Pool(fleet)
        bad = collect(pool, [Request("bad", POISON, Sampling()), *make_rows(3)])
        mine, theirs = await asyncio.gather(collect(other, make_rows(8)), bad)
        await other.close()
    assert len(mine) == 8
    assert not failed(mine)
    assert failed(theirs) == {"bad": "poison"}


async def test_suspicion_is_written_down_before_rows_run_again(open_pool: OpenPool) -> None:
    written: list[dict[str, Any]] = []
    rows = [Request("bad", POISON, Sampling()), *make_rows(3)]
    async with open_pool(faults=Faults(poison=POISON)) as (pool, _):

        def journal(event: dict[str, Any]) -> None:
            written.append({**event, "dispatched": pool.counts.dispatched})

        async with pool.channel("", journal) as channel:
            channel.send(rows)
            answers: list[Outcome] = []
            while len(answers) < len(rows):
                answers += await channel.receive()
    first = written[0]
    assert first["event"] == "engine_died"
    assert first["blame"]
    assert not first["alone"]
    assert set(first["rows"]) == ids(rows)
    assert first["dispatched"] == len(rows), "a row ran again before its suspicion was written"
    assert written[-1]["rows"] == ["bad"]
    assert written[-1]["alone"]


async def test_suspects_of_an_earlier_process_run_alone(open_pool: OpenPool) -> None:
    """One by one, so that the culprit is found without bisecting."""
    rows = [*make_rows(6), Request("bad", POISON, Sampling())]
    written: list[dict[str, Any]] = []
    async with (
        open_pool(faults=Faults(poison=POISON)) as (pool, _),
        pool.channel("", written.append, suspects={"bad", "row-1", "row-2"}) as channel,
    ):
        channel.send(rows)
        answers: list[Outcome] = []
        while len(answers) < len(rows):
            answers += await channel.receive()
    assert failed({one.id: one for one in answers}) == {"bad": "poison"}
    assert len(answers) == 7
    assert {tuple(event["rows"]) for event in written if event["alone"] and event["blame"]} == {("bad",)}


@pytest.mark.parametrize("how", ["stuck engine", "frozen process"])
async def test_an_engine_that_hangs_is_killed_and_its_rows_answered(
    open_pool: OpenPool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.pool._PING_S", 1.0)
    limits = Limits(first_step_s=3, stall_s=3)
    faults = Faults(hang_after=20) if how == "stuck engine" else Faults()
    speed = 2000 if how == "stuck engine" else 4
    async with open_pool(limits=limits, faults=faults, tokens_per_s=speed) as (pool, fleet):
        job = asyncio.create_task(collect(pool, make_rows(30)))
        await in_flight(pool)
        if how == "frozen process":
            os.kill((await fleet.actors[0].pids.remote())[0], signal.SIGSTOP)
        answers = await job
        assert pool.counts.deaths >= 1
    assert len(answers) == 30
    assert not failed(answers)


async def test_too_many_deaths_end_the_run(open_pool: OpenPool, tmp_path: Path) -> None:
    """Everyone who waits is told."""
    faults = Faults(die_after=1, deaths=100, marker=str(tmp_path))
    async with open_pool(limits=Limits(max_deaths=1), faults=faults) as (pool, _):
        ends = await asyncio.gather(
            collect(pool, make_rows(10)), collect(pool, make_rows(10, "other")), return_exceptions=True
        )
        assert [type(end) for end in ends] == [EnginesLost, EnginesLost]
        assert pool.counts.deaths == 2


async def test_an_engine_that_does_not_start_is_reported(ray_cluster: dict[str, float]) -> None:
    spec = EngineSpec("none", kind="simulated", faults=None)  # type: ignore[arg-type]
    with pytest.raises(EnginesLost, match="engine 0 did not start: AttributeError"):
        await start_engines(spec, ClusterSpec(), ON_CPU)


# ---- channels and routing


async def test_a_closed_channel_gets_nothing_more(open_pool: OpenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is not delivered, what waits is not sent."""
    delivered: list[Any] = []
    async with open_pool(max_num_seqs=64, tokens_per_s=500) as (pool, _):
        async with pool.channel() as channel:
            monkeypatch.setattr(channel, "deliver", delivered.append)
            channel.send(make_rows(200))
            await in_flight(pool)
        before, dispatched = len(delivered), pool.counts.dispatched
        left = await collect(pool, make_rows(5, "after"))
        assert pool.counts.dispatched == dispatched + 5
    assert TURN_ROWS <= dispatched < 200
    assert before
    assert len(delivered) == before
    assert len(left) == 5


async def test_suspects_of_a_closed_channel_do_not_run_again(open_pool: OpenPool) -> None:
    """A poison row whose caller has gone must not kill a second engine."""
    async with open_pool(faults=Faults(poison=POISON)) as (pool, _):
        died = asyncio.Event()
        async with pool.channel(journal=lambda event: died.set()) as channel:
            channel.send([Request("bad", POISON, Sampling()), *make_rows(3)])
            await died.wait()  # the journal is written before suspects run again, and so is this channel closed
        assert len(await collect(pool, make_rows(5, "after"))) == 5
        assert pool.counts.deaths == 1


async def test_rows_of_a_task_stay_on_one_engine_while_it_has_room(open_pool: OpenPool) -> None:
    async with open_pool(3, max_num_seqs=64) as (pool, _):
        await collect(pool, make_rows(50), "task")
        await collect(pool, make_rows(50), "task")
        assert sorted(await num_asked(pool)) == [0, 0, 100]
        await collect(pool, make_rows(192), "task")  # all the slots of three engines at once
        assert sorted(await num_asked(pool)) == [64, 64, 164]


async def test_rows_without_affinity_go_to_the_least_loaded(open_pool: OpenPool) -> None:
    async with open_pool(3, max_num_seqs=64) as (pool, _):
        await collect(pool, make_rows(192))
        assert await num_asked(pool) == [64, 64, 64]


# ---- with actors that are made for the test


def start_stutterer() -> Any:
    """An actor that answers everything twice, and remembers the parcels."""

    class Stutterer:
        def __init__(self) -> None:
            self.parcels: list[Parcel] = []
            self.reply = Reply("life")

        async def submit(self, client: str, parcels: Sequence[Parcel]) -> str:
            self.parcels += parcels
            self.reply.outcomes += [Completion(row.id, ()) for one in parcels for row in one.rows for _ in range(2)]
            return "life"

        async def collect(self, client: str, patience_s: float) -> Reply:
            reply, self.reply = self.reply, Reply("life")
            return reply

        async def leave(self, client: str) -> None: ...

        async def seen(self) -> list[Parcel]:
            return self.parcels

    return ray.remote(num_cpus=0, max_concurrency=10)(Stutterer).remote()


async def test_answers_to_settled_dispatches_are_dropped_and_counted(ray_cluster: dict[str, float]) -> None:
    actor = start_stutterer()
    pool = Pool(Fleet((actor,), ("",), 1, 1, 256, 0, (), Limits()))
    refs = [AdapterRef(name, "", 0, "", "full") for name in "ab"]
    rows = make_rows(100) + [row for ref in refs for row in make_rows(20, ref.digest, adapter=ref)]
    assert (await collect(pool, rows)).keys() == ids(rows)
    parcels = await actor.seen.remote()
    while pool._tasks:  # the last answers come after the rows are complete
        await asyncio.sleep(0.01)
    await pool.close()
    ray.kill(actor)
    assert pool.counts.stale == 140
    assert all(len({row.adapter for row in parcel.rows}) == 1 for parcel in parcels), "two adapters in one parcel"
    assert max(len(parcel.rows) for parcel in parcels) == TURN_ROWS


async def test_a_row_alone_is_alone_also_while_its_adapter_is_loaded() -> None:
    """Whoever comes in between could kill the engine, and the row would be blamed."""
    berth = Berth(EngineSpec("none", kind="simulated", tokens_per_s=1000), 0, pytest.fail)
    await berth.ready()
    order: list[str] = []

    async def run(rows: list[Work], *, alone: bool) -> None:
        async for outcomes in berth.answer(rows, alone=alone):
            order.extend(outcome.id for outcome in outcomes)

    loaded = asyncio.Event()
    load_adapter = berth._engine.load_adapter

    async def load_slowly(ref: AdapterRef | None) -> None:
        await asyncio.wait_for(loaded.wait(), 60)
        await load_adapter(ref)

    berth._engine.load_adapter = load_slowly  # type: ignore[method-assign]
    suspect = asyncio.create_task(run(make_rows(3, "suspect", adapter=AdapterRef("a", "", 8, "")), alone=True))
    await asyncio.sleep(0)
    other = asyncio.create_task(run(make_rows(3, "other"), alone=False))
    await asyncio.sleep(0.2)
    loaded.set()
    await asyncio.gather(suspect, other)
    assert [name.split("-")[0] for name in order] == ["suspect"] * 3 + ["other"] * 3
