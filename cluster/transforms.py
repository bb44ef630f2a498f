"""Ray Data: one passed function over the row files of many tasks at once.

Rows travel as Parquet paths: a block holds one job, its function reads and writes files, and only counts come back.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import ray.data
from ray import cloudpickle

Job = TypeVar("Job")
Result = TypeVar("Result")


async def transform(function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """`function` of every job, in the order of the jobs; one Ray Data run, one block per job."""
    return await asyncio.to_thread(_run, function, jobs)


def _run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"index": index, "job": cloudpickle.dumps(job)} for index, job in enumerate(jobs)]
    packed = cloudpickle.dumps(function)

    def apply(batch: dict[str, Any]) -> dict[str, Any]:
        work = pickle.loads(packed)
        results = [cloudpickle.dumps(work(pickle.loads(job))) for job in batch["job"]]
        return {"index": batch["index"], "result": results}

    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(apply, batch_size=None)
    rows = sorted(dataset.take_all(), key=lambda row: row["index"])
    return [pickle.loads(row["result"]) for row in rows]
