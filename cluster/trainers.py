"""Finetuning jobs on warm trainers: the client that any process may hold, the queue behind it, and the processes.

A job takes seconds, so one queue serves them all: first come, first served, over every trainer of the cluster. It owns
the trainers' processes: those of a queue that dies end with it, and nobody goes on writing into a job's folder. Where
trainers have no device of their own it owns the turns, too: see `cluster.turns`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.fleet import as_future
from cluster.placement import ClusterSpec, Placement, trainer_options
from cluster.turns import Turns
from engines.files import AnyPath, Url, list_folders, locate
from engines.remote_training import train_by_url
from engines.sft import PROGRESS_FILE, Finetuner
from engines.simulated_sft import SimulatedFinetuner
from engines.types import TrainResult, TrainSpec, UserError

_POLL_S, _POLL_URL_S = 0.5, 5.0
_QUEUE_DEATHS = 3
_LAST_WORDS_S = 5.0
"""How long the other processes of a sharded trainer have to say what became of them, once one has failed."""
Progress = Callable[[dict[str, Any]], None]


class TrainingFailed(Exception):
    """The job itself raised, or its process died `max_crashes` times without a new checkpoint. Another try goes
    on from those that there are."""


@dataclass(frozen=True)
class TrainerShape:
    """What one trainer takes."""

    options: Mapping[str, Any]
    """Ray's, as `trainer_options` gives them: CPUs and GPUs of all its processes, which share one node."""
    num_processes: int = 1
    stays: bool = True
    """Whether its processes outlive a turn: a night, or a job where there are no nights. On a GPU that an engine takes
    in turn they must not: the last of a process's CUDA memory goes with the process."""
    start_s: float = 900.0
    max_crashes: int = 3


class Trainers:
    """Where finetuning jobs run. Travels between processes."""

    def __init__(self, shapes: Sequence[TrainerShape], engines: Sequence[Any] = (), turn_tasks: int = 1) -> None:
        """`engines` are the actors that sleep while trainers work; none where trainers need no turns."""
        # Ray sends a call again to a queue that it has restarted; the job then goes on from its last checkpoint.
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=_QUEUE_DEATHS)(TrainerQueue)
        self._queue = remote.remote(shapes, engines, turn_tasks)

    async def train(
        self, spec: TrainSpec, rows: AnyPath, work: AnyPath, progress: Progress = lambda _: None
    ) -> TrainResult:
        """Trains on the Parquet file `rows`; `work` holds checkpoints and, at the end, the adapters.

        A trainer whose process dies goes on from its last whole checkpoint; a job of another client in the same `work`
        is ended first, since that client is dead. `progress` hears each step once. Raises `TrainingFailed`.
        """
        ticket, folder = uuid.uuid4().hex, str(work.resolve())
        job = asyncio.ensure_future(as_future(self._queue.train.remote(ticket, spec, str(rows.resolve()), folder)))
        heard = 0
        try:
            while not job.done():
                await asyncio.wait([job], timeout=_POLL_S if isinstance(work, Path) else _POLL_URL_S)
                heard = await _report_steps(work / PROGRESS_FILE, heard, progress)
            result: TrainResult = job.result()
            return result
        except RayTaskError as error:
            raise TrainingFailed(str(error.cause)) from error
        except RayActorError as error:
            raise TrainingFailed("the trainers' queue died, again and again") from error
        finally:
            if not job.done():  # the caller was cancelled: the process must not go on writing into `work`
                with suppress(RayActorError):
                    await as_future(self._queue.cancel.remote(ticket, folder))
                job.cancel()

    def warm(self) -> None:
        """Lets trainers start before there is a job for them. What goes wrong is told to the first one."""
        self._queue.warm.remote()

    def stop(self) -> None:
        """Ends the queue and, through it, every trainer."""
        ray.kill(self._queue)


def start_trainers(cluster: ClusterSpec, placement: Placement, engines: Sequence[Any] = ()) -> Trainers:
    """Trainers as the cluster holds them. A process starts with the first job that needs it, unless it is warmed up."""
    num_processes, stays = max(1, int(placement.gpus_per_trainer)), not (placement.time_shared and placement.on_gpus)
    bounds = (cluster.limits.start_s, cluster.limits.max_crashes)
    shapes = [
        TrainerShape(trainer_options(cluster, placement, number), num_processes, stays, *bounds)
        for number in range(cluster.num_trainers)
    ]
    return Trainers(shapes, engines if placement.time_shared else (), cluster.turn_tasks)


async def _report_steps(path: AnyPath, heard: int, progress: Progress) -> int:
    """Reports the lines after the first `heard`, and returns how many there are now. A line may be half written."""
    try:
        content = path.read_bytes() if isinstance(path, Path) else await asyncio.to_thread(path.read_bytes)
        lines = content.decode().split("\n")[:-1]
    except (FileNotFoundError, UserError):  # none yet, or not to be read now
        lines = []
    for line in lines[heard:]:
        progress(json.loads(line))
    return max(heard, len(lines))


# ---- the queue


class TrainerQueue:
    """The actor that gives each job a trainer in turn."""

    def __init__(self, shapes: Sequence[TrainerShape], engines: Sequence[Any], turn_tasks: int) -> None:
        self._free = asyncio.Semaphore(len(shapes))  # first in, first out
        self._idle = [_Trainer(shape) for shape in shapes]
        self._turns = Turns(engines, turn_tasks, self._end_turn) if engines else None
        self._jobs: dict[str, asyncio.Task[TrainResult]] = {}
        self._cancelled: set[str] = set()

    async def warm(self) -> None:
        if self._turns is None:
            await asyncio.gather(*(self._warm() for _ in self._idle), return_exceptions=True)

    async def _warm(self) -> None:
        async with self._free:
            trainer = self._idle.pop()
            try:
                await trainer.warm()
            finally:
                self._idle.insert(0, trainer)

    async def train(self, ticket: str, spec: TrainSpec, rows: str, work: str) -> TrainResult:
        job = asyncio.create_task(self._run(self._jobs.get(work), spec, rows, work), name=ticket)
        self._jobs[work] = job
        if ticket in self._cancelled:
            job.cancel()
        try:
            return await job
        except asyncio.CancelledError:
            raise TrainingFailed("cancelled by its client, or begun anew by another") from None
        finally:
            if self._jobs.get(work) is job:
                del self._jobs[work]

    async def cancel(self, ticket: str, work: str) -> None:
        """Once this returns, that job writes nothing any more. Ray may run it before the call that it cancels."""
        job = self._jobs.get(work)
        if job is not None and job.get_name() == ticket:
            await _end(job)
        else:
            self._cancelled.add(ticket)

    async def _run(
        self, orphan: asyncio.Task[TrainResult] | None, spec: TrainSpec, rows: str, work: str
    ) -> TrainResult:
        if orphan is not None:
            await _end(orphan)
        if self._turns is not None:
            return await self._turns.by_night(lambda: self._train(spec, rows, work))
        return await self._train(spec, rows, work)

    async def _train(self, spec: TrainSpec, rows: str, work: str) -> TrainResult:
        async with self._free:
            trainer = self._idle.pop()  # the one that was busy last: it is warm
            try:
                result = await trainer.train(spec, rows, work)
                if self._turns is None:
                    await trainer.end_turn()
                return result
            finally:
                self._idle.append(trainer)

    async def _end_turn(self) -> None:
        await asyncio.gather(*(trainer.end_turn() for trainer in self._idle))


def _last_step(work: str) -> int:
    """The step of the last checkpoint, of a simulated job the epoch."""
    parts = (folder.name.split("-") for folder in list_folders(locate(work)))
    return max((int(part[1]) for part in parts if part[0] in ("checkpoint", "epoch") and len(part) == 2), default=-1)


async def _end(job: asyncio.Task[Any]) -> None:
    job.cancel()
    await asyncio.wait([job])


# ---- a trainer and its processes


class _Trainer:
    """A trainer's processes: one, or one for each of its GPUs. They start with a job and end where one fails."""

    def __init__(self, shape: TrainerShape) -> None:
        self._shape = shape
        self._processes: list[Any] = []
        self._group: Any = None

    async def warm(self) -> None:
        """Returns once the processes are there; a job that comes while they load libraries waits for them."""
        if self._shape.stays and not self._processes:
            try:
                await self._start()
            except Exception:
                self._stop()  # the first job tries again, and is told
                raise
            for one in self._processes:
                one.warm.remote()

    async def train(self, spec: TrainSpec, rows: str, work: str) -> TrainResult:
        crashes, reached = 0, -1
        while True:
            try:
                return await self._try(spec, rows, work)
            except RayTaskError as error:
                raise TrainingFailed(str(error.cause)) from error
            except (RayActorError, OutOfMemoryError) as error:
                step = await asyncio.to_thread(_last_step, work)
                crashes, reached = (1 if step > reached else crashes + 1), max(step, reached)
                if crashes == self._shape.max_crashes:
                    reason = f"the trainer's process died {crashes} times without a checkpoint between (out of memory?)"
                    raise TrainingFailed(reason) from error

    async def _try(self, spec: TrainSpec, rows: str, work: str) -> TrainResult:
        calls: list[asyncio.Future[TrainResult]] = []
        done = False
        try:
            if not self._processes:
                await self._start()
            calls = [asyncio.ensure_future(as_future(one.train.remote(spec, rows, work))) for one in self._processes]
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            await _hear_out(calls)
            done = True
            return calls[0].result()
        finally:
            if not done:
                self._stop()
                await asyncio.gather(*calls, return_exceptions=True)  # they raise once the processes are gone

    async def end_turn(self) -> None:
        """Gives the GPU back, where others wait for it: first what the processes hold of it, then the processes."""
        if not self._shape.stays:
            await asyncio.gather(*(as_future(one.drop.remote()) for one in self._processes), return_exceptions=True)
            self._stop()

    async def _start(self) -> None:
        options, count = dict(self._shape.options), self._shape.num_processes
        cpus, gpus = options["num_cpus"], options.get("num_gpus", 0)
        if count > 1:
            bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
            labels = [options.pop("label_selector", {})]
            self._group = placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=labels)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, 0)
            each = cpus / count
            options["num_cpus"] = each if each < 1 else int(each)  # Ray takes whole ones, or a part of one
            options["num_gpus"] = gpus / count
        # An environment of its own keeps a trainer from taking a process that Ray Data has warmed up.
        remote = ray.remote(runtime_env={"env_vars": {"SELFGUIDE_ROLE": "trainer"}}, **options)(TrainerActor)
        self._processes = [remote.remote() for _ in range(count)]
        try:
            await asyncio.wait_for(self._join(), self._shape.start_s)
        except TimeoutError:
            wanted = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
            waited = f"no trainer started in {self._shape.start_s:g} s"
            raise TrainingFailed(f"{waited}: is a node with {wanted} free?") from None

    async def _join(self) -> None:
        """Tells each process of the others, before any of them loads PyTorch."""
        places = await asyncio.gather(*(as_future(one.place.remote()) for one in self._processes))
        if len(places) > 1:
            port, gpus = places[0][0], [gpu for _, gpus in places for gpu in gpus]
            ranks = range(len(places))
            joined = [self._processes[rank].join.remote(rank, len(places), port, gpus) for rank in ranks]
            await asyncio.gather(*map(as_future, joined))

    def _stop(self) -> None:
        for process in self._processes:
            ray.kill(process)
        if self._group is not None:
            remove_placement_group(self._group)
        self._processes, self._group = [], None


async def _hear_out(calls: Sequence[asyncio.Future[TrainResult]]) -> None:
    """Raises what went wrong: where a process died, that, and not what the others said when they lost it."""
    failed = [call for call in calls if call.done() and call.exception()]
    if not failed:
        return
    if len(calls) > 1:
        await asyncio.wait(calls, timeout=_LAST_WORDS_S)
    errors = [error for call in calls if call.done() and (error := call.exception())]
    raise next((one for one in errors if not isinstance(one, RayTaskError)), errors[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TrainerActor:
    """One process that finetunes: a whole trainer, or its share of a sharded one."""

    def __init__(self) -> None:
        self._finetuner: Finetuner | None = None

    def place(self) -> tuple[int, list[str]]:
        """A free port of this node, and the GPUs that Ray gave to this process."""
        return free_port(), ray.get_runtime_context().get_accelerator_ids()["GPU"]

    def join(self, rank: int, num_ranks: int, port: int, gpus: Sequence[str]) -> None:
        """What `torchrun` would set. Each process sees all GPUs of the trainer, or NCCL could not copy between them."""
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    def warm(self) -> None:
        self._finetuner = Finetuner()
        self._finetuner.warm()

    def train(self, spec: TrainSpec, rows: str, work: str) -> TrainResult:
        """What goes wrong is told in words: its type may be of a library that no other process should load."""
        if not spec.simulated_tokens_per_s and self._finetuner is None:
            self._finetuner = Finetuner()
        finetuner = SimulatedFinetuner() if spec.simulated_tokens_per_s else self._finetuner
        assert finetuner is not None
        try:
            rows_at, work_at = locate(rows), locate(work)
            if isinstance(rows_at, Url) and isinstance(work_at, Url):
                return train_by_url(finetuner, spec, rows_at, work_at)
            return finetuner.train(spec, Path(rows), Path(work))
        except Exception as error:
            raise TrainingFailed(str(error) or type(error).__name__) from error

    def drop(self) -> None:
        """Frees the memory that jobs have left filled for the next one."""
        if self._finetuner is not None:
            self._finetuner.drop()
