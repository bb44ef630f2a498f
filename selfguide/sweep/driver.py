"""The driver's side of a sweep: deals jobs, writes down what became of them, and tells how it gets on."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.fleet import engine_stats
from cluster.runners import Heard, RunnerDied, Runners, open_runners, rss_bytes
from engines.files import AnyPath
from selfguide.environment import environment
from selfguide.errors import TaskFailed, UserError
from selfguide.store import RunStore
from selfguide.sweep.desk import Setting, open_desk
from selfguide.sweep.files import SweepFiles
from selfguide.sweep.jobs import Job, Outcome

if TYPE_CHECKING:
    from engines.types import EngineStats
    from selfguide.api import Session
    from selfguide.config import Recipe

Listen = Callable[[Mapping[str, Any]], None]
"""Hears every event as `docs/report.md` lists them."""

_POLL_S = 1.0
_TOTALS_S = 10.0
MOST_TASKS_A_RUNNER = 128
"""Each task under way holds its file's rows in memory, some megabytes."""
_AHEAD = 4.0
"""Rows that tasks could have under way at once, in multiples of the slots: windows take 1.75, and not all of a task's
stages have rows to send."""
_IDLE_SHARE = 0.02
"""Of all slots; where more are empty, more tasks are begun."""


async def run_jobs(
    jobs: Sequence[Job],
    out: AnyPath,
    *,
    session: Session,
    hear: Listen = lambda event: None,
    retry_failed: bool = False,
) -> list[Outcome]:
    """Every job's outcome, in the jobs' order; those that earlier calls brought to an end are read, not made again.

    A job that fails does not end the others. Raises `UserError` or `TaskFailed` for what concerns all of them: a full
    disk, no engine left. Whatever ends it, the same call goes on from there.
    """
    files = SweepFiles(RunStore(out))
    known = files.outcomes()
    settled = {job.key: known[job.key] for job in jobs if is_settled(known.get(job.key), out, retry_failed)}
    left = sorted((job for job in jobs if job.key not in settled), key=lambda job: -job.cost)
    if left:
        watch = _Watch(jobs, settled, files, hear)
        setting = Setting(str(out.resolve()), session.fleet, session.trainers, session.recipe)
        async with open_runners(session.recipe.cluster, open_desk, setting) as runners:
            await _carry_all(runners, {job.key: job for job in left}, watch, session)
    return [settled[job.key] for job in jobs]


def is_settled(outcome: Outcome | None, out: AnyPath, retry_failed: bool) -> bool:
    """Whether a job with this last outcome is not to be carried out (again).

    A method whose result has something under `failed` came to an end, but not with all of its parts.
    """
    if outcome is None:
        return False
    result = outcome.result or {}
    if outcome.state == "failed" or result.get("failed"):
        return not retry_failed
    place = result.get("comparison")
    return place is None or (out / place / "done.json").is_file()


async def _carry_all(runners: Runners, left: Mapping[str, Job], watch: _Watch, session: Session) -> None:
    pace = _Pace(session.recipe)
    runners.limit = pace.limit
    polling = asyncio.create_task(_poll(runners, watch, pace, session))
    dealing = asyncio.create_task(
        runners.run(left.items(), lambda key, result: watch.settle(left[key], _outcome(left[key], result)))
    )
    stopped = True
    watch.begin(session)
    try:
        await asyncio.wait({dealing, polling}, return_when=asyncio.FIRST_COMPLETED)
        (polling if polling.done() else dealing).result()
        stopped = False
    finally:
        for task in (dealing, polling):
            task.cancel()
        await asyncio.gather(dealing, polling, return_exceptions=True)
        await _look(runners, watch, session)
        watch.end(stopped=stopped)


def _outcome(job: Job, result: Any) -> Outcome:
    if isinstance(result, RunnerDied):
        return Outcome(
            job.key, job.task, job.recipe.name, job.method, "failed", "RunnerDied", str(result), ended=time.time()
        )
    assert isinstance(result, Outcome)
    return result


async def _poll(runners: Runners, watch: _Watch, pace: _Pace, session: Session) -> None:
    while True:
        await asyncio.sleep(_POLL_S)
        heard = await _look(runners, watch, session)
        runners.limit = pace.adapt(sum(one.room for one in heard), runners)
        watch.tell()


async def _look(runners: Runners, watch: _Watch, session: Session) -> list[Heard]:
    (heard, counts), stats = await asyncio.gather(runners.heard(), engine_stats(session.fleet))
    watch.take(heard, counts, stats, runners)
    return heard


class _Pace:
    """How many tasks are under way: as many as fill the engines' slots, more where those stay empty.

    Tasks that wait for a trainer fill no engine; the engines then work ahead on others.
    """

    def __init__(self, recipe: Recipe) -> None:
        cluster = recipe.cluster
        self._slots = cluster.num_engines * recipe.engine.max_num_seqs
        per_task = min(recipe.synthesis.lag, recipe.synthesis.num_candidates)
        start = math.ceil(_AHEAD * self._slots / per_task) + 2 * cluster.num_trainers
        self._most = cluster.tasks_in_flight or max(2 * start, MOST_TASKS_A_RUNNER * cluster.num_runners)
        self.limit = min(max(4, start), self._most)

    def adapt(self, room: int, runners: Runners) -> int:
        if runners.num_waiting and runners.num_running >= self.limit and room > _IDLE_SHARE * self._slots:
            self.limit = min(self._most, self.limit + max(1, self.limit // 16))
        return self.limit


@dataclass
class _Sums:
    """What engines have done, over all their lives: an engine that starts again counts from zero."""

    busy_s: float = 0.0
    awake_s: float = 0.0
    sequence_s: float = 0.0
    starved_s: float = 0.0
    """Idle, awake, while tasks were waiting to be dealt."""


class _Watch:
    """What the driver knows: counts and paths."""

    def __init__(self, jobs: Sequence[Job], settled: dict[str, Outcome], files: SweepFiles, hear: Listen) -> None:
        self._jobs, self._settled, self._files, self._hear = jobs, settled, files, hear
        self._total_cost = sum(job.cost for job in jobs)
        self._done_cost = sum(job.cost for job in jobs if job.key in settled)
        self._began = self._told = time.monotonic()
        self._sums = _Sums()
        self._last: dict[int, EngineStats] = {}
        self._heard: list[Heard] = []
        self._counts: Counter[str] = Counter()
        self._running = self._waiting = self._runner_deaths = 0

    def begin(self, session: Session) -> None:
        cluster = session.recipe.cluster
        self._record({
            "event": "session_began", "engines": cluster.num_engines, "runners": cluster.num_runners,
            "trainers": cluster.num_trainers, "start_s": round(session.start_s, 3), "environment": environment(),
        })  # fmt: skip

    def settle(self, job: Job, outcome: Outcome) -> None:
        """Raises what ends the sweep; anything else is written down."""
        if outcome.state == "stopped":
            error = UserError if outcome.error == "UserError" else TaskFailed
            raise error(f"{outcome.reason}; the same command goes on from here")
        self._files.add_outcome(outcome)
        self._settled[job.key] = outcome
        self._done_cost += job.cost
        self._hear({"event": "task", "task": job.task, "state": outcome.state, "reason": outcome.reason})

    def take(
        self, heard: list[Heard], counts: Counter[str], stats: Sequence[EngineStats | None], runners: Runners
    ) -> None:
        self._heard, self._counts = heard, counts
        self._running, self._waiting, self._runner_deaths = runners.num_running, runners.num_waiting, runners.num_deaths
        for number, now in enumerate(stats):
            if now is None:
                continue
            last = self._last.get(number)
            new = last is None or now.awake_s + now.asleep_s < last.awake_s + last.asleep_s
            then = replace(now, busy_s=0.0, awake_s=0.0, sequence_s=0.0) if new or last is None else last
            if last is None:
                then = now  # what it did before the sweep is not the sweep's
            busy_s, awake_s = now.busy_s - then.busy_s, now.awake_s - then.awake_s
            self._sums.busy_s += busy_s
            self._sums.awake_s += awake_s
            self._sums.sequence_s += now.sequence_s - then.sequence_s
            self._sums.starved_s += max(0.0, awake_s - busy_s) if runners.num_waiting else 0.0
            self._last[number] = now

    def tell(self) -> None:
        """Once a second to whoever listens, now and then to the disk."""
        stages: dict[str, dict[str, int]] = {}
        for one in self._heard:
            for stage, (tasks, rows) in one.active.items():
                into = stages.setdefault(stage, {"tasks": 0, "rows": 0})
                into["tasks"] += tasks
                into["rows"] += rows
        self._hear({"event": "stages", "active": stages})
        if time.monotonic() - self._told >= _TOTALS_S:
            self._told = time.monotonic()
            self._record(self._totals())
        else:
            self._hear(self._totals())

    def _totals(self) -> dict[str, Any]:
        failed = sum(one.state == "failed" for one in self._settled.values())
        counts = self._counts
        return {
            "event": "totals", "tasks": len(self._jobs), "done": len(self._settled) - failed, "failed": failed,
            "running": self._running, "waiting": self._waiting,
            "cost_done": self._done_cost, "cost_total": self._total_cost,
            "rows": counts["answered"], "prompt_tokens": counts["prompt_tokens"],
            "output_tokens": counts["output_tokens"], "cached_tokens": counts["cached_tokens"],
            "engine_deaths": counts["deaths"], "stale": counts["stale"], "poisoned": counts["poisoned"],
            "runner_deaths": self._runner_deaths,
            "engine_busy_s": round(self._sums.busy_s, 3), "engine_awake_s": round(self._sums.awake_s, 3),
            "engine_sequence_s": round(self._sums.sequence_s, 3), "engine_starved_s": round(self._sums.starved_s, 3),
            "driver_rss_bytes": rss_bytes(), "runner_rss_bytes": [one.rss_bytes for one in self._heard],
            "runner_cpu_s": [round(one.cpu_s, 3) for one in self._heard],
            "seconds": round(time.monotonic() - self._began, 3),
        }  # fmt: skip

    def end(self, *, stopped: bool) -> None:
        self._record(self._totals())
        seconds = round(time.monotonic() - self._began, 3)
        self._record({"event": "session_ended", "seconds": seconds, "stopped": stopped})

    def _record(self, event: Mapping[str, Any]) -> None:
        self._files.add_event(event)
        self._hear(event)
