"""The finetuning job: what it learns from, that it is reproducible, and that kills do not change it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.kill_drill import descendants
from cluster.trainers import Trainers, TrainerShape, TrainingFailed
from engines.adapters import check_adapter, check_weights
from engines.models import model_digest, weights_digest
from engines.sft import PROGRESS_FILE, train
from engines.tokenizer import load_tokenizer
from engines.types import TrainResult, TrainSpec

PAIRS = [(f"Say what follows {i}.\n", f"{i + 1} follows") for i in range(8)]
Run = Callable[..., Any]


def _compute_on_one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def in_process() -> Iterator[Run]:
    """`in_process(function, *arguments)` runs it in a process that TRL is loaded into once, on one thread."""
    with ProcessPoolExecutor(1, get_context("spawn"), _compute_on_one_thread) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def spec(random_student: Path) -> TrainSpec:
    return TrainSpec(
        model=str(random_student), base_digest=model_digest(random_student), epochs=2, learning_rate=5e-3,
        batch_size=2, lora_rank=4, lora_alpha=8, seed=7,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(random_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, completions and the end of sequence, as finetuning writes them."""
    tokenizer = load_tokenizer(str(random_student))
    prompts = [tokenizer.encode(prompt) for prompt, _ in PAIRS]
    completions = [[*tokenizer.encode(completion), tokenizer.eos_id] for _, completion in PAIRS]
    columns = {
        "input_ids": [p + c for p, c in zip(prompts, completions, strict=True)],
        "prompt_tokens": [len(prompt) for prompt in prompts],
    }
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def make_work(path: Path) -> Path:
    path.mkdir()
    return path


def trainers() -> list[int]:
    """Trainers that this process has started, through Ray."""
    return [pid for pid, command in descendants(os.getpid()).items() if command.startswith("ray::TrainerActor")]


def steps_of(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / PROGRESS_FILE).read_text().splitlines()]


# ---- what it learns from


def _first_batch(spec: TrainSpec, rows: Path, work: Path) -> list[tuple[list[int], list[int], list[int]]]:
    from engines.base_model import BaseModel
    from engines.sft import _build_trainer

    batch = next(iter(_build_trainer(BaseModel(), spec, pq.read_table(rows).to_pylist(), work).get_train_dataloader()))
    columns = (batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))
    return list(zip(*columns, strict=True))


def test_labels_are_the_completion_and_the_end(
    in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(random_student))
    batch = in_process(_first_batch, replace(spec, batch_size=8), rows, make_work(tmp_path / "work"))
    seen = []
    for ids, labels, mask in batch:
        learnt = [label for label in labels if label != -100]
        assert learnt[-1] == tokenizer.eos_id
        whole = [token for token, attended in zip(ids, mask, strict=True) if attended]
        assert whole[-len(learnt) :] == learnt
        seen.append((tokenizer.decode(whole[: -len(learnt)]), tokenizer.decode(learnt)))
    assert sorted(seen) == sorted(PAIRS)


def test_the_loss_is_that_of_the_completions(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    """One step over all rows: its loss is what the canaries, scored one by one, had before training."""
    result = in_process(train, replace(spec, batch_size=8, epochs=1), rows, make_work(tmp_path / "work"))
    before = [logprob for canary in result.canaries for logprob in canary.base_logprobs]
    assert len(result.canaries) == len(PAIRS)
    assert result.completion_tokens == len(before)
    assert result.loss_curve[0]["loss"] == pytest.approx(-sum(before) / len(before), abs=1e-4)


def test_training_teaches_completions_and_their_end(
    in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path
) -> None:
    result: TrainResult = in_process(train, replace(spec, epochs=15), rows, make_work(tmp_path / "work"))
    for canary in result.canaries:
        assert sum(canary.tuned_logprobs) > sum(canary.base_logprobs) + 1
        assert canary.tuned_logprobs[-1] > canary.base_logprobs[-1] + 1  # the end of sequence
    ref = result.checkpoints[-1]
    assert (ref.kind, ref.rank, ref.digest) == ("lora", 4, weights_digest(Path(ref.url)))
    check_adapter(ref, random_student, max_rank=4)


def test_full_weights(in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path) -> None:
    full = replace(spec, method="full", epochs=1)
    result: TrainResult = in_process(train, full, rows, make_work(tmp_path / "work"))
    ref = result.checkpoints[-1]
    assert (ref.kind, ref.rank) == ("full", 0)
    check_weights(ref, random_student)
    assert ref.digest != weights_digest(random_student)
    assert {path.name for path in Path(ref.url).iterdir()} >= {"config.json", "model.safetensors"}
    assert all(canary.base_logprobs != canary.tuned_logprobs for canary in result.canaries)


# ---- how long, and how often the same


def test_tiny_sets_train_for_min_steps(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    """Whole epochs: the first number of them that is enough."""
    work = make_work(tmp_path / "work")
    result = in_process(train, replace(spec, epochs=1, min_steps=9), rows, work)
    assert (result.epochs, result.steps, result.rows) == (3, 12, 8)
    assert steps_of(work) == list(range(1, 13))
    assert [entry["step"] for entry in result.loss_curve] == list(range(1, 13))


def test_the_seed_decides(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    seeds = [spec.seed, spec.seed, spec.seed + 1]
    results = [
        in_process(train, replace(spec, seed=seed), rows, make_work(tmp_path / f"{i}")) for i, seed in enumerate(seeds)
    ]
    digests = [result.checkpoints[-1].digest for result in results]
    assert digests[0] == digests[1] != digests[2]


def test_every_epoch_is_kept_where_asked(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    result = in_process(train, replace(spec, epochs=3, keep_epochs=True), rows, make_work(tmp_path / "work"))
    assert [Path(ref.url).name for ref in result.checkpoints] == ["epoch-1", "epoch-2", "epoch-3"]
    assert len({ref.digest for ref in result.checkpoints}) == 3


def _train_with_a_row_lost(spec: TrainSpec, rows: Path, work: Path) -> str:
    from unittest.mock import patch

    from datasets import Dataset

    whole = Dataset.from_list
    with patch.object(Dataset, "from_list", lambda data: whole(data[1:])):
        try:
            train(spec, rows, work)
        except AssertionError as error:
            return str(error)
    return "trained on what was left"


def test_a_row_lost_on_the_way_fails_the_job(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    assert in_process(_train_with_a_row_lost, spec, rows, make_work(tmp_path / "work")) == "TRL kept 7 of 8 rows"


# ---- kills


def test_a_second_call_goes_on_from_the_last_checkpoint(
    in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    """It is there until the caller has the weights; broken ones, left by a kill, are passed over."""
    work = make_work(tmp_path / "work")
    first: TrainResult = in_process(train, spec, rows, work)
    for step, state in (("50", None), ("60", '{"global_step": 6')):
        (work / f"checkpoint-{step}").mkdir()
        if state:
            (work / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    second: TrainResult = in_process(train, spec, rows, work)
    assert steps_of(work) == list(range(1, 9)), "steps were done twice"
    assert second.checkpoints == first.checkpoints
    assert second.canaries == first.canaries
    assert second.loss_curve == first.loss_curve


async def test_a_killed_trainer_ends_with_the_same_adapter(
    ray_cluster: dict[str, float], in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    long = replace(spec, epochs=25)
    work, heard = make_work(tmp_path / "killed"), []
    job = asyncio.create_task(Trainers(1, TrainerShape(1)).train(long, rows, work, lambda step: heard.append(step["step"])))
    while not list(work.glob("checkpoint-*/trainer_state.json")):
        assert not job.done()
        await asyncio.sleep(0.01)
    [trainer] = trainers()
    os.kill(trainer, signal.SIGKILL)
    killed = await job
    undisturbed = in_process(train, long, rows, make_work(tmp_path / "undisturbed"))
    assert killed.checkpoints[-1].digest == undisturbed.checkpoints[-1].digest
    assert killed.loss_curve == undisturbed.loss_curve
    assert killed.canaries == undisturbed.canaries
    assert heard == steps_of(work), "a step was reported twice or not at all"
    assert heard.count(1) == 1, "it began from the start"


async def test_a_cancelled_job_leaves_no_process(
    ray_cluster: dict[str, float], spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    work = make_work(tmp_path / "work")
    job = asyncio.create_task(Trainers(1, TrainerShape(1)).train(replace(spec, epochs=10_000), rows, work))
    while not (work / PROGRESS_FILE).exists():
        assert not job.done()
        await asyncio.sleep(0.05)
    assert trainers()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    while trainers():
        await asyncio.sleep(0.05)


async def test_what_the_job_raises_is_reported(ray_cluster: dict[str, float], spec: TrainSpec, tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    columns = {"input_ids": pa.array([], pa.list_(pa.int32())), "prompt_tokens": pa.array([], pa.int32())}
    pq.write_table(pa.table(columns), empty)
    with pytest.raises(TrainingFailed, match="no rows to train on"):
        await Trainers(1, TrainerShape(1)).train(spec, empty, make_work(tmp_path / "work"))
