"""Many tasks at the same engines: none waits for another's thousand rows, and adapters take turns at few seats."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pytest

from cluster.berth import Berth
from cluster.channel import Channel
from cluster.engine_actor import Parcel, Reply
from cluster.fleet import Fleet
from cluster.lane import Host, Lane, Router, Ticket
from cluster.placement import Limits
from cluster.pool import TURN_ROWS, Pool
from engines.types import AdapterRef, Completion, EngineSpec, Outcome, Request, Sampling, Work


class Turnstile:
    """An actor in this process that answers rows in the order in which they came, some at a time; `seen` are their
    tasks in that order."""

    def __init__(self, at_a_time: int) -> None:
        self._at_a_time = at_a_time
        self._held: list[str] = []
        self._came = asyncio.Event()
        self.seen: list[str] = []
        for name in ("submit", "collect", "leave", "ping"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _submit(self, client: str, parcels: Sequence[Parcel]) -> str:
        rows = [row.id for parcel in parcels for row in parcel.rows]
        self.seen += [row.partition("-")[0] for row in rows]
        self._held += rows
        self._came.set()
        return "life"

    async def _collect(self, client: str, patience_s: float) -> Reply:
        await self._came.wait()
        answered, self._held = self._held[: self._at_a_time], self._held[self._at_a_time :]
        if not self._held:
            self._came.clear()
        return Reply("life", [Completion(row, ()) for row in answered])

    async def _ping(self) -> str:
        return "life"

    def _leave(self, client: str) -> None: ...


def rows_of(task: str, count: int, adapter: AdapterRef | None = None) -> list[Work]:
    return [Request(f"{task}-{i}", [i, 1, 2], Sampling(seed=i), adapter) for i in range(count)]


async def test_a_task_of_few_rows_does_not_wait_for_one_of_thousands() -> None:
    """The long one has filled the engine, and has thousands of rows more, when two short ones come."""
    engine = Turnstile(at_a_time=16)
    pool = Pool(Fleet((engine,), ("",), 1, 1, 64, 0, (), Limits()))
    window = pool._lanes[0].window

    async def ask(task: str, count: int) -> int:
        return len([outcome async for outcome in pool.generate(rows_of(task, count), task)])

    long = asyncio.create_task(ask("long", 4000))
    while len(engine.seen) < window:
        await asyncio.sleep(0)
    before = len(engine.seen)
    assert list(await asyncio.gather(ask("short", 40), ask("other", 40))) == [40, 40]
    at_most = before + 2 * 40 + 3 * TURN_ROWS  # a turn of the long one before, between and after theirs
    seen = Counter(engine.seen[:at_most])
    assert (seen["short"], seen["other"]) == (40, 40)
    assert await long == 4000
    await pool.close()


async def test_no_more_adapters_are_live_than_the_engine_has_seats_and_all_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve tasks' tuned students at an engine with four seats, while an untuned one is asked too."""
    berth = Berth(EngineSpec("none", kind="simulated", max_loras=4, tokens_per_s=2000), 0, pytest.fail)
    await berth.ready()
    live: Counter[str] = Counter()
    most = 0
    generate = berth._engine.generate

    async def watched(rows: Sequence[Request]) -> AsyncIterator[list[Outcome]]:
        nonlocal most
        adapter = rows[0].adapter
        name = adapter.digest if adapter else ""
        live[name] += 1
        most = max(most, len(+live) - ("" in +live))
        try:
            async for outcomes in generate(rows):
                yield outcomes
        finally:
            live[name] -= 1

    monkeypatch.setattr(berth._engine, "generate", watched)

    async def ask(rows: list[Work]) -> int:
        return sum([len(outcomes) async for outcomes in berth.answer(rows, alone=False)])

    adapters = [AdapterRef(f"adapter{i}", "", 8, "") for i in range(12)]
    parcels = [rows_of("base", 8)] + [rows_of(one.digest, 8, one) for one in adapters for _ in range(3)]
    assert await asyncio.gather(*map(ask, parcels)) == [8] * len(parcels)
    assert 2 <= most <= 4


def test_rows_with_an_adapter_stay_where_it_is_unless_many_wait() -> None:
    lanes = [Lane(f"engine-{i}", Host(None, ""), i, slots=4) for i in range(8)]
    channel = Channel(Pool(Fleet((None,), ("",), 1, 1, 4, 0, (), Limits())), "task", None, frozenset())
    router, ref = Router(lanes), AdapterRef("tuned", "", 8, "", "lora")
    for lane in lanes:
        lane.others = 4  # all are busy
    taken: list[Lane] = []

    def send(num_waiting: int) -> None:
        if lane := router.route("task", ref, num_waiting):
            [row] = rows_of("task", 1, ref)
            lane.take(Ticket(row, channel), str(len(taken)))
            taken.append(lane)

    for _ in range(20):
        send(num_waiting=16)
    assert len(taken) == lanes[0].window
    assert len(set(taken)) == 1, "four rounds of its slots are no reason to load it in another engine"
    send(num_waiting=17)
    assert len(set(taken)) == 2
    send(num_waiting=1)
    assert taken[-1] is taken[-2], "it is loaded there by now"
    for lane in set(lanes) - set(taken):
        lane.others = 0
    for _ in range(2 * lanes[0].window):
        send(num_waiting=1)
    assert len(set(taken)) > 2, "an idle engine has nothing to lose"
    for lane in set(taken):
        lane.state = "down"
    before = len(taken)
    send(num_waiting=1)
    assert len(taken) == before + 1
    assert taken[-1].state == "ready"
