"""A sweep from its plan to its outcomes: the session around the jobs, and what an earlier call has left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.files import AnyPath
from selfguide.store import RunStore
from selfguide.sweep.driver import Listen, is_settled, run_jobs
from selfguide.sweep.files import SweepFiles
from selfguide.sweep.jobs import Outcome
from selfguide.sweep.plan import Sweep

if TYPE_CHECKING:
    from selfguide.config import Recipe


def sweep_all(
    planned: Sweep,
    recipe: Recipe,
    out: AnyPath,
    *,
    hear: Listen = lambda event: None,
    retry_failed: bool = False,
    command: Sequence[str] = (),
) -> list[Outcome]:
    """Carries the sweep out in the run folder `out`. Starts no engine where nothing is left to do."""
    return asyncio.run(_sweep(planned, recipe, out, hear, retry_failed, command))


async def _sweep(
    planned: Sweep, recipe: Recipe, out: AnyPath, hear: Listen, retry_failed: bool, command: Sequence[str]
) -> list[Outcome]:
    from selfguide.api import open_session

    files = SweepFiles(RunStore(out, command=command))
    files.write_subject(planned.subject)
    known = files.outcomes()
    if all(is_settled(known.get(job.key), out, retry_failed) for job in planned.jobs):
        return [known[job.key] for job in planned.jobs]

    def progress(_: str, stage: str, counts: dict[str, object]) -> None:
        hear({"event": stage, **counts})

    async with open_session(recipe, progress) as session:
        return await run_jobs(planned.jobs, out, session=session, hear=hear, retry_failed=retry_failed)


def settled_states(planned: Sweep, out: AnyPath, *, retry_failed: bool = False) -> dict[str, str]:
    """By task: "done", "failed", "to do"."""
    known = SweepFiles(RunStore(out, create=False), create=False).outcomes()
    return {
        job.task: known[job.key].state if is_settled(known.get(job.key), out, retry_failed) else "to do"
        for job in planned.jobs
    }
