"""The pool's client: routes rows to engines, outlives their deaths, and gives one answer per row.

Any process may hold a `Pool`; each keeps its own window of rows in flight on every engine and talks to the actors
directly. Tasks take turns, so that none waits for another's thousand rows. An engine's death is an event, not a row's
failure: Ray restarts the actor, and the rows that were in flight (the suspects) run again in halves, alone on an
engine, so that only a row that was by itself when its engine died is ever blamed.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from cluster.berth import differs
from cluster.channel import Channel, Journal, PoolCounts
from cluster.engine_actor import Parcel, Reply, share_of_slots
from cluster.fleet import EnginesLost, Fleet, as_future, engine_stats, went_with_its_node
from cluster.lane import Host, Lane, Router, Ticket
from engines.types import Completion, EngineStats, Outcome, RequestFailed, Work, num_prompt_tokens

__all__ = ["EnginesLost", "Pool"]

_DEATHS_TO_BLAME = 2
TURN_ROWS = 32
"""Rows that a task may send before the others have their turn."""
_PUMP_S = 0.005
"""Rows that become ready within this time travel together; with many callers, those of a while."""
_ROWS_PER_DEATH = 1000
_FEW_CHANNELS = 8
_PATIENCE_S, _MOST_PATIENCE_S = 0.01, 0.5
"""How long a caller's answers are gathered, for each caller, and at most."""
_PING_S = 5.0
_DEAD_FOR_GOOD = 5
"""So many times in a row Ray says that an actor is dead: it is not only between two lives."""


class Pool:
    """A client of the engine actors. Use from one event loop; `close` it in the same loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._limits = fleet, fleet.limits
        self._name = uuid.uuid4().hex
        self._hosts = [Host(actor, node) for actor, node in zip(fleet.actors, fleet.nodes, strict=True)]
        self._lanes: list[Lane] = []
        for number in range(fleet.num_engines):
            host, aside = self._hosts[number // fleet.per_actor], number >= fleet.num_engines - fleet.num_set_aside
            lane = Lane(f"engine-{number}", host, number % fleet.per_actor, fleet.slots, aside)
            host.lanes.append(lane)
            self._lanes.append(lane)
        self._router = Router(self._lanes)
        self._at: dict[str, Lane] = {}  # where each row in flight is, by its name on the wire
        self._turns: deque[Channel] = deque()
        self._suspects: deque[list[Ticket]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump_due: asyncio.TimerHandle | None = None
        self._a_load = share_of_slots(fleet.slots * fleet.num_engines)
        self._num_stirred = 0  # rows that came up or were answered since rows last went out
        self._dispatches = self._num_channels = 0
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
        self._num_channels += 1
        try:
            yield channel
        finally:
            self._num_channels -= 1
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
        return [one for one in await engine_stats(self._fleet) if one is not None]

    @property
    def patience_s(self) -> float:
        """How long answers are gathered for a caller; 0 for a few callers."""
        return min(_MOST_PATIENCE_S, _PATIENCE_S * self._num_channels) if self._num_channels > _FEW_CHANNELS else 0.0

    @property
    def room(self) -> int:
        """Sequences that could go into free slots now, and that no row here waits for; those with an adapter wait for
        the engines that have it."""
        if self._suspects or any(channel.waiting[0].adapter is None for channel in self._turns):
            return 0
        return sum(max(0, lane.slots - lane.sequences - lane.others) for lane in self._lanes if lane.state == "ready")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for host in self._hosts:
            host.actor.leave.remote(self._name)

    # ---- sending

    def enqueue(self, ticket: Ticket, *, suspect: bool) -> None:
        if suspect:
            self._suspects.append([ticket])
        else:
            self._wait(ticket)
        self._schedule_pump(1)

    def _wait(self, ticket: Ticket, *, first: bool = False) -> None:
        waiting = ticket.channel.waiting
        if not waiting:
            self._turns.append(ticket.channel)
        waiting.appendleft(ticket) if first else waiting.append(ticket)

    def _schedule_pump(self, num_stirred: int = 0) -> None:
        """At once where many rows have come up or been answered, or something else has changed (0); else with
        patience."""
        self._num_stirred += num_stirred or self._a_load
        loop, delay_s = asyncio.get_running_loop(), _PUMP_S
        if self._num_stirred < self._a_load:
            delay_s = max(_PUMP_S, self.patience_s / 2)
        if self._pump_due is not None:
            if self._pump_due.when() <= loop.time() + delay_s:
                return
            self._pump_due.cancel()
        self._pump_due = loop.call_later(delay_s, self._pump)

    def _pump(self) -> None:
        self._pump_due, self._num_stirred = None, 0
        if all(lane.state == "lost" for lane in self._lanes):
            self._fail_all(EnginesLost("every engine is lost; see the engines' logs, then run the same command again"))
            return
        parcels: dict[Host, list[tuple[Lane, Parcel]]] = {}
        for _ in range(len(self._suspects)):
            group = self._suspects.popleft()
            if free := self._router.free_of_suspects(group[0].adapter):
                self._pack(parcels, free, group, alone=True)
            else:
                self._suspects.append(group)
        self._take_turns(parcels)
        for host, packed in parcels.items():
            self._spawn(self._submit(host, packed))
            if not host.collecting:
                host.collecting = True
                self._spawn(self._collect(host))

    def _take_turns(self, parcels: dict[Host, list[tuple[Lane, Parcel]]]) -> None:
        """Round after round, until no engine has room for what waits."""
        self._router.look()
        num_blocked, full = 0, False
        while self._turns and num_blocked < len(self._turns):
            channel = self._turns.popleft()
            adapter, num_waiting = channel.waiting[0].adapter, len(channel.waiting)
            lane = None if full and adapter is None else self._router.route(channel.affinity, adapter, num_waiting)
            if lane is None:
                num_blocked, full = num_blocked + 1, full or adapter is None
            else:
                num_blocked = 0
                self._pack(parcels, lane, _take_turn(channel.waiting, lane), alone=False)
            if channel.waiting:
                self._turns.append(channel)

    def _pack(
        self, parcels: dict[Host, list[tuple[Lane, Parcel]]], lane: Lane, tickets: list[Ticket], *, alone: bool
    ) -> None:
        for ticket in tickets:
            self._dispatches += 1
            ticket.alone, ticket.begun = alone, False
            wire_id = f"{ticket.work.id}#{self._dispatches}"
            lane.take(ticket, wire_id)
            self._at[wire_id] = lane
        self.counts.dispatched += len(tickets)
        lane.busy_alone |= alone
        rows = [replace(ticket.work, id=ticket.wire_id) for ticket in tickets]
        parcels.setdefault(lane.host, []).append((lane, Parcel(lane.slot, rows, alone)))

    async def _submit(self, host: Host, packed: Sequence[tuple[Lane, Parcel]]) -> None:
        try:
            life = await host.actor.submit.remote(self._name, [parcel for _, parcel in packed])
        except RayActorError as error:
            # Perhaps it died before, and these rows have been seen to with all that was in flight.
            if any(row.id in self._at for _, parcel in packed for row in parcel.rows):
                await self._lose(host, error)
            return
        host.life = host.life or life

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        """A bug in here must reach whoever waits, not end in a log."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(error)

    # ---- answers

    async def _collect(self, host: Host) -> None:
        """Fetches answers as long as rows of ours are in this actor."""
        watcher = asyncio.get_running_loop().create_task(self._kill_if_mute(host))
        try:
            while host.num_in_flight:
                try:
                    reply: Reply = await host.actor.collect.remote(self._name, self.patience_s)
                except RayActorError as error:
                    await self._lose(host, error)
                    continue
                if host.life not in ("", reply.life):  # it died and is back, and nobody was told
                    await self._lose(host, None)
                host.life = reply.life
                self._take(host, reply)
        finally:
            host.collecting = False
            watcher.cancel()

    def _take(self, host: Host, reply: Reply) -> None:
        by_slot = {lane.slot: lane for lane in host.lanes}
        for wire_id in reply.begun:
            if wire_id in self._at:
                self._at[wire_id].in_flight[wire_id].begun = True
        for outcome in reply.outcomes:
            self._settle(outcome)
        for slot, ids in reply.lost:
            self._count_death(by_slot[slot].state == "ready")
            self._on_death(by_slot[slot], ids, gone=False)
        for slot, (sequences, clients) in reply.loads.items():
            lane = by_slot[slot]
            lane.others, lane.clients = max(0, sequences - lane.sequences), max(1, clients)
        if not reply.empty:
            self._schedule_pump(len(reply.outcomes))

    def _settle(self, outcome: Outcome) -> None:
        lane = self._at.pop(outcome.id, None)
        ticket = lane.drop(outcome.id) if lane else None
        if ticket is None:
            self.counts.stale += 1
            return
        self.counts.answered += 1
        self.counts.prompt_tokens += num_prompt_tokens(ticket.work)
        if isinstance(outcome, Completion):
            self.counts.output_tokens += sum(len(sample.token_ids) for sample in outcome.samples)
            self.counts.cached_tokens += outcome.cached_tokens
        if ticket.channel.open:
            ticket.channel.deliver(replace(outcome, id=ticket.work.id))

    def _abandon(self, channel: Channel) -> None:
        """The caller has gone: what waits is dropped, what runs is aborted and its answers are not delivered."""
        channel.open = False
        if channel.waiting:
            channel.waiting.clear()
            self._turns.remove(channel)
        groups = ([ticket for ticket in group if ticket.channel is not channel] for group in self._suspects)
        self._suspects = deque(group for group in groups if group)
        self._router.forget(channel.affinity)
        for host in self._hosts:
            running = [
                wire_id for lane in host.lanes if lane.state == "ready"
                for wire_id, ticket in lane.in_flight.items() if ticket.channel is channel
            ]  # fmt: skip
            if running:
                host.actor.abort.remote(running)

    def _fail_all(self, error: BaseException) -> None:
        waiting = [ticket for channel in self._turns for ticket in channel.waiting]
        waiting += [ticket for group in self._suspects for ticket in group]
        waiting += [ticket for lane in self._lanes for ticket in lane.in_flight.values()]
        for channel in self._turns:
            channel.waiting.clear()
        self._turns.clear()
        self._suspects.clear()
        for channel in {ticket.channel for ticket in waiting}:
            channel.deliver(error)

    # ---- deaths

    async def _lose(self, host: Host, error: RayActorError | None) -> None:
        """The actor's process is gone, and with it what was in all its engines: one death, however many they were."""
        gone = getattr(error, "preempted", False) or await went_with_its_node(host.node)
        host.life = ""
        self._count_death(any(lane.state == "ready" for lane in host.lanes) and not gone)
        for lane in host.lanes:
            self._on_death(lane, list(lane.in_flight), gone=gone)

    def _on_death(self, lane: Lane, wire_ids: Iterable[str], *, gone: bool) -> None:
        """What was in flight runs again: where the node went with it as it was, else in halves; and a row that was by
        itself twice is quarantined: once may be a kill that only happened to fall there."""
        dropped = [ticket for wire_id in wire_ids if (ticket := lane.drop(wire_id))]
        together: dict[tuple[bool, str], list[Ticket]] = {}
        for ticket in dropped:  # what runs again together needs the same adapter
            self._at.pop(ticket.wire_id, None)
            if ticket.channel.open:
                key = (ticket.alone, ticket.adapter.digest if ticket.adapter else "")
                together.setdefault(key, []).append(ticket)
        for (alone, _), tickets in together.items():
            blame = not gone and (not alone or tickets[0].begun)
            self._write_down(lane, tickets, alone=alone, blame=blame)
            self._suspect(lane, tickets, alone, blame=blame)
        if lane.state == "ready":
            lane.state = "down"
            self._spawn(self._await_restart(lane))
        self._schedule_pump()

    def _count_death(self, counts: bool) -> None:
        """Every thousand rows that were answered make up for one."""
        self.counts.deaths += counts
        if self.counts.deaths > self._limits.max_deaths + self.counts.answered // _ROWS_PER_DEATH:
            self._fail_all(EnginesLost(f"engines died {self.counts.deaths} times (limits.max_deaths); see their logs"))

    def _suspect(self, lane: Lane, tickets: list[Ticket], alone: bool, *, blame: bool) -> None:
        if blame and alone and len(tickets) == 1:
            tickets[0].deaths_alone += 1
        if tickets and tickets[0].deaths_alone == _DEATHS_TO_BLAME:
            self.counts.poisoned += 1
            message = f"{_DEATHS_TO_BLAME} engines died while this row was alone in flight, the last was {lane.name}"
            tickets[0].channel.deliver(RequestFailed(tickets[0].work.id, "poison", message))
        elif blame or alone:
            parts = 2 if blame and len(tickets) > 1 else 1
            self._suspects.extend(tickets[i::parts] for i in range(parts) if tickets)
        else:
            for ticket in reversed(tickets):
                self._wait(ticket, first=True)

    def _write_down(self, lane: Lane, tickets: list[Ticket], *, alone: bool, blame: bool) -> None:
        """Suspicion goes to disk before the suspects run again, once for every journal among them."""
        event = {"event": "engine_died", "engine": lane.name, "life": lane.life, "alone": alone, "blame": blame}
        for channel in {ticket.channel for ticket in tickets}:
            if channel.journal:
                rows = [ticket.work.id for ticket in tickets if ticket.channel is channel]
                channel.journal({**event, "time": time.time(), "rows": rows})

    async def _await_restart(self, lane: Lane) -> None:
        """Ray restarts the actor, an actor of many its engine; here we only wait until it is up, or give it up."""
        deadline, host, num_dead = time.monotonic() + self._limits.start_s, lane.host, 0
        while time.monotonic() < deadline and num_dead < _DEAD_FOR_GOOD:
            try:
                host.node, said = await asyncio.wait_for(as_future(host.actor.ready.remote()), self._limits.start_s)
                num_dead = 0
                if not differs(said[lane.slot], self._fleet.canary):
                    lane.revive()
                    self._schedule_pump()
                    return
                ray.kill(host.actor, no_restart=False)  # it came back wrong
            except ActorDiedError:
                num_dead += 1
            except (RayActorError, TimeoutError):
                pass
            await asyncio.sleep(0.2)
        lane.state = "lost"
        self._schedule_pump()

    async def _kill_if_mute(self, host: Host) -> None:
        """An actor whose event loop is stuck answers no ping; the watchdog inside it covers a stuck engine."""
        heard = time.monotonic()
        while True:
            await asyncio.sleep(_PING_S)
            with suppress(TimeoutError, RayActorError):
                await asyncio.wait_for(as_future(host.actor.ping.remote()), self._limits.stall_s)
                heard = time.monotonic()
            if time.monotonic() - heard > self._limits.stall_s:
                ray.kill(host.actor, no_restart=False)


def _take_turn(waiting: deque[Ticket], lane: Lane) -> list[Ticket]:
    """A turn's worth of rows for the lane, all with the same adapter, as far as its window goes."""
    adapter, room = waiting[0].adapter, lane.window - lane.sequences
    taken: list[Ticket] = []
    while waiting and len(taken) < TURN_ROWS and room > 0 and waiting[0].adapter == adapter:
        room -= waiting[0].sequences
        taken.append(waiting.popleft())
    return taken
