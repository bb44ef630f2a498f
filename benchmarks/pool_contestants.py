"""Who is timed by `bench_pool`: the pool as a run uses it, and vLLM's `LLM` in two modes. Each in a process of its own,
with its engine warm."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from benchmarks.pool_workloads import Drawer
from engines.types import (
    AdapterRef,
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
from engines.vllm_engine import completion_logprobs, engine_args, sampling_params, scoring_params
from selfguide.records import ACCEPTED, FAILED, Ledger, spent
from selfguide.store import SHARD_ROWS, TOKEN_COUNTS, RunStore, Stage
from selfguide.synthesis import SAMPLE

CONTESTANTS = ("pool", "llm_generate", "fastest")
SCHEMA = pa.schema([
    ("row", pa.int32()), ("id", pa.string()), ("state", pa.string()), ("filter", pa.string()), ("reason", pa.string()),
    ("samples", pa.list_(SAMPLE)), ("token_logprobs", pa.list_(pa.float64())),
])  # fmt: skip
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "RAY_AUTH_MODE": "disabled",
}  # fmt: skip
_TICKS = os.sysconf("SC_CLK_TCK")

Answer = tuple[Any, ...]
"""A checksum of each sample's tokens, or a log-probability of each token."""


@dataclass(frozen=True)
class Setup:
    """What all contestants have alike. `threads` are those of the process that runs the model, on CPUs."""

    spec: EngineSpec
    drawer: Drawer
    threads: int
    on_gpu: bool


@dataclass
class Timing:
    """One workload, once. `cpu_s` are those of the contestant's processes, all together."""

    seconds: float
    cpu_s: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    failed: int
    peak_bytes: int
    answers: dict[str, Answer] = field(repr=False)


@dataclass
class Tally:
    """What is counted of the answers once the clock has stopped."""

    outcomes: list[Outcome]
    prompt_tokens: int
    cached_tokens: int


class Arm(Protocol):
    """A contestant's own part. Only `run` is timed."""

    facts: dict[str, Any]

    def prepare(self, rows: Sequence[Work]) -> None: ...

    def run(self) -> None: ...

    def tally(self) -> Tally: ...


class Contestant:
    """The parent's end: a process that holds one contestant, and does nothing until it is asked."""

    def __init__(self, name: str, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, setup))
        self._process.start()
        theirs.close()
        try:
            self.facts: dict[str, Any] = self._pipe.recv()
        except BaseException:
            self.close()
            raise

    def time(self, workload: str, repeat: int) -> Timing:
        self._pipe.send((workload, repeat))
        timing: Timing = self._pipe.recv()
        return timing

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()


def serve(pipe: Any, name: str, setup: Setup) -> None:
    """The child's end."""
    os.environ.update(_ENVIRONMENT)
    if not setup.on_gpu:
        os.environ["OMP_NUM_THREADS"] = str(setup.threads)
    began = time.perf_counter()
    opened = open_pool(setup) if name == "pool" else open_llm(setup, in_process=name == "fastest")
    with opened as arm:
        pipe.send({**arm.facts, "start_s": round(time.perf_counter() - began, 2)})
        while (order := pipe.recv()) is not None:
            arm.prepare(setup.drawer.rows(*order))
            cpu_s, began = tree_cpu_s(), time.perf_counter()
            arm.run()
            seconds, cpu_s = time.perf_counter() - began, tree_cpu_s() - cpu_s
            pipe.send(describe(arm.tally(), seconds, cpu_s))


def describe(tally: Tally, seconds: float, cpu_s: float) -> Timing:
    return Timing(
        seconds, cpu_s, sum(spent(one).get("output_tokens", 0) for one in tally.outcomes), tally.prompt_tokens,
        tally.cached_tokens, sum(isinstance(one, RequestFailed) for one in tally.outcomes),
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {one.id: answer_of(one) for one in tally.outcomes},
    )  # fmt: skip


def answer_of(outcome: Outcome) -> Answer:
    if isinstance(outcome, Completion):
        return tuple(zlib.crc32(str(list(sample.token_ids)).encode()) for sample in outcome.samples)
    return outcome.token_logprobs if isinstance(outcome, Score) else ()


# ---- the pool


@contextmanager
def open_pool(setup: Setup) -> Iterator[Arm]:
    """An engine actor and its client, as `selfguide.api.open_session` makes them."""
    from cluster.fleet import start_engines, stop_engines
    from cluster.placement import ClusterSpec, place
    from cluster.session import ray_session

    cluster = ClusterSpec(engine_cpus=setup.threads)
    with ray_session(cluster) as nodes, asyncio.Runner() as loop, tempfile.TemporaryDirectory() as folder:
        fleet = loop.run(start_engines(setup.spec, cluster, place(cluster, setup.spec.tensor_parallel, nodes)))
        arm = PoolArm(loop, fleet, RunStore(Path(folder) / "run"))
        try:
            yield arm
        finally:
            loop.run(arm.pool.close())
            stop_engines(fleet)


class PoolArm:
    """From rows to stored rows; stages and counters are looked up outside the clock."""

    def __init__(self, loop: asyncio.Runner, fleet: Any, store: RunStore) -> None:
        from cluster.pool import Pool

        self.facts: dict[str, Any] = {}
        self.pool = Pool(fleet)
        self._loop, self._store = loop, store
        self._stages: list[tuple[Stage, list[Work]]] = []
        self._outcomes: list[Outcome] = []
        self._before = self._stats()

    def _stats(self) -> EngineStats:
        return self._loop.run(self.pool.stats())[0]

    def prepare(self, rows: Sequence[Work]) -> None:
        self._stages, self._before = make_stages(self._store, rows), self._stats()

    def run(self) -> None:
        self._outcomes = self._loop.run(fill_stages(self.pool, self._stages))

    def tally(self) -> Tally:
        now, before = self._stats(), self._before
        prompt_tokens, cached_tokens = (
            now.prompt_tokens - before.prompt_tokens,
            now.cached_tokens - before.cached_tokens,
        )
        return Tally(self._outcomes, prompt_tokens, cached_tokens)


def make_stages(store: RunStore, rows: Sequence[Work]) -> list[tuple[Stage, list[Work]]]:
    """A stage for each student among the rows, as a run has it."""

    def student(row: Work) -> str:
        return row.adapter.digest if row.adapter else ""

    groups = [(name, list(group)) for name, group in groupby(sorted(rows, key=student), key=student)]
    return [(store.task(f"task-{name}").stage("rows", {"first": group[0].id}), group) for name, group in groups]


async def fill_stages(pool: Any, stages: Sequence[tuple[Stage, Sequence[Work]]]) -> list[Outcome]:
    filled = await asyncio.gather(*(fill_stage(pool, stage, rows) for stage, rows in stages))
    return [outcome for outcomes in filled for outcome in outcomes]


async def fill_stage(pool: Any, stage: Stage, requests: Sequence[Work]) -> list[Outcome]:
    """As `selfguide.evaluation` does it: answers are parsed as they come, and stored in shards, in order."""
    place = {request.id: row for row, request in enumerate(requests)}
    rows: list[dict[str, Any]] = [{} for _ in requests]
    tokens = dict.fromkeys(TOKEN_COUNTS, 0)
    outcomes: list[Outcome] = []
    committed = 0
    with stage.writing():
        async with pool.channel(stage.fingerprint, stage.log, stage.suspects()) as channel:
            channel.send(requests)
            while len(outcomes) < len(rows):
                for outcome in await channel.receive():
                    outcomes.append(outcome)
                    rows[place[outcome.id]] = parse(place[outcome.id], outcome)
                    for name, count in spent(outcome).items():
                        tokens[name] += count
                while (end := min(committed + SHARD_ROWS, len(rows))) > committed and all(rows[committed:end]):
                    stage.commit(rows[committed:end], SCHEMA)
                    stage.log({"event": "shard", "rows": end, **tokens})
                    committed = end
        stage.finish(None, SCHEMA, Ledger.of(rows), **stage.tokens())
    return outcomes


def parse(row: int, outcome: Outcome) -> dict[str, Any]:
    blank = dict.fromkeys(SCHEMA.names) | {"row": row, "id": outcome.id, "state": ACCEPTED}
    if isinstance(outcome, RequestFailed):
        return blank | {"state": FAILED, "filter": outcome.error, "reason": outcome.message}
    if isinstance(outcome, Completion):
        return blank | {"samples": [
            {"text": s.text.strip(), "finish_reason": s.finish_reason, "tokens": len(s.token_ids), "logprob": s.logprob}
            for s in outcome.samples
        ]}  # fmt: skip
    assert isinstance(outcome, Score)
    return blank | {"token_logprobs": outcome.token_logprobs}


# ---- vLLM alone


@contextmanager
def open_llm(setup: Setup, *, in_process: bool) -> Iterator[Arm]:
    """`vllm.LLM` with the pool's arguments. `in_process`: no process for the engine's core, nothing is sent."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process))
    from vllm import LLM

    llm = LLM(**engine_args(setup.spec, Path(setup.spec.model)))
    try:
        yield LlmArm(llm, setup.drawer.adapters)
    finally:
        llm.llm_engine.engine_core.shutdown()


class LlmArm:
    """From prompts and parameters, which are made before the clock runs, to vLLM's outputs and checked scores."""

    def __init__(self, llm: Any, adapters: Sequence[AdapterRef]) -> None:
        from vllm.lora.request import LoRARequest

        self.facts: dict[str, Any] = {"block_size": llm.llm_engine.vllm_config.cache_config.block_size}
        self._llm = llm
        self._loras = {
            ref.digest: LoRARequest(lora_name=ref.digest, lora_int_id=number, lora_path=ref.url)
            for number, ref in enumerate(adapters, 1)
        }
        self._rows: Sequence[Work] = []
        self._arguments: list[tuple[Any, Any, Any]] = []
        self._outputs: list[Any] = []
        self._scores: dict[int, list[float] | None] = {}

    def prepare(self, rows: Sequence[Work]) -> None:
        self._rows, self._scores = rows, {}
        self._arguments = [
            (
                {"prompt_token_ids": prompt_of(row)},
                params_of(row),
                self._loras[row.adapter.digest] if row.adapter else None,
            )
            for row in rows
        ]

    def run(self) -> None:
        self._outputs = self._generate(range(len(self._rows)))
        self._check(zip(range(len(self._rows)), self._outputs, strict=True))
        if again := [number for number, score in self._scores.items() if score is None]:
            for number in again:
                self._arguments[number][1].skip_reading_prefix_cache = True
            self._check(zip(again, self._generate(again), strict=True))

    def _generate(self, numbers: Sequence[int]) -> list[Any]:
        prompts, params, loras = (list(column) for column in zip(*(self._arguments[i] for i in numbers), strict=True))
        return list(self._llm.generate(prompts, params, use_tqdm=False, lora_request=loras if any(loras) else None))

    def _check(self, outputs: Iterable[tuple[int, Any]]) -> None:
        for number, output in outputs:
            row = self._rows[number]
            if isinstance(row, ScoreRequest):
                self._scores[number] = completion_logprobs(output, row)

    def tally(self) -> Tally:
        outcomes = [outcome_of(row, output, self._scores.get(i))
                    for i, (row, output) in enumerate(zip(self._rows, self._outputs, strict=True))]  # fmt: skip
        prompt_tokens = sum(len(output.prompt_token_ids) for output in self._outputs)
        return Tally(outcomes, prompt_tokens, sum(output.num_cached_tokens or 0 for output in self._outputs))


def prompt_of(row: Work) -> list[int]:
    if isinstance(row, Request):
        return list(row.prompt_ids)
    assert isinstance(row, ScoreRequest)
    return [*row.prefix_ids, *row.completion_ids]


def params_of(row: Work) -> Any:
    if isinstance(row, Request):
        return sampling_params(row.sampling)
    assert isinstance(row, ScoreRequest)
    return scoring_params(len(row.completion_ids))


def outcome_of(row: Work, output: Any, score: Sequence[float] | None) -> Outcome:
    if isinstance(row, ScoreRequest):
        return Score(row.id, tuple(score)) if score else RequestFailed(row.id, "refused", "no log-probabilities")
    samples = tuple(Sample(one.text, list(one.token_ids), str(one.finish_reason)) for one in output.outputs)
    return Completion(row.id, samples)


# ---- what processes cost


def tree_cpu_s(pid: int | None = None) -> float:
    """CPU seconds of this process, or that one, and of all below it."""
    pids, total = [pid or os.getpid()], 0.0
    while pids:
        one = pids.pop()
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / _TICKS
            for path in Path(f"/proc/{one}/task").glob("*/children"):
                pids += map(int, path.read_text(encoding="ascii").split())
    return total
