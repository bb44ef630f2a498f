"""Stage 3: kept pairs become training rows, training rows an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.trainers import TrainingFailed
from engines.files import locate, move_folder, remove_folder
from engines.types import AdapterRef, Canary, TrainResult, TrainSpec
from selfguide.errors import TaskFailed
from selfguide.prompts import TooLong
from selfguide.records import ACCEPTED, REJECTED, Ledger
from selfguide.store import Artifact, Stage, write_rows
from selfguide.taskrun import TaskRun, chosen

VERSION = 1
SCHEMA = pa.schema([
    ("row", pa.int32()), ("state", pa.string()), ("filter", pa.string()), ("reason", pa.string()),
    ("prompt_tokens", pa.int32()), ("input_ids", pa.list_(pa.int32())),
])  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """The finetuned student, and the training rows that can prove it in an engine."""

    ref: AdapterRef
    canaries: tuple[Canary, ...]
    artifact: Artifact
    least_change: float | None = None
    """Of an adapter from elsewhere, whose canaries hold an engine's word, not a trainer's: nats a token below which it
    counts as no change."""


async def finetune(run: TaskRun, kept: Artifact) -> Adapter:
    """Trains on the kept pairs; a killed job goes on from its last epoch. Rows that do not fit are counted."""
    pairs = [pair for pair in kept.rows(["row", "state", "input", "output"]) if pair["state"] == ACCEPTED]
    sources = [_Source(pair["row"], pair["input"], pair["output"]) for pair in pairs]
    return await _finetune(run, finetuning_stage(run, kept), sources, run.recipe.finetuning.min_rows, "finetuning")


async def finetune_gold(run: TaskRun) -> Adapter:
    """The same training on the gold examples alone, leave-one-out: each example's prompt shows the others.

    The authors' own version has the row's answer among its demonstrations, so that there is nothing to learn.
    """
    numbers = range(len(run.task.examples))
    others = [tuple(other for other in numbers if other != number) for number in numbers]
    sources = [_Source(i, one.input, one.output, others[i]) for i, one in enumerate(run.task.examples)]
    return await _finetune(run, gold_finetuning_stage(run), sources, 1, "few_shot_sft")


@dataclass(frozen=True)
class _Source:
    """What one training row is made from; `shown` numbers the gold examples in its prompt, None is as in evaluation."""

    row: int
    input: str
    output: str
    shown: tuple[int, ...] | None = None


async def _finetune(run: TaskRun, stage: Stage, sources: Sequence[_Source], least: int, heard_as: str) -> Adapter:
    async with run.lock(stage):
        if not stage.done:
            with stage.writing():
                rows = [_training_row(run, source) for source in sources]
                ledger = Ledger.of(rows)
                ledger.reconcile(len(sources))
                if ledger.accepted < least:
                    longest = run.recipe.finetuning.max_length
                    raise TaskFailed(
                        f"{run.task.name}: {ledger.accepted} rows fit finetuning.max_length {longest}; raise it"
                    )
                result = await _train(run, stage, rows, heard_as)
                _keep_weights(stage, result)
                # What the trainer read is what is kept, unless it was not shown all.
                whole = ledger.accepted == ledger.candidates
                stage.finish(_train_file(stage) if whole else rows, SCHEMA, ledger, train=_described(result))
    assert stage.done is not None
    return read_adapter(stage.done)


def finetuning_stage(run: TaskRun, kept: Artifact) -> Stage:
    return run.store.stage("finetuning", run.made_by(VERSION, **_config(run)), [kept])


def gold_finetuning_stage(run: TaskRun) -> Stage:
    return run.store.stage("finetuning", run.made_by(VERSION, **_config(run), rows="gold examples, leave one out"), [])


def _config(run: TaskRun) -> dict[str, Any]:
    finetuning = chosen(run.recipe.finetuning)
    if not finetuning["keep_epochs"]:
        del finetuning["keep_epochs"]  # the stage is the one that it was before there was the key
    if finetuning.pop("simulated_tokens_per_s"):
        finetuning["simulated"] = True  # how fast changes no weight
    return {"finetuning": finetuning, "demonstrations": run.recipe.evaluation.demonstrations}


def _training_row(run: TaskRun, source: _Source) -> dict[str, Any]:
    row = {"row": source.row, "state": ACCEPTED, "filter": None, "reason": None}
    longest, count = run.recipe.finetuning.max_length, run.num_demonstrations
    try:
        ids, cut = run.prompts.training(source.input, source.output, longest, count, source.shown)
    except TooLong as error:
        why = {"state": REJECTED, "filter": "max_length", "reason": str(error)}
        return row | why | {"prompt_tokens": None, "input_ids": None}
    return row | {"prompt_tokens": cut, "input_ids": np.frombuffer(ids, np.int32)}


async def _train(run: TaskRun, stage: Stage, rows: list[dict[str, Any]], heard_as: str) -> TrainResult:
    path, work = _train_file(stage), stage.work / "trainer"
    work.mkdir(exist_ok=True)
    write_rows(path, [row for row in rows if row["state"] == ACCEPTED], SCHEMA)

    def hear(step: dict[str, Any]) -> None:
        run.report(heard_as, rows=step["step"], of=step["steps"], loss=step["loss"])

    try:
        return await run.trainers.train(train_spec(run), path, work, hear)
    except TrainingFailed as error:
        raise TaskFailed(f"{run.task.name}: finetuning failed: {error}") from error


def _train_file(stage: Stage) -> Any:
    return stage.work / "train.parquet"


def train_spec(run: TaskRun) -> TrainSpec:
    config = chosen(run.recipe.finetuning)
    del config["min_rows"]
    spec = TrainSpec(model=run.student.folder, base_digest=run.student.digest, dtype=run.recipe.model.dtype, **config)
    return replace(spec, seed=run.row_seed("finetuning", 0) % 2**31)


def _keep_weights(stage: Stage, result: TrainResult) -> None:
    """Moves the final weights beside the stage's rows, and with `keep_epochs` those of the epochs before.

    The trainer's folder goes with the work folder.
    """
    *others, final = _kept(result)
    for name in ("weights", "epochs"):  # of a process that was killed before its marker
        remove_folder(stage.path / name)
    if others:
        (stage.path / "epochs").mkdir()
    for epoch, ref in enumerate(others, 1):
        move_folder(locate(ref.url), stage.path / "epochs" / str(epoch))
    move_folder(locate(final.url), stage.path / "weights")


def _kept(result: TrainResult) -> tuple[AdapterRef, ...]:
    """The trainer may have left more checkpoints than it was asked to keep."""
    return result.checkpoints if result.epoch_logprobs else result.checkpoints[-1:]


def _described(result: TrainResult) -> dict[str, Any]:
    """Not by `asdict`, which copies every token of the canaries by itself."""
    facts = {field.name: getattr(result, field.name) for field in fields(result)}
    canaries = [{field.name: getattr(one, field.name) for field in fields(one)} for one in result.canaries]
    return facts | {"checkpoints": list(map(asdict, _kept(result))), "canaries": canaries}


def read_adapter(artifact: Artifact) -> Adapter:
    """Paths are worked out anew, so that a run folder can be moved."""
    train = artifact.marker["train"]
    ref = AdapterRef(**{**train["checkpoints"][-1], "url": str(artifact.path / "weights")})
    canaries = tuple(Canary(**{key: tuple(value) for key, value in one.items()}) for one in train["canaries"])
    return Adapter(ref, canaries, artifact)


def read_epochs(artifact: Artifact) -> dict[int, Adapter]:
    """The student after each epoch that was kept, with the trainer's word on the canaries then; the last is final."""
    train, final = artifact.marker["train"], read_adapter(artifact)
    adapters = {}
    pairs = zip(train["checkpoints"][:-1], train.get("epoch_logprobs", ())[:-1], strict=True)
    for epoch, (ref, logprobs) in enumerate(pairs, 1):
        there = AdapterRef(**{**ref, "url": str(artifact.path / "epochs" / str(epoch))})
        said = zip(final.canaries, logprobs, strict=True)
        canaries = tuple(replace(canary, tuned_logprobs=tuple(one)) for canary, one in said)
        adapters[epoch] = Adapter(there, canaries, artifact)
    return {**adapters, train["epochs"]: final}
