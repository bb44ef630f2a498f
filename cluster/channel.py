"""One caller's rows in the pool, and what a client of the engines has seen."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.lane import Ticket
from engines.types import Outcome, Work

if TYPE_CHECKING:
    from cluster.pool import Pool

Journal = Callable[[dict[str, Any]], None]
"""Writes one event down durably before it returns."""


@dataclass(slots=True)
class PoolCounts:
    """What this client saw. `stale` answers came for dispatches that had been given up."""

    dispatched: int = 0
    answered: int = 0
    stale: int = 0
    deaths: int = 0
    poisoned: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


class Channel:
    """One caller's rows in the pool. `send` returns at once; `receive` waits for at least one answer."""

    def __init__(self, pool: Pool, affinity: str, journal: Journal | None, suspects: frozenset[str]) -> None:
        self.affinity = affinity
        self.journal = journal
        self.open = True
        self.waiting: deque[Ticket] = deque()
        self._pool = pool
        self._suspects = suspects
        self._answers: asyncio.Queue[Outcome | BaseException] = asyncio.Queue()
        self.deliver = self._answers.put_nowait

    def send(self, requests: Sequence[Work]) -> None:
        for request in requests:
            self._pool.enqueue(Ticket(request, self), suspect=request.id in self._suspects)

    async def receive(self) -> list[Outcome]:
        """All answers that are there, one at least, in the order of arrival. Raises `EnginesLost`.

        Where many callers take turns, each waits a little for more: what follows costs as much for one as for many.
        """
        answers = [await self._answers.get()]
        if (patience_s := self._pool.patience_s) and not isinstance(answers[0], BaseException):
            await asyncio.sleep(patience_s)
        while not self._answers.empty():
            answers.append(self._answers.get_nowait())
        outcomes = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            outcomes.append(answer)
        return outcomes
