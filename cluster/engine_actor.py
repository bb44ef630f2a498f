"""The actor that holds engines: takes rows in, keeps answers until their client fetches them, and exits when its engine
is dead.

Rows and answers travel apart: `submit` returns at once, and each client has one `collect` under way, so that a turn of
the event loop costs one message whatever the number of engines, calls and tasks behind it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from cluster.berth import Berth, EngineChanged
from cluster.placement import Limits
from engines.types import EngineDead, EngineSpec, EngineStats, Outcome, Work, num_sequences

_GATHER_S = 0.01
"""How long answers are gathered at least before they travel: engines finish many rows in one step."""
_FORGET_S = 300.0
"""Answers are kept so long for a client that does not fetch them."""
_WAIT_S = 30.0
"""A `collect` returns after this long with nothing, as a sign of life."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows for the actor's engine number `slot`, all with the same adapter. `alone`: with nothing else in it."""

    slot: int
    rows: Sequence[Work]
    alone: bool = False


@dataclass(slots=True)
class Reply:
    """What an actor has for a client.

    `life` names the actor's process. `begun` are rows that went in alone: without this word nobody is blamed for a
    death. `lost` are rows whose engine died while the process lived on. `loads` has for each slot that the client's
    rows are in the sequences of all clients, and the number of clients.
    """

    life: str
    outcomes: list[Outcome] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    lost: list[tuple[int, list[str]]] = field(default_factory=list)
    loads: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.outcomes or self.begun or self.lost)


class _Mailbox:
    """What waits for one client."""

    def __init__(self, life: str) -> None:
        self.reply = Reply(life)
        self.rung = asyncio.Event()
        self.asked = time.monotonic()

    def take(self) -> Reply:
        self.rung.clear()
        reply, self.reply = self.reply, Reply(self.reply.life)
        return reply


class EngineActor:
    """One engine behind Ray, or many simulated ones. A restart misses nothing: adapters are loaded by the rows that
    name them."""

    def __init__(self, spec: EngineSpec, limits: Limits, first: int = 0, count: int = 1) -> None:
        self._life = uuid.uuid4().hex
        self._limits = limits
        self._mail: dict[str, _Mailbox] = {}
        self._clients: list[Counter[str]] = [Counter() for _ in range(count)]
        self._tasks: set[asyncio.Task[None]] = set()
        last_words = _exit if count == 1 else _say
        self._berths = [Berth(spec, first + slot, last_words) for slot in range(count)]
        self._a_load = share_of_slots(spec.max_num_seqs * count)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ready(self) -> tuple[str, list[tuple[float, ...]]]:
        """Returns once all engines take rows: the node's id, and what each engine said of the canary."""
        try:
            await asyncio.gather(*(berth.ready() for berth in self._berths))
        except EngineDead as error:
            _exit(f"at its start: {error}")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._watch, daemon=True).start()
            self._spawn(self._check_canaries())
        return ray.get_runtime_context().get_node_id(), [berth.canary for berth in self._berths]

    # ---- rows and answers

    async def submit(self, client: str, parcels: Sequence[Parcel]) -> str:
        """Takes rows in; returns the name of this process's life."""
        for name in [name for name, one in self._mail.items() if time.monotonic() - one.asked > _FORGET_S]:
            del self._mail[name]  # a client that died without leaving
        mailbox = self._mail.setdefault(client, _Mailbox(self._life))
        for parcel in parcels:
            self._spawn(self._serve(client, mailbox, parcel))
        return self._life

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        """A bug in here must not leave rows without an answer: the process ends, and its traceback is in its log."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            sys.excepthook(type(error), error, error.__traceback__)
            _exit(f"a bug: {error!r}")

    async def _serve(self, client: str, mailbox: _Mailbox, parcel: Parcel) -> None:
        berth, here = self._berths[parcel.slot], self._clients[parcel.slot]
        left = {row.id: row for row in parcel.rows}
        sequences = sum(map(num_sequences, parcel.rows))
        here[client] += sequences
        try:
            while left:
                try:
                    await self._answer(berth, mailbox, parcel, left)
                except EngineChanged:
                    continue
                break
        except EngineDead:
            mailbox.reply.lost.append((parcel.slot, list(left)))
            mailbox.rung.set()
        finally:
            here[client] -= sequences
            if not here[client]:
                del here[client]

    async def _answer(self, berth: Berth, mailbox: _Mailbox, parcel: Parcel, left: dict[str, Work]) -> None:
        def begun() -> None:
            mailbox.reply.begun += left
            mailbox.rung.set()

        async for outcomes in berth.answer(list(left.values()), alone=parcel.alone, begun=begun):
            for outcome in outcomes:
                del left[outcome.id]
            mailbox.reply.outcomes += outcomes
            mailbox.rung.set()

    async def collect(self, client: str, patience_s: float) -> Reply:
        """Waits for answers to this client's rows, and gives all that are there.

        A client of many callers has patience: it would rather have a message of many rows, if the engines stay full.
        """
        mailbox = self._mail.setdefault(client, _Mailbox(self._life))
        mailbox.asked = time.monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(mailbox.rung.wait(), _WAIT_S)
            until = time.monotonic() + patience_s
            while not mailbox.reply.begun:
                await asyncio.sleep(_GATHER_S)
                if time.monotonic() >= until or len(mailbox.reply.outcomes) >= self._a_load:
                    break
        reply = mailbox.take()
        for slot, here in enumerate(self._clients):
            if client in here:
                reply.loads[slot] = (here.total(), len(here))
        return reply

    async def abort(self, ids: Sequence[str]) -> None:
        for berth in self._berths:
            await berth.abort(ids)

    async def leave(self, client: str) -> None:
        """The client has gone; what is left for it is thrown away."""
        self._mail.pop(client, None)

    # ---- what others ask

    @ray.method(concurrency_group="control")
    async def stats(self) -> list[EngineStats]:
        """Of each engine. Answers while the actor's event loop is busy, in another one: it only reads."""
        return [berth.stats() for berth in self._berths]

    @ray.method(concurrency_group="control")
    async def pids(self) -> list[int]:
        """This process and its children, the engine's core among them."""
        return [os.getpid(), *_children()]

    async def ping(self) -> str:
        return self._life

    async def sleep(self) -> None:
        """Once nothing is in flight, engines give their accelerators back; rows wait until `wake`."""
        await asyncio.gather(*(berth.sleep() for berth in self._berths))

    async def wake(self) -> None:
        await asyncio.gather(*(berth.wake() for berth in self._berths))

    async def close(self) -> None:
        for berth in self._berths:
            berth.close()

    # ---- supervision

    async def _check_canaries(self) -> None:
        while self._limits.canary_s:
            await asyncio.sleep(self._limits.canary_s)
            await asyncio.gather(*(berth.check() for berth in self._berths))

    def _watch(self) -> None:
        """Gives engines up that have work and no pulse; a thread, so that a stuck event loop is seen too."""
        last, since = [-1] * len(self._berths), [time.monotonic()] * len(self._berths)
        while True:
            time.sleep(1.0)
            for slot, berth in enumerate(self._berths):
                stats, now = berth.stats(), time.monotonic()
                pulse = stats.progress + (stats.life << 40)
                if pulse != last[slot] or not stats.in_flight:
                    last[slot], since[slot] = pulse, now
                limit_s = self._limits.stall_s if stats.progress else self._limits.first_step_s
                if now - since[slot] > limit_s:
                    since[slot] = now
                    self._give_up(berth, f"no step for {limit_s:g} s with {stats.in_flight} rows in flight")

    def _give_up(self, berth: Berth, reason: str) -> None:
        faulthandler.dump_traceback(file=sys.stderr)
        if len(self._berths) == 1:
            _exit(reason)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(berth.doom, reason)


def share_of_slots(slots: int) -> int:
    """Rows that are worth a message, of those that this many slots hold: what a client keeps ahead is several times
    as much."""
    return max(1, slots // 8)


def _say(reason: str) -> None:
    print(f"engine is dead: {reason}", file=sys.stderr, flush=True)


def _exit(reason: str) -> None:
    _say(reason)
    os._exit(1)


def _children() -> list[int]:
    """By what each process says of its parent: Linux's own lists of children may leave some out while others end."""
    own, found = os.getpid(), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]) == own:
                found.append(int(stat.parent.name))
    return found
