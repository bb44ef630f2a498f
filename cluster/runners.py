"""Runner actors: each carries out many jobs at once in one event loop, and talks to engines and trainers itself.

The driver deals jobs and hears counts. A runner that dies costs no job: Ray restarts it, and its jobs are dealt again.
One that has seen two runners die goes to a runner of its own, so that only a job that was alone is ever blamed.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.fleet import as_future
from cluster.placement import ClusterSpec

Hear = Callable[[str, str, Mapping[str, Any]], None]
"""Takes (job, stage, counts) whenever a job has got on."""
Desk = Callable[[Any, Hear], AbstractAsyncContextManager["Worker"]]
"""What is passed to the runners: given the setting, it sets up in the runner's process whatever jobs share."""

_ANSWER_S = 5.0
_BLAMED_AFTER = 2
"""Deaths in company before a job runs by itself, and deaths by itself before it is given up."""


@dataclass(frozen=True)
class Worker:
    """`work` carries one job out. `counts` are what was seen so far, `room` how many sequences engines could take."""

    work: Callable[[Any], Awaitable[Any]]
    counts: Callable[[], Mapping[str, int]]
    room: Callable[[], int]


@dataclass(frozen=True)
class Heard:
    """How a runner gets on. `active` has for each stage the jobs in it and their rows; CPU is the process's, of which
    `life` is the name."""

    life: str
    active: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]
    room: int
    num_jobs: int
    rss_bytes: int
    cpu_s: float


class RunnerDied(Exception):
    """The job was alone in a runner that died, more than once: out of memory, or a library that crashed."""


_YOUNG_OBJECTS = 20_000
"""Before Python looks for garbage. With its own 700, nearly all that it walks over is rows that are under way."""


class RunnerActor:
    """One process. In each of its lives `enter` comes first; until then everything else waits."""

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._stack = AsyncExitStack()
        self._worker: asyncio.Future[Worker] | None = None
        self._entered = asyncio.Event()
        self._stages: dict[tuple[str, str], int] = {}

    async def enter(self, desk: Desk, setting: Any) -> None:
        if self._worker is None:
            self._worker = asyncio.ensure_future(self._begin(desk, setting))
            self._entered.set()
        await asyncio.shield(self._worker)

    async def _begin(self, desk: Desk, setting: Any) -> Worker:
        worker = await self._stack.enter_async_context(desk(setting, self._hear))
        gc.collect()
        gc.freeze()  # modules and tokenizer, over which collections need not walk again
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
        return worker

    async def _at_work(self) -> Worker:
        await self._entered.wait()
        assert self._worker is not None
        return await asyncio.shield(self._worker)

    def _hear(self, job: str, stage: str, counts: Mapping[str, Any]) -> None:
        """Counts without rows say that the stage is over."""
        if counts.get("rows") is None:
            self._stages.pop((job, stage), None)
        else:
            self._stages[job, stage] = counts["rows"]

    async def work(self, name: str, job: Any) -> Any:
        worker = await self._at_work()
        try:
            return await worker.work(job)
        finally:
            for key in [key for key in self._stages if key[0] == name]:
                del self._stages[key]

    async def heard(self) -> Heard:
        worker, active = await self._at_work(), dict[str, tuple[int, int]]()
        for (_, stage), rows in self._stages.items():
            tasks, total = active.get(stage, (0, 0))
            active[stage] = (tasks + 1, total + rows)
        jobs = len({job for job, _ in self._stages})
        return Heard(self._life, active, worker.counts(), worker.room(), jobs, rss_bytes(), time.process_time())

    async def leave(self) -> None:
        await self._stack.aclose()


@dataclass(eq=False)
class _Runner:
    actor: Any
    running: int = 0
    last: Heard | None = None
    entering: asyncio.Task[None] | None = None
    past: Counter[str] = field(default_factory=Counter)
    """What its former lives had counted."""


@dataclass(eq=False)
class _Dealt:
    """A job and what has happened to it."""

    job: Any
    name: str
    deaths: int = 0
    deaths_alone: int = 0

    @property
    def suspect(self) -> bool:
        return self.deaths >= _BLAMED_AFTER


class Runners:
    """The driver's side. Make it with `open_runners`."""

    def __init__(self, start: Callable[..., Any], count: int, desk: Desk, setting: Any) -> None:
        self._start, self._desk, self._setting = start, desk, setting
        self._runners = [_Runner(start()) for _ in range(count)]
        self._waiting: deque[_Dealt] = deque()
        self._suspects: deque[_Dealt] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self.num_deaths = 0
        self.limit = count

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._suspects)

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def run(self, jobs: Iterable[tuple[str, Any]], done: Callable[[str, Any], None]) -> None:
        """Deals named jobs in their order, at most `limit` at once (it may change meanwhile), and tells `done` each
        one's result, or `RunnerDied`. What `done` raises ends everything."""
        self._waiting.extend(_Dealt(job, name) for name, job in jobs)
        isolating: asyncio.Task[None] | None = None
        try:
            while self._waiting or self._suspects or self._running:
                while self._waiting and len(self._running) < self.limit:
                    runner = min(self._runners, key=lambda one: one.running)
                    self._begin(self._carry(runner, self._waiting.popleft(), done))
                if self._suspects and (isolating is None or isolating.done()):
                    isolating = self._begin(self._isolate(self._suspects.popleft(), done))
                # The limit may rise while nothing ends.
                ended, _ = await asyncio.wait(self._running, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    self._running.discard(task)
                    task.result()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._running.clear()

    def _begin(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._running.add(task)
        return task

    async def _carry(self, runner: _Runner, dealt: _Dealt, done: Callable[[str, Any], None]) -> None:
        runner.running += 1
        try:
            result = await runner.actor.work.remote(dealt.name, dealt.job)
        except RayActorError:
            dealt.deaths += 1
            self._bury(runner)
            (self._suspects if dealt.suspect else self._waiting).append(dealt)
            await self._enter(runner)
        else:
            done(dealt.name, result)
        finally:
            runner.running -= 1

    async def _isolate(self, dealt: _Dealt, done: Callable[[str, Any], None]) -> None:
        # One more than was placed: it must not take the CPUs that Ray Data was left, which its own job may wait for.
        actor = self._start(num_cpus=0)
        try:
            await actor.enter.remote(self._desk, self._setting)
            done(dealt.name, await actor.work.remote(dealt.name, dealt.job))
        except RayActorError as error:
            dealt.deaths_alone += 1
            self.num_deaths += 1
            if dealt.deaths_alone < _BLAMED_AFTER:
                self._suspects.append(dealt)
            else:
                done(dealt.name, RunnerDied(f"{_BLAMED_AFTER} runners died with this task alone: {_first_line(error)}"))
        finally:
            ray.kill(actor)

    def _bury(self, runner: _Runner) -> None:
        """Once for each life: what the dead one had counted is kept."""
        if runner.last is not None:
            runner.past.update(runner.last.counts)
            runner.last = None
            self.num_deaths += 1

    async def enter(self) -> None:
        await asyncio.gather(*(self._enter(runner) for runner in self._runners))

    async def _enter(self, runner: _Runner) -> None:
        """Waits for the runner's next life, and gives it what it works with."""
        while True:
            try:
                await runner.actor.enter.remote(self._desk, self._setting)
                return
            except RayActorError:
                await asyncio.sleep(0.5)

    async def heard(self) -> tuple[list[Heard], Counter[str]]:
        """How each runner that answers gets on; and what all of them, the dead ones among them, have counted."""
        found = await asyncio.gather(
            *(asyncio.wait_for(as_future(one.actor.heard.remote()), _ANSWER_S) for one in self._runners),
            return_exceptions=True,
        )
        total = Counter[str]()
        for runner, heard in zip(self._runners, found, strict=True):
            if isinstance(heard, Heard):
                if runner.last is not None and runner.last.life != heard.life:
                    self._bury(runner)
                runner.last = heard
            elif runner.entering is None or runner.entering.done():
                # It may have died idle, and jobs that it was dealt before anybody knew would wait in its next life.
                runner.entering = asyncio.create_task(self._enter(runner))
            total.update(runner.past)
            total.update(runner.last.counts if runner.last else {})
        return [heard for heard in found if isinstance(heard, Heard)], total

    def stop(self) -> None:
        for runner in self._runners:
            if runner.entering is not None:
                runner.entering.cancel()
            ray.kill(runner.actor)


@asynccontextmanager
async def open_runners(cluster: ClusterSpec, desk: Desk, setting: Any) -> AsyncIterator[Runners]:
    """Starts `cluster.num_runners` runners, and ends them."""
    remote = ray.remote(max_restarts=-1, max_task_retries=0, max_concurrency=10_000)(RunnerActor)

    def start(num_cpus: float = cluster.runner_cpus) -> Any:
        return remote.options(num_cpus=num_cpus).remote()

    runners = Runners(start, cluster.num_runners, desk, setting)
    try:
        await runners.enter()
        yield runners
    finally:
        runners.stop()


def rss_bytes() -> int:
    """Memory that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
