"""Engines and trainers on the same devices in turn: by day engines answer, by night they sleep and trainers work.

An engine that dies in the night comes back awake, and needs its device for that. So every engine is told again and
again to sleep, which one that sleeps already answers at once; where one does not answer, the night's jobs end, and go
on once all engines sleep again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from cluster.fleet import as_future
from engines.types import EngineStats

T = TypeVar("T")

_POLL_S = 0.5
_QUIET_POLLS = 2
"""Between two stages of a task engines are idle for a moment: that alone is no evening."""
_LONGEST_NIGHT = 4
"""Times `turn_tasks`: after so many jobs the engines answer what waits for them, though more jobs are there."""


class Turns:
    """Gives the devices to engines and to jobs in turn. `at_dawn` clears up behind the jobs, before engines wake."""

    def __init__(self, engines: Sequence[Any], turn_tasks: int, at_dawn: Callable[[], Awaitable[None]]) -> None:
        self._engines = list(engines)
        self._turn_tasks = turn_tasks
        self._at_dawn = at_dawn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_inside = 0
        self._attempts: set[asyncio.Future[Any]] = set()
        self._asleep = asyncio.Event()
        self._news = asyncio.Event()
        self._days = asyncio.create_task(self._take_turns())

    async def by_night(self, work: Callable[[], Awaitable[T]]) -> T:
        """Calls `work` while every engine sleeps; again, where it was cancelled because an engine had died."""
        admitted = asyncio.get_running_loop().create_future()
        self._waiting.append(admitted)
        self._news.set()
        try:
            await asyncio.wait([admitted, self._days], return_when=asyncio.FIRST_COMPLETED)
            if self._days.done():
                self._days.result()  # a bug ends the job, not only the nights
            while True:
                await self._asleep.wait()
                attempt = asyncio.ensure_future(work())
                if await self._see_through(attempt):
                    return attempt.result()
        finally:
            if admitted.done():
                self._num_inside -= 1
            else:
                self._waiting.remove(admitted)
            self._news.set()

    async def _see_through(self, attempt: asyncio.Future[Any]) -> bool:
        """False where the attempt was cancelled; where the caller is, the attempt is too."""
        self._attempts.add(attempt)
        try:
            await asyncio.wait([attempt])
        finally:
            attempt.cancel()
            await asyncio.wait([attempt])
            self._attempts.remove(attempt)
        return not attempt.cancelled()

    async def _take_turns(self) -> None:
        await self._wake()  # those that a queue before this one left asleep
        while True:
            await self._evening()
            await self._night()
            self._asleep.clear()
            await self._at_dawn()
            await self._wake()

    async def _evening(self) -> None:
        """Until enough jobs wait, or some do and the engines have nothing to do."""
        quiet = 0
        while len(self._waiting) < self._turn_tasks and quiet < _QUIET_POLLS:
            if self._waiting:
                await asyncio.sleep(_POLL_S)
            else:
                await self._news.wait()
            self._news.clear()
            quiet = quiet + 1 if self._waiting and await self._are_idle() else 0

    async def _night(self) -> None:
        """Until the jobs are done that wait or come meanwhile, so many at most."""
        left = _LONGEST_NIGHT * self._turn_tasks
        while self._num_inside or (self._waiting and left):
            if await self._sleep():
                self._asleep.set()
            else:
                self._asleep.clear()
                await self._break_off()
            while self._waiting and left and self._asleep.is_set():
                self._waiting.popleft().set_result(None)
                self._num_inside += 1
                left -= 1
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._news.wait()
            self._news.clear()

    async def _break_off(self) -> None:
        for attempt in self._attempts:
            attempt.cancel()
        if self._attempts:
            await asyncio.wait(self._attempts)

    # ---- engines

    async def _are_idle(self) -> bool:
        found = await asyncio.gather(*(as_future(one.stats.remote()) for one in self._engines), return_exceptions=True)
        return not any(map(_works, found))

    async def _sleep(self) -> bool:
        return all(await asyncio.gather(*(_call(one, "sleep") for one in self._engines)))

    async def _wake(self) -> None:
        while not all(await asyncio.gather(*(_call(one, "wake") for one in self._engines))):
            await asyncio.sleep(_POLL_S)


def _works(found: list[EngineStats] | BaseException) -> bool:
    """An actor that does not answer has rows to answer when it is back, unless it is lost for good."""
    if isinstance(found, BaseException):
        return not isinstance(found, ActorDiedError)
    return any(stats.in_flight for stats in found)


async def _call(engine: Any, method: str) -> bool:
    """Whether the engine did it. One that is lost for good needs nothing; one that fails at it is started anew."""
    try:
        await as_future(getattr(engine, method).remote())
    except ActorDiedError:
        return True
    except RayTaskError:
        ray.kill(engine, no_restart=False)
        return False
    except RayActorError:
        return False
    return True
