"""What tests of finetuning share: eight rows that can be learnt, a short job, and processes to run it in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.processes import descendants
from engines.models import model_digest
from engines.sft import PROGRESS_FILE
from engines.tokenizer import load_tokenizer
from engines.types import TrainSpec

PAIRS = [(f"Say what follows {i}.\n", f"{i + 1} follows") for i in range(8)]
Run = Callable[..., Any]


def _compute_on_one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


_OTHERS: set[int] = set()


def open_process(jobs: int | None = None, at_once: int = 1) -> ProcessPoolExecutor:
    """A process on one thread, or some; a new one after so many jobs."""
    return ProcessPoolExecutor(at_once, get_context("spawn"), _compute_on_one_thread, max_tasks_per_child=jobs)


@pytest.fixture(scope="session")
def in_process() -> Iterator[Run]:
    """`in_process(function, *arguments)` runs it in a process that TRL is loaded into once."""
    with open_process() as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="session")
def spec(random_student: Path) -> TrainSpec:
    return TrainSpec(
        model=str(random_student), base_digest=model_digest(random_student), epochs=2, learning_rate=5e-3,
        batch_size=2, lora_rank=4, lora_alpha=8, seed=7,
    )  # fmt: skip


@pytest.fixture(scope="session")
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


@pytest.fixture
def others_aside() -> Iterator[None]:
    """Trainers that are there already, warm from the tests before, are none of this test's."""
    _OTHERS.update(trainers())
    yield
    _OTHERS.clear()


def trainers() -> list[int]:
    """Processes of trainers that this process has started, through Ray, since `others_aside`."""
    commands = descendants(os.getpid())
    return [pid for pid in commands if commands[pid].startswith("ray::TrainerActor") and pid not in _OTHERS]


def steps_of(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / PROGRESS_FILE).read_text().splitlines()]
