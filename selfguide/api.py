"""The front of the house: `await run(task, recipe)`, and the session that many runs can share."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cluster.placement import PlacementError, place
from engines.files import AnyPath, Url, cache_folder, locate
from engines.models import ModelError, check_whole, model_digest, read_config, resolve_model
from engines.tokenizer import load_tokenizer
from engines.types import EngineSpec
from selfguide.config import Recipe
from selfguide.curation import warm_filters
from selfguide.errors import TaskFailed, UserError
from selfguide.gpt2 import load_gpt2
from selfguide.methods import Comparison, self_guide
from selfguide.nano import student_path
from selfguide.prompts import Prompts, TooLong
from selfguide.sizes import MIN_FREE_BYTES, existing, longest_context
from selfguide.store import RunStore
from selfguide.taskrun import Progress, Student, TaskRun
from selfguide.tasks import Task

if TYPE_CHECKING:
    from cluster.fleet import Fleet
    from cluster.pool import Pool
    from cluster.trainers import Trainers

_RANDOM_MODEL_VERSION = 1
NO_STUDENT = "no student: name one with --model FOLDER_OR_HUB_NAME, or model.path in the recipe"
STAGES = ("synthesis", "curation", "finetuning", "evaluation")


@dataclass(frozen=True)
class Session:
    """Started engines and trainers for one recipe; any number of tasks may run in it."""

    recipe: Recipe
    student: Student
    fleet: Fleet
    pool: Pool
    trainers: Trainers
    start_s: float

    def task_run(self, task: Task, store: RunStore, progress: Progress) -> TaskRun:
        tasks = store.task(task.name)
        return TaskRun(task, self.recipe, self.student, self.pool, self.trainers, tasks, progress)


async def run(
    task: Task,
    recipe: Recipe,
    out: str | AnyPath = "runs",
    *,
    force: Sequence[str] = (),
    progress: Progress = lambda task, stage, counts: None,
    session: Session | None = None,
    command: Sequence[str] = (),
) -> Comparison:
    """Takes `task` from its instruction to a finetuned adapter and a comparison, in the run folder `out`.

    A second call with the same task and recipe goes on where the first one ended. `force` names stages to make anew,
    `command` is left in the folder as a note on how to go on.
    Raises `UserError` for what the caller can mend, `TaskFailed` where the task itself comes to no end.
    """
    check_stage_names(force)
    out = locate(out)
    store = RunStore(out, create=False)
    if session is None:
        check_run(idle_run(task, recipe, await asyncio.to_thread(load_student, recipe), store))
        RunStore(out, command=command)  # a folder that cannot be written is known before engines start
        async with open_session(recipe, progress) as own:
            return await run(task, recipe, out, force=force, progress=progress, session=own, command=command)
    task_run = session.task_run(task, RunStore(out, command=command), progress)
    check_run(task_run)
    for stage in force:
        task_run.store.retire(stage)
    from cluster.pool import EnginesLost

    try:
        return await self_guide(task_run)
    except EnginesLost as error:
        raise TaskFailed(f"{task.name}: {error}; the same command goes on from here") from error


def idle_run(task: Task, recipe: Recipe, student: Student, store: RunStore) -> TaskRun:
    """For planning, and for reading what is done: there is no engine and no trainer behind it."""
    nobody = cast(Any, None)
    return TaskRun(task, recipe, student, nobody, nobody, store.task(task.name))


@asynccontextmanager
async def open_session(
    recipe: Recipe, progress: Progress = lambda task, stage, counts: None, *, trains: bool = True
) -> AsyncIterator[Session]:
    """Connects to Ray, starts the engines, and takes everything down again. Where nothing `trains`, trainers are not
    warmed up, and may be asked all the same."""
    student = await asyncio.to_thread(load_student, recipe)
    from cluster.fleet import start_engines, stop_engines
    from cluster.pool import EnginesLost, Pool
    from cluster.session import ray_session
    from cluster.trainers import start_trainers

    clock = asyncio.get_running_loop().time
    began = clock()
    with ray_session(recipe.cluster) as nodes:
        try:
            placement = place(recipe.cluster, recipe.engine.tensor_parallel, nodes, recipe.engine.num_per_actor)
        except PlacementError as error:
            raise UserError(str(error)) from None
        progress("", "engines", {"starting": recipe.cluster.num_engines})
        spec, cluster = engine_spec(recipe, student), recipe.cluster
        filters_warm = asyncio.create_task(warm_filters())  # nobody needs them before the first rows are there
        trainers = None if placement.time_shared else start_trainers(cluster, placement)
        if trainers and trains and recipe.engine.kind == "vllm":
            trainers.warm()  # beside the engines, which take longer to start
        try:
            try:
                fleet = await start_engines(spec, cluster, placement)
            except EnginesLost as error:
                raise TaskFailed(str(error)) from error
            pool = Pool(fleet)
            trainers = trainers or start_trainers(cluster, placement, fleet.actors)
            progress("", "engines", {"ready": cluster.num_engines, "seconds": clock() - began})
            try:
                yield Session(recipe, student, fleet, pool, trainers, clock() - began)
            finally:
                await pool.close()
                stop_engines(fleet)
        finally:
            if trainers:
                trainers.stop()
            await asyncio.gather(filters_warm, return_exceptions=True)


def load_student(recipe: Recipe) -> Student:
    """Finds the student's files and reads what they say of it; raises `UserError` where they are no student."""
    model = recipe.model
    if not model.path:
        raise UserError(NO_STUDENT)
    try:
        folder = _random_model() if model.path == "random" else resolve_model(student_path(model.path), model.revision)
        read_config(folder)
        check_whole(folder)
        longest = longest_context(recipe.engine, folder)
        tokenizer = load_tokenizer(str(folder))
    except (ModelError, OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if model.prompts == "chat" and not tokenizer.has_chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template; set model.prompts: plain")
    chat = tokenizer.has_chat_template if model.prompts == "auto" else model.prompts == "chat"
    if chat:
        try:
            tokenizer.check_chat_template()
        except ModelError as error:
            raise UserError(f"{folder}: {error}") from error
    return Student(str(folder), model_digest(folder), tokenizer, chat, longest)


def student_digest(recipe: Recipe) -> str:
    """Who the student is, without its tokenizer, which takes seconds to load. Raises `UserError`."""
    return model_digest(_student_folder(recipe))


def _student_folder(recipe: Recipe) -> Path:
    model = recipe.model
    if not model.path:
        raise UserError("no student: name one with --model FOLDER_OR_HUB_NAME, or model.path in the recipe")
    try:
        folder = _random_model() if model.path == "random" else resolve_model(student_path(model.path), model.revision)
        read_config(folder)
        check_whole(folder)
    except (ModelError, OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return folder


def engine_spec(recipe: Recipe, student: Student) -> EngineSpec:
    engine, full = recipe.engine, recipe.finetuning.method == "full"
    return EngineSpec(
        model=student.folder, kind=engine.kind, dtype=recipe.model.dtype, tensor_parallel=engine.tensor_parallel,
        max_model_len=student.max_model_len, max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens, gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_gib=engine.kv_cache_gib, block_size=engine.block_size, max_loras=0 if full else engine.max_loras,
        max_lora_rank=recipe.finetuning.lora_rank, seed=recipe.seed, per_actor=engine.num_per_actor,
        tokens_per_s=engine.tokens_per_s, simulation=engine.simulation, faults=engine.faults,
        adapter_cache_gib=engine.adapter_cache_gib,
    )  # fmt: skip


def check_run(run: TaskRun) -> None:
    """Nothing starts that cannot finish: prompts fit, and there is room on the disk."""
    check_prompts(run.task, run.recipe, run.prompts)
    if not run.is_english and run.recipe.evaluation.gpt2:
        load_gpt2(run.recipe.evaluation.gpt2)
    if isinstance(run.store.root, Url):
        return
    stat = os.statvfs(existing(run.store.root))
    if stat.f_bavail * stat.f_frsize < MIN_FREE_BYTES:
        raise UserError(
            f"{run.store.root}: less than {MIN_FREE_BYTES >> 30} GiB free; make room or choose another --out"
        )


def check_prompts(task: Task, recipe: Recipe, prompts: Prompts) -> None:
    """Raises `UserError` where the instruction alone leaves no room in the student's context for an answer."""
    max_tokens = max(part.sampling.max_tokens for part in (recipe.synthesis, recipe.annotation, recipe.evaluation))
    try:
        prompts.new_input(0, [], next(iter(task.labels), None), max_tokens)
        prompts.answer("", max_tokens, 0)
    except TooLong as error:
        raise UserError(f"{task.source}: the instruction does not fit the student's context: {error}") from None


def check_stage_names(names: Sequence[str]) -> None:
    """Raises `UserError` for what is no stage that can be forced."""
    for name in names:
        if name not in STAGES:
            raise UserError(f"--force {name}: no such stage; choose {', '.join(STAGES)}")


def _random_model() -> Path:
    """The random-weights Llama, made once per machine, in a process of its own, since it needs torch."""
    folder = cache_folder() / f"random-llama-{_RANDOM_MODEL_VERSION}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "engines.random_model", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"making the random model failed:\n{done.stderr}")
    return folder
