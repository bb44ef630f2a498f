"""The `Engine` protocol without a model: deterministic answers at a set speed, and faults as ordered.

Hundreds of these engines share a process, so no row has a task or a timer of its own: each engine keeps the moments at
which its sequences end in a heap, and looks at it at most once in `TICK_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from math import ceil, exp, inf, log
from pathlib import Path
from statistics import NormalDist

from engines.simulated_answers import PrefixCache, Prompt, answer, length_table, pack
from engines.types import (
    AdapterRef,
    ChoiceRequest,
    EngineDead,
    EngineSpec,
    EngineStats,
    Outcome,
    Request,
    RequestFailed,
    ScoreRequest,
    Work,
)

TICK_S = 0.02
"""Engines of one process deliver at the same multiples of this, so that their outcomes can travel together."""
_PULSE_S = 1.0
"""An engine with work makes a step at least this often."""


@dataclass(eq=False, slots=True)
class _Call:
    """One `generate` or `score`: what has finished and was not yet taken, and how many rows are to come."""

    left: int
    finished: list[Outcome] = field(default_factory=list)
    waiter: asyncio.Future[None] | None = None


@dataclass(eq=False, slots=True)
class _Row:
    """A request on its way. Once it is begun it has its outcome, which is told when its last sequence ends."""

    work: Work
    call: _Call
    outcome: Outcome | None = None
    lengths: Sequence[int] = ()
    num_begun: int = 0
    num_ended: int = 0
    ready: float = 0.0
    """When its prompt is read, in the loop's time."""


class SimulatedEngine:
    """One engine: `spec.max_num_seqs` sequences at a time, first come, first served.

    `number` is its own in the whole cluster, `life` counts how often it was built in this process; both seed what
    happens to it. It never ends the process: once dead, it raises `EngineDead` from every call, pending and later.
    Whoever builds it waits `start_s` before it serves. Use from one event loop; `stats` may be called by any thread.
    """

    def __init__(self, spec: EngineSpec, number: int = 0, life: int = 1) -> None:
        faults, simulation = spec.faults, spec.simulation
        slow = faults.slow_factor if _uniform(spec.seed, number, "slow") < faults.slow_share else 1.0
        self.start_s = slow * simulation.start_s * _lognormal(simulation.start_spread, spec.seed, number, life)
        self._spec, self._life = spec, life
        self._token_s = slow / spec.tokens_per_s if spec.tokens_per_s else 0.0
        self._prefill_s = slow / simulation.prefill_tokens_per_s if simulation.prefill_tokens_per_s else 0.0
        self._load_s = slow * simulation.adapter_load_s
        self._life_s = -log(1 - _uniform(spec.seed, number, life, "life")) * faults.mean_life_s or inf
        self._dies_at: float | None = None
        self._mortal = faults.die_after > 0 and self._deaths_so_far() < faults.deaths
        self._poison = pack(faults.poison)
        self._death = ""
        self._hangs = False
        self._lengths = length_table(simulation.answer_tokens, simulation.answer_spread)
        self._cache = PrefixCache(simulation.prefix_cache_tokens)
        self._adapters: set[str] = set()
        self._full: AdapterRef | None = None
        self._waiting: deque[_Row] = deque()
        self._running: list[tuple[float, int, _Row]] = []
        self._free = spec.max_num_seqs
        self._prefilled = 0.0
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._waiters: set[asyncio.Future[None]] = set()
        self._num_begun = 0
        self._answers = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._in_flight = self._steps = 0

    # ---- the protocol

    def serves(self, ref: AdapterRef | None) -> bool:
        if ref is None or ref.kind == "full":
            return self._full == ref
        return self._full is None and ref.digest in self._adapters

    async def load_adapter(self, ref: AdapterRef | None) -> None:
        self._turn()
        self._check_alive()
        if self._load_s:
            waiter = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(self._load_s, _wake, waiter)
            await self._wait(waiter)
            self._turn()
            self._check_alive()
        self._full = ref if ref is not None and ref.kind == "full" else None
        if ref is not None and ref.kind == "lora":
            self._adapters.add(ref.digest)

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[list[Outcome]]:
        async for outcomes in self._run(requests):
            yield outcomes

    async def score(self, requests: Sequence[ScoreRequest | ChoiceRequest]) -> AsyncIterator[list[Outcome]]:
        async for outcomes in self._run(requests):
            yield outcomes

    async def abort(self, ids: Sequence[str]) -> None:
        """Stops these requests; each fails at once."""
        gone = frozenset(ids)
        for row in self._take_out(lambda row: row.work.id in gone):
            self._tell(row.call, RequestFailed(row.work.id, "refused", "aborted"))
        self._turn()

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(
            self._answers, self._prompt_tokens, self._cached_tokens, self._output_tokens, self._in_flight,
            self._steps, self.start_s,
        )  # fmt: skip

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # ---- calls

    async def _run(self, requests: Sequence[Work]) -> AsyncIterator[list[Outcome]]:
        self._check_alive()
        call = _Call(len(requests))
        self._enqueue(call, requests)
        try:
            while call.left:
                if not call.finished and not self._death:
                    call.waiter = asyncio.get_running_loop().create_future()
                    await self._wait(call.waiter)
                self._check_alive()
                outcomes, call.finished = call.finished, []
                call.left -= len(outcomes)
                yield outcomes
        finally:
            if call.left and not self._death:  # the caller has gone
                self._take_out(lambda row: row.call is call)
                self._turn()

    async def _wait(self, waiter: asyncio.Future[None]) -> None:
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _check_alive(self) -> None:
        if self._death:
            raise EngineDead(self._death)

    def _enqueue(self, call: _Call, requests: Sequence[Work]) -> None:
        """The rows come after all that has happened until now."""
        self._turn()
        if self._poison and any(_holds(Prompt(one).content, self._poison) for one in requests):
            self._die("a prompt was poison")
        self._check_alive()
        self._waiting.extend([_Row(one, call) for one in requests])
        self._in_flight += len(requests)
        self._turn()

    def _take_out(self, gone: Callable[[_Row], bool]) -> set[_Row]:
        running = [entry for entry in self._running if gone(entry[2])]
        rows = {row for row in self._waiting if gone(row)} | {row for _, _, row in running}
        if rows:
            self._waiting = deque(row for row in self._waiting if row not in rows)
            self._running = [entry for entry in self._running if entry[2] not in rows]
            heapify(self._running)
            self._free += len(running)
            self._in_flight -= len(rows)
        return rows

    # ---- time

    def _turn(self, due: float = 0.0) -> None:
        """Lets happen, in its order, all that was due until now. Loops call a little before the time that was set."""
        if self._death or self._hangs:
            return
        now = max(asyncio.get_running_loop().time(), due)
        if self._dies_at is None:
            self._dies_at = now + self._life_s
        until = min(now, self._dies_at)
        self._steps += 1
        self._begin(until)
        while self._running and self._running[0][0] <= until:
            moment, _, row = heappop(self._running)
            self._free += 1
            row.num_ended += 1
            if row.num_ended == len(row.lengths) and not self._finish(row):
                return
            self._begin(moment)
        if until == self._dies_at:
            self._die("its time had come")
        else:
            self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        """For the next sequence that ends, the next pulse or death, whichever is first."""
        if not self._running:
            return
        assert self._dies_at is not None
        end = self._running[0][0]
        due = min(max(end, ceil(end / TICK_S) * TICK_S), self._dies_at, now + _PULSE_S)
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due  # not the handle's `when`: uvloop's has none where the moment is past
        self._timer = asyncio.get_running_loop().call_at(due, self._on_timer, due)

    def _on_timer(self, due: float) -> None:
        self._timer = None
        self._turn(due)

    def _begin(self, moment: float) -> None:
        """Gives the free slots to whoever waits longest, a sequence each."""
        while self._free and self._waiting:
            row = self._waiting[0]
            if not row.num_begun:
                self._read(row, moment)
            end = max(moment, row.ready) + row.lengths[row.num_begun] * self._token_s
            row.num_begun += 1
            if row.num_begun == len(row.lengths):
                self._waiting.popleft()
            self._free -= 1
            self._num_begun += 1
            heappush(self._running, (end, self._num_begun, row))

    def _read(self, row: _Row, moment: float) -> None:
        """Reads the prompt, after those before it, and works out the answer."""
        work, faults = row.work, self._spec.faults
        prompt = Prompt(work)
        cached = self._cache.read(prompt, work.adapter)
        wrong = faults.wrong_after and self._answers >= faults.wrong_after
        row.outcome, row.lengths = answer(
            work, prompt, self._lengths, refuse_share=faults.refuse_share, salt=b"wrong" if wrong else b"",
            cached_tokens=cached,
        )  # fmt: skip
        self._prefilled = max(self._prefilled, moment) + (prompt.num_tokens - cached) * self._prefill_s
        row.ready = self._prefilled
        self._prompt_tokens += prompt.num_tokens
        self._cached_tokens += cached

    # ---- ends

    def _finish(self, row: _Row) -> bool:
        """Whether the engine is still in order."""
        if not self._behaves():
            return False
        assert row.outcome is not None
        self._answers += 1
        self._in_flight -= 1
        self._output_tokens += sum(row.lengths)
        self._tell(row.call, row.outcome)
        return True

    def _tell(self, call: _Call, outcome: Outcome) -> None:
        call.finished.append(outcome)
        if call.waiter is not None:
            _wake(call.waiter)

    def _behaves(self) -> bool:
        """Dies or hangs once as many rows as ordered have been answered."""
        faults = self._spec.faults
        if self._mortal and self._answers >= faults.die_after:
            if faults.marker:
                (Path(faults.marker) / f"death-{time.time_ns()}").touch()
            self._die(f"it has answered {self._answers} rows")
        elif faults.nan_after and self._answers >= faults.nan_after:
            self._die("log-probabilities are NaN")
        elif faults.hang_after and self._answers >= faults.hang_after:
            self._hangs = True
        return not self._death and not self._hangs

    def _die(self, reason: str) -> None:
        self._death = reason
        self._waiting.clear()
        self._running.clear()
        self._in_flight = 0
        self.close()
        for waiter in self._waiters:
            _wake(waiter)

    def _deaths_so_far(self) -> int:
        marker = self._spec.faults.marker
        return len(list(Path(marker).glob("death-*"))) if marker else self._life - 1


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _holds(content: bytes, run: bytes) -> bool:
    """Whether the token ids of `run` follow each other in `content`, both packed."""
    width = len(pack([0]))
    found = content.find(run)
    while found % width and found >= 0:
        found = content.find(run, found + 1)
    return found >= 0


def _uniform(*parts: object) -> float:
    """0 to 1, neither of them."""
    draw = int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
    return ((draw >> 12) + 0.5) / 2**52


def _lognormal(spread: float, *parts: object) -> float:
    """Mean 1."""
    return exp(spread * NormalDist().inv_cdf(_uniform(*parts, "start")) - spread**2 / 2)
