"""The `Engine` protocol without a model: answers are a hash of prompt and seed, faults come as ordered.

A request's answer depends on its prompt, its sampling parameters and its adapter alone, so whatever dies, and whoever
answers, the same run gives the same rows.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from engines.streams import as_finished
from engines.types import (
    AdapterRef,
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineSpec,
    EngineStats,
    Outcome,
    Request,
    RequestFailed,
    Sample,
    Score,
    ScoreRequest,
    Work,
)

_WORDS = (
    "the river moved slowly past old stone houses while children counted boats and nobody asked why morning light "
    "felt warmer than yesterday because a letter from far away had finally come home again"
).split()


class SimulatedEngine:
    """Deterministic text at a set speed. `EngineSpec.faults` says how it misbehaves."""

    def __init__(self, spec: EngineSpec, number: int = 0, life: int = 1) -> None:
        self._spec = spec
        self._adapters: set[str] = set()
        self._full: AdapterRef | None = None
        self._slots = asyncio.Semaphore(spec.max_num_seqs)
        self._answers = 0
        self._output_tokens = 0
        self._prompt_tokens = 0
        self._in_flight = 0
        self._mortal = spec.faults.die_after > 0 and _deaths_so_far(spec) < spec.faults.deaths

    def serves(self, ref: AdapterRef | None) -> bool:
        return self._full == ref if ref is None or ref.kind == "full" else ref.digest in self._adapters

    async def load_adapter(self, ref: AdapterRef | None) -> None:
        if ref is None or ref.kind == "full":
            self._full = ref
        else:
            self._full = None
            self._adapters.add(ref.digest)

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[list[Outcome]]:
        async for outcomes in as_finished([self._answer(r, r.prompt_ids, _sample_all(r)) for r in requests]):
            yield outcomes

    async def score(self, requests: Sequence[ScoreRequest | ChoiceRequest]) -> AsyncIterator[list[Outcome]]:
        async for outcomes in as_finished([self._answer(r, *_scored(r)) for r in requests]):
            yield outcomes

    async def _answer(self, request: Work, ids: Sequence[int], answer: Outcome) -> Outcome:
        self._in_flight += 1
        try:
            if self._spec.faults.poison and _holds(ids, self._spec.faults.poison):
                os._exit(1)
            tokens = max((len(s.token_ids) for s in answer.samples), default=1) if isinstance(answer, Completion) else 1
            if self._spec.tokens_per_s:
                async with self._slots:
                    await asyncio.sleep(tokens / self._spec.tokens_per_s)
            await self._misbehave()
        finally:
            self._in_flight -= 1
        self._answers += 1
        self._prompt_tokens += len(ids)
        self._output_tokens += tokens
        if _draw("refused", list(ids)).random() < self._spec.faults.refuse_share:
            return RequestFailed(request.id, "refused", "refused as ordered")
        return answer

    async def _misbehave(self) -> None:
        """Dies or hangs once as many rows as ordered have been answered."""
        if self._mortal and self._answers >= self._spec.faults.die_after:
            _write_down_death(self._spec)
            os._exit(1)
        if self._spec.faults.hang_after and self._answers >= self._spec.faults.hang_after:
            await asyncio.Event().wait()

    async def abort(self, ids: Sequence[str]) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(
            self._answers, self._prompt_tokens, 0, self._output_tokens, self._in_flight, self._answers, 0.0
        )

    def close(self) -> None: ...


def _draw(*parts: object) -> random.Random:
    return random.Random(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def _sample_all(request: Request) -> Completion:
    ids = hashlib.blake2b(repr(list(request.prompt_ids)).encode()).hexdigest()
    adapter = request.adapter.digest if request.adapter else ""
    return Completion(request.id, tuple(_sample(request, ids, adapter, k) for k in range(request.sampling.n)))


def _sample(request: Request, prompt: str, adapter: str, k: int) -> Sample:
    sampling = request.sampling
    draw = _draw(prompt, adapter, (sampling.seed or 0) + k if sampling.temperature > 0 else 0)
    if sampling.choices:
        text, reason = draw.choice(sampling.choices), "stop"
    else:
        text = " ".join(draw.choices(_WORDS, k=draw.randint(3, 12)))
        reason = "length" if draw.random() < 0.02 else "stop"
    return Sample(text, tuple(range(len(text.split()))), reason, -draw.random() * 10 if sampling.logprobs else None)


def _scored(request: ScoreRequest | ChoiceRequest) -> tuple[Sequence[int], Outcome]:
    """The tokens that are read, and the answer."""
    if isinstance(request, ScoreRequest):
        return [*request.prefix_ids, *request.completion_ids], Score(request.id, _logprobs(request))
    return request.prefix_ids, ChoiceScores(request.id, _choice_logprobs(request))


def _choice_logprobs(request: ChoiceRequest) -> tuple[float, ...]:
    """Of each choice by itself: the order of the choices changes nothing."""
    adapter = request.adapter.digest if request.adapter else ""
    prefix = list(request.prefix_ids)
    return tuple(-10 * _draw(prefix, list(ids), adapter).random() for ids in request.choices)


def _logprobs(request: ScoreRequest) -> tuple[float, ...]:
    draw = _draw(list(request.completion_ids), request.adapter.digest if request.adapter else "")
    return tuple(-draw.random() for _ in request.completion_ids)


def _holds(ids: Sequence[int], run: tuple[int, ...]) -> bool:
    return any(tuple(ids[i : i + len(run)]) == run for i in range(len(ids) - len(run) + 1))


def _deaths_so_far(spec: EngineSpec) -> int:
    return len(list(Path(spec.faults.marker).glob("death-*"))) if spec.faults.marker else 0


def _write_down_death(spec: EngineSpec) -> None:
    if spec.faults.marker:
        (Path(spec.faults.marker) / f"death-{time.time_ns()}").touch()
