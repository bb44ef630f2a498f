"""An adapter from elsewhere: a PEFT folder, checked before anything starts, and measured in the engine."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import pyarrow as pa

from engines.adapters import BadAdapter, check_adapter
from engines.models import weights_digest
from engines.types import AdapterRef, Canary
from selfguide.errors import TaskFailed, UserError
from selfguide.evaluation import canary_logprobs
from selfguide.finetuning import Adapter
from selfguide.prompts import TooLong
from selfguide.records import ACCEPTED, Ledger
from selfguide.store import Artifact, Stage
from selfguide.taskrun import Student, TaskRun

VERSION = 1
MAX_RANK = 512
"""vLLM serves no higher one."""
LEAST_CHANGE = 1e-4
"""Nats a token below which base and adapter count as equal, however little the engine's own answers differ."""
NUM_CANARIES = 8
_LOGPROBS = pa.list_(pa.float64())
SCHEMA = pa.schema([
    ("row", pa.int32()), ("state", pa.string()), ("filter", pa.string()), ("reason", pa.string()),
    ("prefix_ids", pa.list_(pa.int32())), ("completion_ids", pa.list_(pa.int32())),
    ("base_logprobs", _LOGPROBS), ("tuned_logprobs", _LOGPROBS),
])  # fmt: skip


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's config says: the highest rank in it, and the model that it was trained on."""

    folder: Path
    rank: int
    base: str


def read_adapter_file(folder: Path) -> AdapterFile:
    """Raises `UserError` where the folder holds no LoRA in PEFT's layout."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no adapter_config.json; name the folder that PEFT saved the adapter in")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: no configuration of a LoRA ({reason}); save it again") from None
    if not all(isinstance(rank, int) and 1 <= rank <= MAX_RANK for rank in ranks):
        raise UserError(f"{path}: r is {max(ranks, key=str)}; ranks from 1 to {MAX_RANK} are served")
    return AdapterFile(folder.resolve(), max(ranks), str(config.get("base_model_name_or_path") or ""))


def check_adapter_file(file: AdapterFile, student: Student) -> AdapterRef:
    """The adapter as engines know it. Raises `UserError` unless it can be served on this student."""
    ref = AdapterRef("", str(file.folder), file.rank, student.digest)
    try:
        check_adapter(ref, Path(student.folder), file.rank)
    except BadAdapter as error:
        raise UserError(f"{error}; the model it was trained on: {file.base or 'not stated'}") from None
    return replace(ref, digest=weights_digest(file.folder))


async def measure_adapter(run: TaskRun, ref: AdapterRef) -> Adapter:
    """Held-out rows are scored with and without the adapter, once for each task, since nobody else vouches for it.

    Whenever it is evaluated, the engine is held to these log-probabilities (`evaluation._prove`).
    """
    canaries = _draw_canaries(run)
    stage = _stage(run, ref, canaries)
    async with run.lock(stage):
        if not stage.done:
            with stage.writing():
                await _measure(run, stage, ref, canaries)
    assert stage.done is not None
    return _read(stage.done, ref)


def find_measured(run: TaskRun, ref: AdapterRef) -> Adapter | None:
    """The adapter as an earlier `measure_adapter` left it, or None."""
    done = _stage(run, ref, _draw_canaries(run)).done
    return _read(done, ref) if done else None


def _stage(run: TaskRun, ref: AdapterRef, canaries: list[Canary]) -> Stage:
    rows = json.dumps([[*canary.prefix_ids, *canary.completion_ids] for canary in canaries])
    made_by = run.made_by(
        VERSION, adapter=ref.digest, engine=run.recipe.engine.kind, dtype=run.recipe.model.dtype,
        rows=hashlib.sha256(rows.encode()).hexdigest(),
    )  # fmt: skip
    return run.store.stage("adapter", made_by)


def _draw_canaries(run: TaskRun) -> list[Canary]:
    """Held-out rows with their first reference, spread evenly; rows that do not fit are passed over."""
    instances = run.evaluation_instances
    canaries = []
    for instance in instances[:: max(1, len(instances) // NUM_CANARIES)][:NUM_CANARIES]:
        longest = run.student.max_model_len - 1  # the engine writes a token of its own
        with suppress(TooLong):
            ids, cut = run.prompts.training(instance.input, instance.references[0], longest, run.num_demonstrations)
            canaries.append(Canary(tuple(ids[:cut]), tuple(ids[cut:]), (), ()))
    if not canaries:
        raise TaskFailed(f"{run.task.name}: no held-out row fits the context, so no adapter can be measured on them")
    return canaries


async def _measure(run: TaskRun, stage: Stage, ref: AdapterRef, canaries: list[Canary]) -> None:
    before = await canary_logprobs(run, canaries, None)
    tuned = await canary_logprobs(run, canaries, ref)
    again = await canary_logprobs(run, canaries, None)  # from the prefix cache now: rounding shows
    proof = {"change": _distance(tuned, before), "noise": _distance(again, before)}
    rows, start = [], 0
    for number, canary in enumerate(canaries):
        end = start + len(canary.completion_ids)
        logprobs = {"base_logprobs": before[start:end], "tuned_logprobs": tuned[start:end]}
        ids = {"prefix_ids": canary.prefix_ids, "completion_ids": canary.completion_ids}
        rows.append({**dict.fromkeys(SCHEMA.names), "row": number, "state": ACCEPTED, **ids, **logprobs})
        start = end
    adapter = {"digest": ref.digest, "rank": ref.rank}
    stage.finish(rows, SCHEMA, Ledger.of(rows), adapter=adapter, proof=proof)


def _distance(ours: list[float], theirs: list[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _read(artifact: Artifact, ref: AdapterRef) -> Adapter:
    fields = ("prefix_ids", "completion_ids", "base_logprobs", "tuned_logprobs")
    canaries = tuple(Canary(*(tuple(row[field]) for field in fields)) for row in artifact.rows())
    return Adapter(ref, canaries, artifact, max(LEAST_CHANGE, 2 * artifact.marker["proof"]["noise"]))
