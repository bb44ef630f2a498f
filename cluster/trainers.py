"""Finetuning jobs as Ray tasks: a fresh process each, with resources of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from engines.sft import PROGRESS_FILE, train
from engines.types import TrainResult, TrainSpec

_POLL_S = 0.5
_MAX_CRASHES = 3


class TrainingFailed(Exception):
    """The job itself raised, or its process died `_MAX_CRASHES` times. Checkpoints stay for the next try."""


class Trainers:
    """Where finetuning jobs run. `num_gpus` is 0 on machines without."""

    def __init__(self, num_cpus: float, num_gpus: float) -> None:
        # max_calls=1: the process ends with its job and gives all memory back. An environment of its own keeps it from
        # taking, and ending, a process that Ray Data has warmed up.
        self._train = ray.remote(
            num_cpus=num_cpus, num_gpus=num_gpus, max_calls=1, max_retries=0,
            runtime_env={"env_vars": {"SELFGUIDE_ROLE": "trainer"}},
        )(_train)  # fmt: skip

    async def train(
        self, spec: TrainSpec, rows: Path, work: Path, progress: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> TrainResult:
        """Trains on the Parquet file `rows`; `work` holds checkpoints and, at the end, the adapters.

        A trainer whose process dies goes on from its last whole checkpoint. `progress` hears each step once.
        """
        heard = 0
        for attempt in range(1, _MAX_CRASHES + 1):
            job = asyncio.ensure_future(self._run(spec, rows, work))
            try:
                while not job.done():
                    await asyncio.wait([job], timeout=_POLL_S)
                    heard = _report_steps(work / PROGRESS_FILE, heard, progress)
                return await job
            except RayTaskError as error:
                raise TrainingFailed(str(error.cause)) from error
            except (WorkerCrashedError, OutOfMemoryError) as error:
                if attempt == _MAX_CRASHES:
                    raise TrainingFailed(f"the trainer's process died {attempt} times (out of memory?)") from error
            finally:
                if not job.done():  # the caller was cancelled: the process must not go on writing into `work`
                    job.cancel()
                    await asyncio.wait([job])
        raise AssertionError("unreachable")

    async def _run(self, spec: TrainSpec, rows: Path, work: Path) -> TrainResult:
        reference = self._train.remote(spec, str(rows), str(work))
        try:
            result: TrainResult = await reference
        except asyncio.CancelledError:
            ray.cancel(reference, force=True)
            raise
        return result


def _train(spec: TrainSpec, rows: str, work: str) -> TrainResult:
    return train(spec, Path(rows), Path(work))


def _report_steps(path: Path, heard: int, progress: Callable[[dict[str, Any]], None]) -> int:
    """Reports the lines after the first `heard`, and returns how many there are now. A line may be half written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    for line in lines[heard:]:
        progress(json.loads(line))
    return len(lines)
