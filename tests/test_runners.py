"""Runners: the driver's side against actors in this process, and against real ones."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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


async def test_runners_that_died_idle_are_entered_together() -> None:
    together, dead = asyncio.Barrier(3), list[Dead]()

    def start() -> Dead:
        dead.append(Dead(together))
        return dead[-1]

    runners = Runners(start, 3, SimpleNamespace(), None)  # type: ignore[arg-type]
    assert await runners.heard() == ([], {})
    await asyncio.gather(*(one.entering for one in runners._runners if one.entering))
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


async def test_a_job_dealt_to_a_runner_that_died_idle_is_not_forgotten(ray_cluster: dict[str, float]) -> None:
    async def say_pid(job: None) -> int:
        return os.getpid()

    @asynccontextmanager
    async def open_desk(setting: Any, hear: Any) -> AsyncIterator[Worker]:
        yield Worker(say_pid, dict, lambda: 0)

    ends = dict[str, Any]()
    async with open_runners(ClusterSpec(runner_cpus=0), open_desk, None) as runners:
        await runners.run([("first", None)], ends.__setitem__)
        os.kill(ends["first"], signal.SIGKILL)
        while True:  # until its next life is there, into which nobody has entered
            with suppress(RayActorError):
                await runners._runners[0].actor.__ray_ready__.remote()
                break
        second = asyncio.create_task(runners.run([("second", None)], ends.__setitem__))
        while not second.done():
            await runners.heard()
    assert ends["first"] != ends["second"]
