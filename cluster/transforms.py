"""Ray Data: one passed function over the row files of many tasks at once.

Rows travel as Parquet paths: a block holds one job, its function reads and writes files, and only counts come back.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

MOST_JOBS = 64
"""In one run; the others wait for the next."""
_JOBS_A_BLOCK = 8
"""A block is a task of Ray's, which costs as much as some jobs do."""


class TransformFailed(Exception):
    """The function raised; what, and where, is in the text."""


class Transforms:
    """Runs one passed function over jobs as they come up. One run at a time: what becomes ready meanwhile goes together
    in the next, so that a task alone waits for nobody and a thousand share the cost. Of one event loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[Any], Any], Any, asyncio.Future[Any]]] = []
        self._running: asyncio.Task[None] | None = None

    async def apply(self, function: Callable[[Job], Result], job: Job) -> Result:
        """`function(job)`, in a worker of Ray Data. Raises `TransformFailed` where it raises; the others go on."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((function, job, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run_all())
        return await answer

    async def _run_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST_JOBS], self._waiting[MOST_JOBS:]
            try:
                results = await asyncio.to_thread(_run, [(function, job) for function, job, _ in batch])
            except Exception as error:  # Ray Data itself: whoever waits is told
                results = [(False, f"{type(error).__name__}: {error}")] * len(batch)
            for (_, _, answer), (succeeded, result) in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result) if succeeded else answer.set_exception(TransformFailed(result))


def _run(calls: Sequence[tuple[Callable[[Any], Any], Any]]) -> list[tuple[bool, Any]]:
    import ray.data
    from ray import cloudpickle

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its import sets another
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"index": index, "call": cloudpickle.dumps(call)} for index, call in enumerate(calls)]
    blocks = -(-len(items) // _JOBS_A_BLOCK)
    dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(_apply, batch_size=None)
    rows = sorted(dataset.take_all(), key=lambda row: row["index"])
    return [pickle.loads(row["result"]) for row in rows]


def _apply(batch: dict[str, Any]) -> dict[str, Any]:
    from ray import cloudpickle

    return {"index": batch["index"], "result": [cloudpickle.dumps(_call(*pickle.loads(one))) for one in batch["call"]]}


def _call(function: Callable[[Any], Any], job: Any) -> tuple[bool, Any]:
    try:
        return True, function(job)
    except Exception:
        return False, traceback.format_exc()
