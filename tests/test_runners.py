"""Runners: the driver's side against actors in this process, and against real ones."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.placement import ClusterSpec
from cluster.runners import Runners, Worker, open_runners


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


async def test_a_job_by_itself_leaves_the_others_their_cpus(ray_cluster: dict[str, float], tmp_path: Path) -> None:
    async def die_twice(folder: Path) -> int:
        """In company; then, by itself, asks for the last free CPU as curation does."""
        lives = len(list(folder.iterdir()))
        (folder / str(lives)).touch()
        if lives < 2:
            os._exit(1)
        return int(await ray.remote(num_cpus=1)(lambda: os.getpid()).remote())

    @asynccontextmanager
    async def open_desk(setting: Any, hear: Any) -> AsyncIterator[Worker]:
        yield Worker(die_twice, dict, lambda: 0)

    cluster, ends = ClusterSpec(runner_cpus=ray.available_resources()["CPU"] - 1), dict[str, Any]()
    async with open_runners(cluster, open_desk, None) as runners:
        await asyncio.wait_for(runners.run([("job", tmp_path)], ends.__setitem__), 120)
    assert ends["job"] > 0
    assert len(list(tmp_path.iterdir())) == 3
