"""The actor that holds one engine: lets batches in, answers as rows finish, and exits when its engine is dead."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import ray

from cluster.placement import Limits
from engines.adapters import BadAdapter
from engines.types import AdapterRef, Engine, EngineDead, EngineSpec, EngineStats, Outcome, Request, RequestFailed, Work

_FLUSH_S = 0.05
"""Long enough for a yielded object to leave the process before the process may die."""


class Gate:
    """Rows of one kind may be inside together, or one call alone. First come, first served, so nobody starves."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._inside = 0
        self._kind: str | None = None

    def shared(self, kind: str = "") -> AbstractAsyncContextManager[None]:
        return self._enter(kind)

    def alone(self) -> AbstractAsyncContextManager[None]:
        return self._enter(None)

    @asynccontextmanager
    async def _enter(self, kind: str | None) -> AsyncIterator[None]:
        async with self._door, self._changed:
            await self._changed.wait_for(lambda: not self._inside or (kind is not None and kind == self._kind))
            self._inside += 1
            self._kind = kind
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()


class EngineActor:
    """One engine behind Ray. A restart misses nothing: adapters are loaded by the requests that name them."""

    def __init__(self, spec: EngineSpec, limits: Limits) -> None:
        self._engine = build_engine(spec)
        self._gate = Gate()
        self._bed = asyncio.Lock()
        self._night: AsyncExitStack | None = None
        threading.Thread(target=_watch, args=(self._engine, limits), daemon=True).start()

    async def run(self, batch: Sequence[Work], *, alone: bool = False) -> AsyncIterator[list[Outcome]]:
        """Outcomes of a batch as they finish. `alone`: with no other row in flight on this engine."""
        try:
            for kind, part in self._kinds(batch):
                async for outcomes in self._run_kind(kind, part, alone):
                    yield outcomes
        except EngineDead as error:
            print(f"engine is dead: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def _kinds(self, batch: Sequence[Work]) -> list[tuple[str, Sequence[Work]]]:
        """The batch, split where the engine must not have rows with and without an adapter in one step."""
        if self._engine.mixes_adapters:
            return [("", batch)]
        base = [item for item in batch if item.adapter is None]
        adapted = [item for item in batch if item.adapter is not None]
        return [(kind, part) for kind, part in (("base", base), ("adapted", adapted)) if part]

    async def _run_kind(self, kind: str, batch: Sequence[Work], alone: bool) -> AsyncIterator[list[Outcome]]:
        async with self._gate.alone() if alone else self._gate.shared(kind):
            if alone:
                yield []  # "started": without this word the client blames nobody for a death
                await asyncio.sleep(_FLUSH_S)
            if alone or not self._missing(batch):
                async for outcomes in self._answer(batch, await self._load(batch)):
                    yield outcomes
                return
        # Nothing may be in flight now: vLLM has mixed up adapters that were loaded during decoding.
        async with self._gate.alone():
            async for outcomes in self._answer(batch, await self._load(batch)):
                yield outcomes

    def _missing(self, batch: Sequence[Work]) -> set[AdapterRef | None]:
        return {ref for ref in {item.adapter for item in batch} if not self._engine.serves(ref)}

    async def _load(self, batch: Sequence[Work]) -> dict[AdapterRef | None, str]:
        """Loads what the batch needs; returns the adapters that cannot be served, and why."""
        refused: dict[AdapterRef | None, str] = {}
        for ref in self._missing(batch):
            try:
                await self._engine.load_adapter(ref)
            except BadAdapter as error:
                refused[ref] = str(error)
        return refused

    async def _answer(
        self, batch: Sequence[Work], refused: dict[AdapterRef | None, str]
    ) -> AsyncIterator[list[Outcome]]:
        bad = [item for item in batch if item.adapter in refused]
        if bad:
            yield [RequestFailed(item.id, "adapter", refused[item.adapter]) for item in bad]
        good = [item for item in batch if item.adapter not in refused]
        sampled = [item for item in good if isinstance(item, Request)]
        scored = [item for item in good if not isinstance(item, Request)]
        if sampled:
            async for outcomes in self._engine.generate(sampled):
                yield outcomes
        if scored:
            async for outcomes in self._engine.score(scored):
                yield outcomes

    @ray.method(concurrency_group="control")
    async def abort(self, ids: Sequence[str]) -> None:
        await self._engine.abort(ids)

    @ray.method(concurrency_group="control")
    async def stats(self) -> EngineStats:
        return self._engine.stats()

    @ray.method(concurrency_group="control")
    async def pids(self) -> list[int]:
        """This process and its children, the engine's core among them."""
        return [os.getpid(), *_children()]

    async def sleep(self) -> None:
        """Waits until nothing is in flight, keeps everything out until `wake`, and gives the accelerator back. Does
        nothing where the engine sleeps already, as `wake` does where it is awake."""
        async with self._bed:
            if self._night is None:
                self._night = AsyncExitStack()
                await self._night.enter_async_context(self._gate.alone())
                await self._engine.sleep()

    async def wake(self) -> None:
        async with self._bed:
            if self._night is not None:
                await self._engine.wake()
                await self._night.aclose()
                self._night = None

    async def close(self) -> None:
        self._engine.close()


def build_engine(spec: EngineSpec) -> Engine:
    """The engine that `spec.kind` names, started in this process."""
    if spec.kind == "simulated":
        from engines.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    from engines.vllm_engine import VllmEngine

    return VllmEngine(spec)


def _children() -> list[int]:
    """Linux lists them by the thread that started them, and Ray runs an actor in a thread of its own."""
    found = [path.read_text(encoding="ascii").split() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for pids in found for pid in pids]


def _watch(engine: Engine, limits: Limits) -> None:
    """Exits the process when the engine has work and no pulse; a thread, so that a stuck event loop is seen too."""
    last, since = -1, time.monotonic()
    while True:
        time.sleep(1.0)
        stats = engine.stats()
        if stats.progress != last or not stats.in_flight:
            last, since = stats.progress, time.monotonic()
        limit_s = limits.stall_s if stats.progress else limits.first_step_s
        if time.monotonic() - since > limit_s:
            print(f"engine made no step for {limit_s:g} s with {stats.in_flight} rows in flight", file=sys.stderr)
            faulthandler.dump_traceback(file=sys.stderr)
            os._exit(1)
