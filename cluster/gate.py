"""An engine's door: rows inside together, or one call alone; and seats for the adapters that are live."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class Gate:
    """First come, first served, so that nobody starves. Whoever holds the door keeps all that come later outside."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def shared(
        self,
        prepare: Callable[[], Awaitable[None]] | None = None,
        needed: Callable[[], bool] = lambda: True,
        beside: Callable[[], bool] = lambda: False,
    ) -> AsyncIterator[None]:
        """Inside with others. `prepare` is awaited first, at the door, unless those who stood at the door before have
        seen to it: then it is not `needed`. Nobody is inside meanwhile, unless it may run `beside` them."""
        async with self._door:
            if prepare is not None and needed():
                if not beside():
                    await self._empty.wait()
                await prepare()
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._door:
            await self._empty.wait()
            yield


class Seats:
    """At most so many different names at once; a name that has a seat shares it. First come, first served."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken: Counter[str] = Counter()
        self._queue = asyncio.Lock()
        self._left = asyncio.Event()

    @asynccontextmanager
    async def seat(self, name: str) -> AsyncIterator[None]:
        if name not in self._taken:
            async with self._queue:
                while name not in self._taken and len(self._taken) >= self._count:
                    self._left.clear()
                    await self._left.wait()
                self._taken[name] += 1
        else:
            self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]
                self._left.set()
