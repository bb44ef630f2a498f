"""Trainers: warm ones train as fresh ones do, jobs take turns, and no death, error or cancelled job is felt later."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import RayActorError

from cluster.trainers import TrainerActor, Trainers, TrainerShape, TrainingFailed, _Trainer, free_port
from engines.adapters import check_adapter, check_weights
from engines.sft import PROGRESS_FILE, train
from engines.types import TrainResult, TrainSpec
from selfguide.api import Session
from tests.training import Run, make_work, open_process, steps_of, trainers

OpenTrainers = Callable[..., AbstractAsyncContextManager[Trainers]]
ENDLESS = 100_000  # epochs


pytestmark = pytest.mark.usefixtures("others_aside")


@pytest.fixture
def open_trainers(ray_cluster: dict[str, float]) -> OpenTrainers:
    """`open_trainers(num_trainers, **shape)`: on one CPU each. In the end none of their processes is left."""

    @asynccontextmanager
    async def open_some(num_trainers: int = 1, num_cpus: float = 1, **shape: Any) -> AsyncIterator[Trainers]:
        opened = Trainers([TrainerShape({"num_cpus": num_cpus}, **shape)] * num_trainers)
        try:
            yield opened
        finally:
            opened.stop()
            await until(lambda: not trainers())

    return open_some


@pytest.fixture
def no_rows(tmp_path: Path) -> Path:
    """A file that no job can train on."""
    path = tmp_path / "empty.parquet"
    columns = {"input_ids": pa.array([], pa.list_(pa.int32())), "prompt_tokens": pa.array([], pa.int32())}
    pq.write_table(pa.table(columns), path)
    return path


async def until(true: Callable[[], object], job: asyncio.Task[Any] | None = None) -> None:
    """Waits; `job` must not end before."""
    while not true():
        assert job is None or not job.done()
        await asyncio.sleep(0.01)


def has_begun(work: Path) -> bool:
    return (work / PROGRESS_FILE).exists()


def simulated(spec: TrainSpec, **changes: Any) -> TrainSpec:
    """Takes its time, and no library's: where what counts is who has a trainer when."""
    return replace(spec, simulated_tokens_per_s=1000, **changes)


def learnt(result: TrainResult) -> tuple[Any, ...]:
    """All that must not depend on what a process did before."""
    return result.checkpoints[-1].digest, result.loss_curve, result.canaries, result.steps


# ---- warm and fresh


async def test_the_nth_adapter_of_a_warm_trainer_is_that_of_a_fresh_process(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, no_rows: Path, tmp_path: Path
) -> None:
    other = replace(
        spec, lora_rank=8, lora_alpha=4, lora_dropout=0.3, learning_rate=1e-2, scheduler="cosine", warmup_ratio=0.2,
        target_modules=("q_proj", "down_proj"), batch_size=1, gradient_accumulation=3, max_grad_norm=0.1, seed=8,
        gradient_checkpointing=True, weight_decay=0.1,
    )  # fmt: skip
    full = replace(spec, method="full", epochs=1)
    with open_process(jobs=1, at_once=2) as fresh_ones:
        jobs = [(one, rows, make_work(tmp_path / f"fresh-{i}")) for i, one in enumerate((spec, other, full))]
        fresh = [learnt(one.result()) for one in [fresh_ones.submit(train, *job) for job in jobs]]
    wanted = dict(zip((spec, other, full), fresh, strict=True))
    async with open_trainers() as warm:
        for i, one in enumerate((spec, other, spec, full, other, spec)):
            result = await warm.train(one, rows, make_work(tmp_path / f"warm-{i}"))
            assert learnt(result) == wanted[one], f"job {i}"
            assert len(pids := trainers()) == 1, "a trainer was started anew"
        with pytest.raises(TrainingFailed, match="no rows to train on"):
            await warm.train(spec, no_rows, make_work(tmp_path / "failed"))
        assert learnt(await warm.train(spec, rows, make_work(tmp_path / "after"))) == wanted[spec]
        assert pids != trainers(), "a process that has failed was used again"


def _train_and_look(spec: TrainSpec, rows: Path, work: Path) -> tuple[list[str], bool]:
    """What a job that writes to the base leaves, and whether the next one gets another base."""
    from unittest.mock import patch

    import torch

    from engines import sft
    from engines.base_model import BaseModel

    base = BaseModel()
    untouched, _ = base.lend(spec, keep=True)
    before = {name: weight.clone() for name, weight in untouched.state_dict().items()}

    def spoil(model: Any, rows: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            next(iter(model.parameters())).add_(1)
        return []

    with patch.object(sft, "_completion_logprobs", spoil):
        sft._train(base, replace(spec, canary_rows=0), rows, work)
    base.take_back()
    after, _ = base.lend(spec, keep=True)
    wrong = [name for name, weight in after.state_dict().items() if not torch.equal(weight, before[name])]
    shared = next(after.parameters()).data_ptr() == next(untouched.parameters()).data_ptr()
    return wrong, shared


def test_a_base_that_was_written_to_is_loaded_anew(
    in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    assert in_process(_train_and_look, spec, rows, make_work(tmp_path / "work")) == ([], False)


async def test_a_trainer_that_shares_its_gpu_ends_with_its_job(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    async with open_trainers(stays=False) as passing:
        await passing.train(simulated(spec), rows, make_work(tmp_path / "work"))
        await until(lambda: not trainers())


async def test_trainers_that_are_warmed_up_are_there_before_their_first_job(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    async with open_trainers(2) as both:
        both.warm()
        await until(lambda: len(trainers()) == 2)
        there = set(trainers())
        await both.train(simulated(spec), rows, make_work(tmp_path / "work"))
        assert set(trainers()) == there


async def test_a_run_that_trains_nothing_starts_no_trainer(
    open_simulated: Callable[..., AbstractAsyncContextManager[Session]],
) -> None:
    async with open_simulated(**{"cluster.num_engines": 2}) as session:  # a session of its own
        await session.pool.stats()
        assert not trainers()


# ---- turns


@ray.remote(num_cpus=0)
def _train_elsewhere(trainers: Trainers, spec: TrainSpec, rows: Path, work: Path) -> TrainResult:
    return asyncio.run(trainers.train(spec, rows, work))


async def test_jobs_of_many_clients_take_their_turn(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    """One trainer, and jobs of this process and of another one."""
    works = [make_work(tmp_path / f"{number}") for number in range(4)]
    kept = simulated(spec, keep_epochs=True)
    async with open_trainers() as one:
        elsewhere = _train_elsewhere.remote(one, kept, rows, works[0])
        await until(lambda: has_begun(works[0]))
        here = [one.train(kept, rows, work) for work in works[1:]]
        results = [*await asyncio.gather(*here), await elsewhere]
        assert len(trainers()) == 1
    assert len({result.checkpoints[-1].digest for result in results}) == 1
    spans = sorted(((work / "epoch-1").stat().st_mtime, (work / "epoch-2").stat().st_mtime) for work in works)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "two jobs were under way at once"


# ---- deaths, errors, cancelled jobs


@pytest.fixture(scope="module")
def long(spec: TrainSpec) -> TrainSpec:
    """Long enough to be killed between two checkpoints."""
    return replace(spec, epochs=25)


@pytest.fixture(scope="module")
def undisturbed(in_process: Run, long: TrainSpec, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    result: TrainResult = in_process(train, long, rows, tmp_path_factory.mktemp("undisturbed"))
    return result


async def test_a_killed_trainer_ends_with_the_same_adapter(
    open_trainers: OpenTrainers, undisturbed: TrainResult, long: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    work, heard = make_work(tmp_path / "killed"), []
    async with open_trainers() as killed:
        job = asyncio.create_task(killed.train(long, rows, work, lambda step: heard.append(step["step"])))
        await until(lambda: list(work.glob("checkpoint-*/trainer_state.json")), job)
        [trainer] = trainers()
        os.kill(trainer, signal.SIGKILL)
        result = await job
    assert learnt(result) == learnt(undisturbed)
    assert heard == steps_of(work), "a step was reported twice or not at all"
    assert heard.count(1) == 1, "it began from the start"


async def test_a_killed_queue_loses_no_job(
    open_trainers: OpenTrainers, undisturbed: TrainResult, long: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    work = make_work(tmp_path / "killed")
    async with open_trainers() as orphaned:
        job = asyncio.create_task(orphaned.train(long, rows, work))
        await until(lambda: list(work.glob("checkpoint-*/trainer_state.json")), job)
        ray.kill(orphaned._queue, no_restart=False)
        result = await job
    assert learnt(result) == learnt(undisturbed)


async def test_a_cancelled_job_leaves_no_process_and_harms_no_other(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    works = [make_work(tmp_path / name) for name in ("running", "waiting", "next")]
    async with open_trainers() as one:
        endless = simulated(spec, epochs=ENDLESS)
        running = asyncio.create_task(one.train(endless, rows, works[0]))
        await until(lambda: has_begun(works[0]), running)
        [pid] = trainers()
        waiting = asyncio.create_task(one.train(endless, rows, works[1]))
        await asyncio.sleep(0)  # the call is made, and has not arrived
        after = asyncio.create_task(one.train(simulated(spec), rows, works[2]))
        for job in (waiting, running):
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
        await after
        assert pid not in trainers()
        assert not has_begun(works[1])


async def test_the_job_of_a_dead_client_makes_way_for_the_next_try(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    """Two trainers, so that both jobs could write into the folder at once."""
    endless, work = simulated(spec, epochs=ENDLESS), make_work(tmp_path / "work")
    async with open_trainers(2) as both:
        lost = _train_elsewhere.remote(both, endless, rows, work)
        await until(lambda: has_begun(work))
        [orphan] = trainers()
        ray.cancel(lost, force=True)
        again = asyncio.create_task(both.train(endless, rows, work))
        await until(lambda: len(pids := trainers()) == 1 and orphan not in pids, again)
        again.cancel()
        with pytest.raises(asyncio.CancelledError):
            await again


@pytest.mark.parametrize("warmed_up", [False, True])
async def test_what_can_never_start_is_given_up(
    open_trainers: OpenTrainers, spec: TrainSpec, rows: Path, tmp_path: Path, warmed_up: bool
) -> None:
    async with open_trainers(num_cpus=1000, start_s=0.1) as none:
        if warmed_up:
            none.warm()
        with pytest.raises(TrainingFailed, match="is a node with 1000 CPUs free"):
            await none.train(spec, rows, make_work(tmp_path / "work"))


async def test_a_job_gets_on_by_checkpoints_or_is_given_up(
    monkeypatch: pytest.MonkeyPatch, spec: TrainSpec, tmp_path: Path
) -> None:
    """Its processes die again and again, at first with a checkpoint more each time."""
    steps = [2, 2, 4, 6, 6, 6]

    async def die(trainer: _Trainer, spec: TrainSpec, rows: str, work: str) -> TrainResult:
        (Path(work) / f"checkpoint-{steps.pop(0)}").mkdir(exist_ok=True)
        raise RayActorError

    monkeypatch.setattr(_Trainer, "_try", die)
    with pytest.raises(TrainingFailed, match="died 3 times without a checkpoint"):
        await _Trainer(TrainerShape({"num_cpus": 1})).train(spec, "", str(tmp_path))
    assert steps == []


# ---- several processes


async def test_a_trainer_of_two_processes_learns_what_one_learns(
    open_trainers: OpenTrainers,
    undisturbed: TrainResult,
    long: TrainSpec,
    rows: Path,
    random_student: Path,
    tmp_path: Path,
) -> None:
    """On CPUs each of them holds the whole model. One of them is killed on the way."""
    work = make_work(tmp_path / "two")
    async with open_trainers(num_cpus=2, num_processes=2) as pair:
        job = asyncio.create_task(pair.train(long, rows, work))
        await until(lambda: list(work.glob("checkpoint-*/trainer_state.json")), job)
        os.kill(max(trainers()), signal.SIGKILL)
        two = await job
        assert len(trainers()) == 2
        with pytest.raises(TrainingFailed, match="batch_size 3 cannot be shared by 2 GPUs"):
            await pair.train(replace(long, batch_size=3), rows, make_work(tmp_path / "odd"))
    check_adapter(two.checkpoints[-1], random_student, max_rank=4)
    check_alike(two, undisturbed)


def check_alike(result: TrainResult, expected: TrainResult) -> None:
    """Sums are made in another order: equal but for rounding."""
    assert [step["step"] for step in result.loss_curve] == [step["step"] for step in expected.loss_curve]
    for ours, theirs in zip(result.loss_curve, expected.loss_curve, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    for mine, its in zip(result.canaries, expected.canaries, strict=True):
        assert mine.base_logprobs == pytest.approx(its.base_logprobs, abs=1e-4)
        assert mine.tuned_logprobs == pytest.approx(its.tuned_logprobs, abs=1e-2)


def _train_sharded(rank: int, port: int, jobs: Sequence[tuple[TrainSpec, Path, Path]]) -> list[TrainResult]:
    """FSDP2 over gloo: PyTorch shards on CPUs, Accelerate only has to be told that it may."""
    TrainerActor().join(rank, 2, port, [])
    from accelerate import state
    from accelerate.utils import DistributedType

    from engines import sft

    plain = state.AcceleratorState.__init__

    def with_shards(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = with_shards
    sft._is_sharded = lambda on_cpu: True
    finetuner = sft.Finetuner()
    return [finetuner.train(*job) for job in jobs]


def test_shards_train_and_export_as_one_process_does(
    in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path
) -> None:
    full = replace(spec, method="full", epochs=1)
    specs = [spec, full, replace(spec, gradient_checkpointing=True)]
    expected = [in_process(train, one, rows, make_work(tmp_path / f"one-{i}")) for i, one in enumerate(specs)]
    jobs = [(one, rows, make_work(tmp_path / f"two-{i}")) for i, one in enumerate(specs)]
    jobs.append(jobs[0])  # a second call in the same folder: it goes on from the end
    port = free_port()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        first, second = (pool.submit(_train_sharded, rank, port, jobs) for rank in range(2))
        results = first.result()
        assert all(not result.checkpoints for result in second.result()), "only the first process exports"
    for result, one in zip(results, [*expected, expected[0]], strict=True):
        check_alike(result, one)
    check_adapter(results[0].checkpoints[-1], random_student, max_rank=4)
    check_weights(results[1].checkpoints[-1], random_student)
    check_adapter(results[2].checkpoints[-1], random_student, max_rank=4)
    assert results[3].checkpoints == results[0].checkpoints
