"""The driver's side of the runners, against actors in this process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError

from cluster.runners import Runners


class Dead:
    """A runner that has died idle, and comes back only together with the others."""

    def __init__(self, together: asyncio.Barrier) -> None:
        self._together, self.lives = together, 0
        for name in ("heard", "enter"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _heard(self) -> None:
        raise RayActorError

    async def _enter(self, desk: Any, setting: Any) -> None:
        await self._together.wait()
        self.lives += 1


async def test_runners_that_died_idle_are_waited_for_together() -> None:
    together, dead = asyncio.Barrier(3), list[Dead]()

    def start() -> Dead:
        dead.append(Dead(together))
        return dead[-1]

    runners = Runners(start, 3, SimpleNamespace(), None)  # type: ignore[arg-type]
    assert await runners.heard() == ([], {})
    assert [one.lives for one in dead] == [1, 1, 1]
