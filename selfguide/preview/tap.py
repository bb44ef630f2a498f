"""Listening in on a pool: what is sent to the engines, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from engines.types import Outcome, Work

if TYPE_CHECKING:
    from cluster.channel import Channel, Journal
    from cluster.pool import Pool


class Tap:
    """In a pool's place: passes everything on, and keeps it by request id."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.sent: dict[str, Work] = {}
        self.received: dict[str, Outcome] = {}

    @asynccontextmanager
    async def channel(
        self, affinity: str = "", journal: Journal | None = None, suspects: Collection[str] = ()
    ) -> AsyncIterator[Any]:
        async with self._pool.channel(affinity, journal, suspects) as channel:
            yield _TappedChannel(self, channel)


class _TappedChannel:
    def __init__(self, tap: Tap, channel: Channel) -> None:
        self._tap, self._channel = tap, channel

    def send(self, requests: Sequence[Work]) -> None:
        self._tap.sent.update({request.id: request for request in requests})
        self._channel.send(requests)

    async def receive(self) -> list[Outcome]:
        outcomes = await self._channel.receive()
        self._tap.received.update({outcome.id: outcome for outcome in outcomes})
        return outcomes
