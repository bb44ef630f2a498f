"""One engine in its actor: who may be in it when, which adapters it holds, whether its answers are still right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from cluster.gate import Gate, Seats
from engines.adapters import BadAdapter
from engines.types import (
    AdapterRef,
    Engine,
    EngineDead,
    EngineSpec,
    EngineStats,
    Outcome,
    Request,
    RequestFailed,
    Score,
    ScoreRequest,
    Work,
    num_sequences,
)

CANARY = ScoreRequest("canary", tuple(range(1, 9)), tuple(range(9, 17)))
"""Token ids that every vocabulary has. What an engine says of them must not change as long as it lives."""
_CANARY_TOLERANCE = 0.1
"""Nats a token, mean absolute: far above what the numerics of another batch change, far below a broken engine."""


class Berth:
    """One engine with its door. An engine that dies is built again here, unless `last_words` ends the process."""

    def __init__(self, spec: EngineSpec, number: int, last_words: Callable[[str], None]) -> None:
        self._spec, self._number, self._last_words = spec, number, last_words
        self._life = 1
        self._engine = build_engine(spec, number, self._life)
        self._gate = Gate()
        self._seats = Seats(max(1, spec.max_loras))
        self._wanted: dict[str, AdapterRef] = {}
        self._refused: dict[str, str] = {}
        self._bed = asyncio.Lock()
        self._night: AsyncExitStack | None = None
        self._use = _Use(spec.max_num_seqs)
        self._doom: asyncio.Future[str] = asyncio.Future()
        self._up: asyncio.Task[None] | None = None
        self.canary: tuple[float, ...] = ()

    async def ready(self) -> None:
        """Returns once the engine takes rows, and knows what the canary is; for every life anew."""
        if self._up is None:
            self._up = asyncio.create_task(self._start())
        await asyncio.shield(self._up)

    async def _start(self) -> None:
        await asyncio.sleep(getattr(self._engine, "start_s", 0.0))
        said = await self._ask_canary()
        self.canary = self.canary or said

    def _bury(self, engine: Engine, reason: str) -> None:
        """A new engine in the place of one that died, once; what waits at the door waits for it."""
        if engine is self._engine:
            self._last_words(reason)
            self._life += 1
            self._engine, self._doom = build_engine(self._spec, self._number, self._life), asyncio.Future()
            self._refused.clear()
            self._up = asyncio.create_task(self._start())

    async def answer(
        self, rows: Sequence[Work], *, alone: bool, begun: Callable[[], Any] = lambda: None
    ) -> AsyncIterator[list[Outcome]]:
        """Outcomes of rows that share one adapter, as they finish. `alone`: with no other row in this engine, and
        `begun` is called when they go in. Raises `EngineDead`, and `EngineChanged` before any row has gone in."""
        await self.ready()
        ref, engine = rows[0].adapter, self._engine
        seat = self._seats.seat(ref.digest) if ref is not None and ref.kind == "lora" else nullcontext()
        try:
            async with seat, self._inside(ref, alone) as refused:
                if engine is not self._engine:
                    raise EngineChanged
                if refused:
                    yield [RequestFailed(row.id, "adapter", refused) for row in rows]
                    return
                if alone:
                    begun()
                    await asyncio.sleep(_FLUSH_S)
                with self._use.by(sum(map(num_sequences, rows))):
                    async for outcomes in self._run(engine, self._doom, rows):
                        yield outcomes
        except EngineDead as error:
            self._bury(engine, str(error))
            raise

    @asynccontextmanager
    async def _inside(self, ref: AdapterRef | None, alone: bool) -> AsyncIterator[str]:
        """Yields why the adapter cannot be served; "" where it is. Adapters are loaded beside running rows, all that
        anybody waits for at once; weights when nothing is inside."""
        missing, name = not self._engine.serves(ref), ref.digest if ref is not None else ""
        if missing and ref is not None:
            self._refused.pop(name, None)  # a file that was not there may have come
            self._wanted[name] = ref
        if alone:
            async with self._gate.alone():
                await self._load(ref)
                yield self._refused.get(name, "")
            return

        async def prepare() -> None:
            await self._load(ref)

        def needed() -> bool:
            return not self._engine.serves(ref) and name not in self._refused

        def beside() -> bool:
            return ref is not None and ref.kind == "lora" and self._engine.serves(None)

        async with self._gate.shared(prepare if missing else None, needed, beside):
            refused = self._refused.get(name, "")
            if not self._engine.serves(ref) and not refused:
                # Other weights were loaded, or the engine died, while this call stood at the door.
                raise EngineChanged
            yield refused

    async def _load(self, ref: AdapterRef | None) -> None:
        if not self._engine.serves(ref):
            loras = [one for one in self._wanted.values() if one.kind == "lora"]
            others = loras if ref is not None and ref.kind == "lora" else []
            for one in {one.digest if one else "": one for one in (ref, *others)}.values():
                await self._load_one(one)
        for digest in [name for name, one in self._wanted.items() if self._engine.serves(one)]:
            del self._wanted[digest]

    async def _load_one(self, ref: AdapterRef | None) -> None:
        try:
            await self._engine.load_adapter(ref)
        except BadAdapter as error:
            assert ref is not None
            self._refused[ref.digest] = str(error)
            self._wanted.pop(ref.digest, None)

    async def _run(
        self, engine: Engine, doom: asyncio.Future[str], rows: Sequence[Work]
    ) -> AsyncIterator[list[Outcome]]:
        sampled = [row for row in rows if isinstance(row, Request)]
        scored = [row for row in rows if not isinstance(row, Request)]
        for stream in (engine.generate(sampled) if sampled else None, engine.score(scored) if scored else None):
            if stream is not None:
                async for outcomes in _until(doom, stream):
                    yield outcomes

    def doom(self, reason: str) -> None:
        """Gives the engine up: whatever waits for it hears `EngineDead`. Call in the actor's event loop."""
        if not self._doom.done():
            self._doom.set_result(reason)

    # ---- the canary

    async def check(self) -> None:
        """Asks the canary again; an engine that says something else than at its birth is dead."""
        if not self._engine.serves(None) or not self.canary:
            return
        engine = self._engine
        async with self._gate.shared():
            try:
                if engine is self._engine and engine.serves(None) and differs(await self._ask_canary(), self.canary):
                    raise EngineDead("the canary's log-probabilities are not what they were")
            except EngineDead as error:
                self.doom(str(error))  # whoever is inside hears of it
                self._bury(engine, str(error))

    async def _ask_canary(self) -> tuple[float, ...]:
        async for [outcome] in _until(self._doom, self._engine.score([CANARY])):
            return outcome.token_logprobs if isinstance(outcome, Score) else ()
        return ()

    # ---- nights, ends, counts

    async def sleep(self) -> None:
        """Waits until nothing is inside, keeps everything out until `wake`, and gives the accelerator back. Does
        nothing where the engine sleeps already, as `wake` does where it is awake."""
        await self.ready()
        async with self._bed:
            if self._night is None:
                self._night = AsyncExitStack()
                await self._night.enter_async_context(self._gate.alone())
                await self._engine.sleep()
                self._use.sleep(True)

    async def wake(self) -> None:
        async with self._bed:
            if self._night is not None:
                await self._engine.wake()
                self._use.sleep(False)
                await self._night.aclose()
                self._night = None

    async def abort(self, ids: Sequence[str]) -> None:
        await self._engine.abort(ids)

    def stats(self) -> EngineStats:
        busy_s, sequence_s, asleep_s, awake_s = self._use.seconds()
        return replace(
            self._engine.stats(), busy_s=busy_s, sequence_s=sequence_s, asleep_s=asleep_s, awake_s=awake_s,
            sequences=self._use.sequences, life=self._life,
        )  # fmt: skip

    def close(self) -> None:
        self._engine.close()


class EngineChanged(Exception):
    """What a call was let in for is not there any more; it has to ask again. No row is to blame."""


async def _until(doom: asyncio.Future[str], stream: AsyncIterator[list[Outcome]]) -> AsyncIterator[list[Outcome]]:
    """The stream; ends with `EngineDead` when its engine is given up, also where it never answers again."""
    ended: list[Outcome] = []
    while True:
        step: asyncio.Future[Any] = asyncio.ensure_future(anext(stream, ended))
        try:
            await asyncio.wait((step, doom), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = not step.done()
            step.cancel()
        if gone:
            raise EngineDead(doom.result())
        if (outcomes := step.result()) is ended:
            return
        yield outcomes


_FLUSH_S = 0.05
"""Long enough for a word to leave the process before the process may die."""


def differs(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two canaries' log-probabilities are further apart than numerics take them."""
    if not one or not other:
        return bool(one) != bool(other)
    apart = sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
    return not apart <= _CANARY_TOLERANCE  # NaN differs


class _Use:
    """Integrals over time: seconds with a row inside, sequence-seconds in the engine's slots, seconds asleep."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._last = self._born = time.monotonic()
        self._busy_s = self._sequence_s = self._asleep_s = 0.0
        self._asleep = False
        self.sequences = 0

    @contextmanager
    def by(self, sequences: int) -> Iterator[None]:
        self._advance()
        self.sequences += sequences
        try:
            yield
        finally:
            self._advance()
            self.sequences -= sequences

    def sleep(self, asleep: bool) -> None:
        self._advance()
        self._asleep = asleep

    def _advance(self) -> None:
        now = time.monotonic()
        past, self._last = now - self._last, now
        self._busy_s += past * (self.sequences > 0)
        self._sequence_s += past * min(self.sequences, self._slots)
        self._asleep_s += past * self._asleep

    def seconds(self) -> tuple[float, float, float, float]:
        """Busy, sequence, asleep, awake."""
        self._advance()
        return self._busy_s, self._sequence_s, self._asleep_s, self._last - self._born - self._asleep_s


def build_engine(spec: EngineSpec, number: int = 0, life: int = 1) -> Engine:
    """The engine that `spec.kind` names, started in this process."""
    if spec.kind == "simulated":
        from engines.simulated import SimulatedEngine

        return SimulatedEngine(spec, number, life)
    from engines.vllm_engine import VllmEngine

    return VllmEngine(spec)
