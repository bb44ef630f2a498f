"""The pool's client: routes rows to engine actors, outlives their deaths, and gives one answer per row.

Any process may hold a `Pool`; each keeps its own window of rows in flight on every engine and talks to the actors
directly. An engine's death is an event, not a row's failure: Ray restarts the actor, and the rows that were in flight
(the suspects) run again in halves, alone on an engine, so that only a row that was by itself when its engine died is
ever blamed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from cluster.placement import Limits
from engines.types import Completion, EngineStats, Outcome, Request, RequestFailed, Work

Journal = Callable[[dict[str, Any]], None]
"""Writes one event down durably before it returns."""

_DEATHS_TO_BLAME = 2
CALL_ROWS = 64
"""Rows in one actor call: fewer cost Ray overhead, more wait for each other (measured on two cores)."""
_PING_S = 5.0


class EnginesLost(Exception):
    """No engine is left, or engines died more often than `limits.max_deaths`. What was committed is safe."""


@dataclass(eq=False, slots=True)
class _Ticket:
    """A row on its way: who waits for it, and whether it has been in flight at a death."""

    work: Work
    channel: Channel
    wire_id: str = ""
    deaths_alone: int = 0

    @property
    def sequences(self) -> int:
        return self.work.sampling.n if isinstance(self.work, Request) else 1

    @property
    def full_weights(self) -> str:
        """Rows of different full weights cannot share a call."""
        adapter = self.work.adapter
        return adapter.digest if adapter is not None and adapter.kind == "full" else ""


@dataclass(eq=False, slots=True)
class _Lane:
    """One engine as this client sees it."""

    name: str
    actor: Any
    window: int
    state: str = "ready"  # ready | down | lost
    in_flight: dict[str, _Ticket] = field(default_factory=dict)
    sequences: int = 0
    num_calls: int = 0
    life: int = 1
    busy_alone: bool = False

    @property
    def has_room(self) -> bool:
        return self.state == "ready" and self.sequences < self.window


@dataclass(slots=True)
class PoolCounts:
    """What this client saw. `stale` answers came for dispatches that had been given up."""

    dispatched: int = 0
    answered: int = 0
    stale: int = 0
    deaths: int = 0
    poisoned: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


class Channel:
    """One caller's rows in the pool. `send` returns at once; `receive` waits for at least one answer."""

    def __init__(self, pool: Pool, affinity: str, journal: Journal | None, suspects: frozenset[str]) -> None:
        self.affinity = affinity
        self.journal = journal
        self.open = True
        self._pool = pool
        self._suspects = suspects
        self._answers: asyncio.Queue[Outcome | BaseException] = asyncio.Queue()
        self.deliver = self._answers.put_nowait

    def send(self, requests: Sequence[Work]) -> None:
        for request in requests:
            self._pool.enqueue(_Ticket(request, self), suspect=request.id in self._suspects)

    async def receive(self) -> list[Outcome]:
        """All answers that are there, one at least, in the order of arrival. Raises `EnginesLost`."""
        answers = [await self._answers.get()]
        while not self._answers.empty():
            answers.append(self._answers.get_nowait())
        outcomes = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            outcomes.append(answer)
        return outcomes


class Pool:
    """A client of the engine actors. Use from one event loop; `close` it in the same loop."""

    def __init__(self, actors: Sequence[Any], window: int, limits: Limits) -> None:
        self._lanes = [_Lane(f"engine-{i}", actor, window) for i, actor in enumerate(actors)]
        self._limits = limits
        self._pending: deque[_Ticket] = deque()
        self._suspects: deque[list[_Ticket]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump_scheduled = False
        self._dispatches = 0
        self.counts = PoolCounts()

    @asynccontextmanager
    async def channel(
        self, affinity: str = "", journal: Journal | None = None, suspects: Collection[str] = ()
    ) -> AsyncIterator[Channel]:
        """A stream of rows that go out as they come up and answers that come back as they finish.

        Rows of one `affinity` go to the same engine while it has room. `journal` is told of deaths before their rows
        run again; `suspects` are ids that such an event of an earlier process named. Leaving drops what is under way.
        """
        channel = Channel(self, affinity, journal, frozenset(suspects))
        try:
            yield channel
        finally:
            self._abandon(channel)

    async def generate(self, requests: Sequence[Work], affinity: str = "") -> AsyncIterator[Outcome]:
        """Answers of a closed set of requests as they finish, one for each. Raises `EnginesLost`."""
        async with self.channel(affinity) as channel:
            channel.send(requests)
            left = len(requests)
            while left:
                for outcome in await channel.receive():
                    left -= 1
                    yield outcome

    score = generate

    async def stats(self) -> list[EngineStats]:
        return list(await asyncio.gather(*(lane.actor.stats.remote() for lane in self._lanes if lane.state == "ready")))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- sending

    def enqueue(self, ticket: _Ticket, *, suspect: bool) -> None:
        if suspect:
            self._suspects.append([ticket])
        else:
            self._pending.append(ticket)
        self._schedule_pump()

    def _schedule_pump(self) -> None:
        """Once per turn of the event loop, so that rows that become ready together travel together."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        if all(lane.state == "lost" for lane in self._lanes):
            self._fail_all(EnginesLost("every engine is lost; see the engines' logs, then run the same command again"))
            return
        for lane in self._lanes:
            if self._suspects and lane.state == "ready" and not lane.busy_alone:
                self._start_call(lane, self._suspects.popleft(), alone=True)
        batches: dict[tuple[int, str], list[_Ticket]] = {}
        while self._pending and (home := self._route(self._pending[0])) is not None:
            ticket = self._pending.popleft()
            home.sequences += ticket.sequences
            batches.setdefault((self._lanes.index(home), ticket.full_weights), []).append(ticket)
        for (index, _), tickets in batches.items():
            for start in range(0, len(tickets), CALL_ROWS):
                self._start_call(self._lanes[index], tickets[start : start + CALL_ROWS], counted=True)

    def _route(self, ticket: _Ticket) -> _Lane | None:
        """The affinity's own engine while it has room, then the one with the least in flight; None: wait."""
        open_lanes = [lane for lane in self._lanes if lane.has_room]
        if not open_lanes:
            return None
        if ticket.channel.affinity:
            home = max(self._lanes, key=lambda lane: _rendezvous(ticket.channel.affinity, lane.name))
            if home.has_room:
                return home
        return min(open_lanes, key=lambda lane: lane.sequences)

    def _start_call(self, lane: _Lane, tickets: list[_Ticket], *, alone: bool = False, counted: bool = False) -> None:
        if not counted:
            lane.sequences += sum(ticket.sequences for ticket in tickets)
        for ticket in tickets:
            self._dispatches += 1
            ticket.wire_id = f"{ticket.work.id}#{self._dispatches}"
            lane.in_flight[ticket.wire_id] = ticket
        self.counts.dispatched += len(tickets)
        lane.busy_alone |= alone
        self._spawn(self._call(lane, tickets, alone))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        """A bug in a call must reach whoever waits, not end in a log."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(error)

    # ---- answers

    async def _call(self, lane: _Lane, tickets: list[_Ticket], alone: bool) -> None:
        batch = [replace(ticket.work, id=ticket.wire_id) for ticket in tickets]
        watcher = asyncio.get_running_loop().create_task(self._kill_if_mute(lane))
        started = not alone
        lane.num_calls += 1
        try:
            async for reference in lane.actor.run.options(num_returns="streaming").remote(batch, alone=alone):
                outcomes = await reference
                started = True
                for outcome in outcomes:
                    self._settle(lane, outcome)
        except RayActorError as error:
            self._on_death(lane, tickets, alone, blame=started and not getattr(error, "preempted", False))
        finally:
            watcher.cancel()
            lane.num_calls -= 1
            lane.busy_alone &= not alone
            self._schedule_pump()

    def _settle(self, lane: _Lane, outcome: Outcome) -> None:
        ticket = lane.in_flight.pop(outcome.id, None)
        if ticket is None:
            self.counts.stale += 1
            return
        lane.sequences -= ticket.sequences
        self.counts.answered += 1
        if isinstance(outcome, Completion):
            self.counts.output_tokens += sum(len(sample.token_ids) for sample in outcome.samples)
            self.counts.cached_tokens += outcome.cached_tokens
        if ticket.channel.open:
            ticket.channel.deliver(replace(outcome, id=ticket.work.id))
        self._schedule_pump()

    def _abandon(self, channel: Channel) -> None:
        """The caller has gone: what waits is dropped, what runs is aborted and its answers are not delivered."""
        channel.open = False
        self._pending = deque(ticket for ticket in self._pending if ticket.channel is not channel)
        groups = ([ticket for ticket in group if ticket.channel is not channel] for group in self._suspects)
        self._suspects = deque(group for group in groups if group)
        for lane in self._lanes:
            running = [wire_id for wire_id, ticket in lane.in_flight.items() if ticket.channel is channel]
            if running and lane.state == "ready":
                lane.actor.abort.remote(running)

    def _fail_all(self, error: BaseException) -> None:
        waiting = [*self._pending, *(ticket for group in self._suspects for ticket in group)]
        waiting += [ticket for lane in self._lanes for ticket in lane.in_flight.values()]
        self._pending.clear()
        self._suspects.clear()
        for ticket in waiting:
            ticket.channel.deliver(error)

    # ---- deaths

    def _on_death(self, lane: _Lane, tickets: list[_Ticket], alone: bool, *, blame: bool) -> None:
        """Every call that was in flight comes here. Without `blame` (a node was lost or preempted, or the call never
        started) the rows run again as they were; with it they run again in halves, and one that was by itself twice is
        quarantined: once may be a kill that only happened to fall there."""
        left = [ticket for ticket in tickets if lane.in_flight.pop(ticket.wire_id, None) is not None]
        lane.sequences -= sum(ticket.sequences for ticket in left)
        left = [ticket for ticket in left if ticket.channel.open]
        self._write_down(lane, left, alone, blame)
        if blame and alone and len(left) == 1:
            left[0].deaths_alone += 1
        if left and left[0].deaths_alone == _DEATHS_TO_BLAME:
            self.counts.poisoned += 1
            message = f"{_DEATHS_TO_BLAME} engines died while this row was alone in flight, the last was {lane.name}"
            left[0].channel.deliver(RequestFailed(left[0].work.id, "poison", message))
        elif blame or alone:
            parts = 2 if blame and len(left) > 1 else 1
            self._suspects.extend(left[i::parts] for i in range(parts) if left)
        else:
            self._pending.extendleft(left)
        if lane.state == "ready":
            lane.state = "down"
            self.counts.deaths += 1
            self._spawn(self._await_restart(lane))
        if self.counts.deaths > self._limits.max_deaths:
            self._fail_all(EnginesLost(f"engines died {self.counts.deaths} times (limits.max_deaths); see their logs"))

    def _write_down(self, lane: _Lane, tickets: list[_Ticket], alone: bool, blame: bool) -> None:
        """Suspicion goes to disk before the suspects run again, once for every journal among them."""
        for channel in {ticket.channel for ticket in tickets}:
            rows = [ticket.work.id for ticket in tickets if ticket.channel is channel]
            event = {
                "event": "engine_died",
                "engine": lane.name,
                "life": lane.life,
                "time": time.time(),
                "alone": alone,
                "blame": blame,
            }
            if channel.journal:
                channel.journal({**event, "rows": rows})

    async def _await_restart(self, lane: _Lane) -> None:
        """Ray restarts the actor; here we only wait until it answers, or give the lane up."""
        while lane.num_calls:  # the last of them may learn of this death after the next life has begun
            await asyncio.sleep(0.01)
        deadline = time.monotonic() + self._limits.start_s
        while time.monotonic() < deadline:
            try:
                await asyncio.wait_for(as_future(lane.actor.stats.remote()), self._limits.start_s)
            except ActorDiedError:
                break
            except (RayActorError, TimeoutError):
                await asyncio.sleep(0.2)
                continue
            lane.state = "ready"
            lane.life += 1
            self._schedule_pump()
            return
        lane.state = "lost"
        self._schedule_pump()

    async def _kill_if_mute(self, lane: _Lane) -> None:
        """An actor whose event loop is stuck answers no ping; the watchdog inside it covers a stuck engine."""
        heard = time.monotonic()
        while True:
            await asyncio.sleep(_PING_S)
            with suppress(TimeoutError, RayActorError):
                await asyncio.wait_for(as_future(lane.actor.stats.remote()), self._limits.stall_s)
                heard = time.monotonic()
            if time.monotonic() - heard > self._limits.stall_s:
                ray.kill(lane.actor, no_restart=False)


async def as_future(reference: Any) -> Any:
    """What a Ray reference stands for, as a coroutine, which `asyncio.wait_for` and `gather` take."""
    return await reference


def _rendezvous(affinity: str, lane: str) -> bytes:
    return hashlib.blake2b(f"{affinity}\0{lane}".encode(), digest_size=8).digest()
