"""The runner's side of a sweep: what jobs share in one process, and how one of them is carried out."""

from __future__ import annotations

import asyncio
import importlib
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from cluster.pool import EnginesLost, Pool
from cluster.runners import Hear, Worker
from cluster.transforms import Transforms
from engines.files import locate
from engines.tokenizer import spare_pytorch
from selfguide.errors import StageBusy, TaskFailed, UserError
from selfguide.store import RunStore
from selfguide.store.lease import SILENT_S
from selfguide.sweep.jobs import Job, Outcome
from selfguide.taskrun import TaskRun
from selfguide.tasks import Task, load_task

if TYPE_CHECKING:
    from cluster.fleet import Fleet
    from cluster.trainers import Trainers
    from selfguide.config import Engine, Model, Recipe


_BUSY_POLL_S = 2.0


@dataclass(frozen=True)
class Setting:
    """What a runner is given; it travels."""

    out: str
    fleet: Fleet
    trainers: Trainers
    recipe: Recipe


@asynccontextmanager
async def open_desk(setting: Setting, hear: Hear) -> AsyncIterator[Worker]:
    """One client of the engines, a student for each model that jobs name, curation of many tasks at once."""
    from selfguide.api import load_student

    spare_pytorch()
    pool, store, transforms = Pool(setting.fleet), RunStore(locate(setting.out)), Transforms()
    students = {_speaks(setting.recipe): await asyncio.to_thread(load_student, setting.recipe)}

    def task_run(job: Job, task: Task) -> TaskRun:
        def progress(_: str, stage: str, counts: Mapping[str, Any]) -> None:
            over = counts.get("of") is not None and counts.get("rows", 0) >= counts["of"]
            hear(job.key, stage, {} if over else counts)

        if (key := _speaks(job.recipe)) not in students:
            students[key] = load_student(job.recipe)
        return TaskRun(
            task, job.recipe, students[key], pool, setting.trainers, store.task(task.name), progress, transforms,
        )  # fmt: skip

    try:
        yield Worker(lambda job: carry_out(job, task_run), lambda: asdict(pool.counts), lambda: pool.room)
    finally:
        await pool.close()


def _speaks(recipe: Recipe) -> tuple[Model, Engine]:
    """What a student follows from."""
    return recipe.model, recipe.engine


async def carry_out(job: Job, task_run: Callable[[Job, Task], TaskRun]) -> Outcome:
    """One job to its end, whatever that is; never raises what only concerns this job."""
    from selfguide.api import check_run

    began = time.time()

    def end(state: Any, **fields: Any) -> Outcome:
        return Outcome(job.key, job.task, job.recipe.name, job.method, state, began=began, ended=time.time(), **fields)

    try:
        task = load_task(job.source, kind=job.kind, labels_from=job.labels_from)
        if task.digest != job.task_digest:
            raise UserError(f"{job.source}: was changed while the sweep went on; run the same command again")
        run = task_run(job, task)
        check_run(run)
    except UserError as error:
        return end("failed", error="UserError", reason=str(error))
    try:
        result = await _outwait(method_of(job.method), run, job)
    except (UserError, EnginesLost) as error:
        return end("stopped", error=type(error).__name__, reason=str(error))
    except TaskFailed as error:
        return end("failed", error="TaskFailed", reason=str(error), stages=run.store.made)
    except Exception as error:  # a bug in one task's way must not end the other thousand: it is told with its traceback
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return end("failed", error=type(error).__name__, reason=reason, traceback=traceback.format_exc())
    return end("done", result=result, stages=run.store.made)


async def _outwait(method: Callable[..., Any], run: TaskRun, job: Job) -> Any:
    """A runner that died may hold a stage's lease for as long as nobody can be sure of its death."""
    due = time.monotonic() + SILENT_S + _BUSY_POLL_S
    while True:
        try:
            return await method(run, **job.options)
        except StageBusy:
            if time.monotonic() > due:
                raise
            await asyncio.sleep(_BUSY_POLL_S)


@cache
def method_of(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
