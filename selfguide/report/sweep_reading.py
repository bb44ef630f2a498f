"""A sweep's files, read: what is listed, what became of it, and each task's stages and scores, one task at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engines.files import AnyPath
from selfguide.errors import UserError
from selfguide.intervals import resample_columns
from selfguide.report.collect import Artifacts, id_of, is_intact, methods_of, primary_metric
from selfguide.report.sweep_significance import sign_flip_p
from selfguide.store import Artifact, Journal, RunStore

FORMAT = 1
"""Version of the sweep's files; a newer one is refused."""
STATES = ("done", "failed", "waiting")
_DRAWS = 1_000
"""Resamples of a task's rows that intervals over tasks draw from."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The files of `sweep/`: what is listed, all outcomes by job, oldest first, and the driver's events."""

    facts: Json
    outcomes: Mapping[str, Sequence[Json]]
    events: Sequence[Json]


@dataclass(frozen=True)
class TaskScores:
    """One task's held-out rows by one metric: what statistics over tasks need of them, by method."""

    metric: str
    num_rows: int
    means: Mapping[str, float]
    """0 to 1."""
    resampled: Mapping[str, Any]
    """So many draws, float32: means of resamples; draw by draw of the same rows for every method."""
    chances: Mapping[str, float]
    """Two-sided p of SELF-GUIDE's difference to the method, not adjusted."""


@dataclass(frozen=True)
class SweptTask:
    """One listed task and what became of it. `stages` are finished ones that its job made or used."""

    listed: Json
    state: str
    attempts: int
    error: str | None
    reason: str | None
    comparison: Artifact | None = None
    stages: Artifacts = field(default_factory=dict)
    methods: Sequence[Json] = ()
    scores: TaskScores | None = None

    @property
    def name(self) -> str:
        return str(self.listed["task"])

    @property
    def job(self) -> str:
        return str(self.listed["job"])

    @cached_property
    def proof(self) -> str | None:
        """Status of the tuned student's proof (docs/report.md)."""
        ours = [self.stages[one["evaluation"]] for one in self.methods if one["method"] == "self_guide"]
        return ours[0].marker["proof"]["status"] if ours else None


def is_sweep(folder: AnyPath) -> bool:
    with suppress(OSError):  # a name too long for a file: whoever reads the folder says so
        return bool((folder / "sweep" / "sweep.json").is_file())
    return False


def read_sweep(folder: AnyPath) -> Sweep:
    """Raises `UserError` where the list of tasks cannot be read; of the others, torn lines are passed over."""
    path = folder / "sweep" / "sweep.json"
    try:
        facts = json.loads(path.read_bytes())
        readable = int(facts["format"]) <= FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "run the same command again, which writes it anew"
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if not readable:
        raise UserError(f"{path}: was written by a newer selfguide (format {facts['format']}); upgrade selfguide")
    outcomes: dict[str, list[Json]] = {}
    for line in _read_lines(path.with_name("outcomes.jsonl"), {"job", "state"}):
        outcomes.setdefault(line["job"], []).append(line)
    return Sweep(facts, outcomes, _read_lines(path.with_name("events.jsonl"), {"event", "time"}))


def _read_lines(path: AnyPath, needed: set[str]) -> list[Json]:
    return [one for one in Journal(path).read() if one.keys() >= needed]


def reconcile(tasks: Sequence[SweptTask], listed: Sequence[Json]) -> dict[str, int]:
    """Tasks by state. Raises `AssertionError` unless every listed one is there once and has exactly one state."""
    ends = Counter(task.state for task in tasks)
    jobs = Counter(task.listed["job"] for task in tasks)
    if jobs != Counter(one["job"] for one in listed) or max(jobs.values(), default=1) > 1 or ends.keys() - set(STATES):
        raise AssertionError(f"{len(listed)} tasks are listed, {len(jobs)} are told apart, with the ends {dict(ends)}")
    return {state: ends[state] for state in STATES}


def read_task(store: RunStore, listed: Json, outcomes: Sequence[Json], seed: int) -> SweptTask:
    """What became of one task. A comparison that is gone, or of stages replaced since, has to be made again."""
    folder = store.task(listed["task"])
    artifacts = {id_of(one): one for one in folder.artifacts()}
    last: Json = outcomes[-1] if outcomes else {"state": "waiting"}
    made = _present(artifacts, [name for one in outcomes for name in one.get("stages") or {}])
    common = {"listed": listed, "attempts": sum(one.get("attempts", 1) for one in outcomes), "stages": made}
    if last["state"] == "failed":
        return SweptTask(state="failed", error=last.get("error"), reason=last.get("reason"), **common)
    if last["state"] != "done":
        return SweptTask(state="waiting", error=None, reason=None, **common)
    where = (last.get("result") or {}).get("comparison")
    if where is None:  # of a method that compares nothing
        return SweptTask(state="done", error=None, reason=None, **common)
    comparison = artifacts.get("/".join(where.split("/")[-2:]))
    if comparison is None or not is_intact(folder, artifacts, comparison):
        reason = "its comparison is gone, or its stages were replaced since: it has to be made again"
        return SweptTask(state="waiting", error=None, reason=reason, **common)
    common["stages"] = _ancestors(artifacts, comparison)
    methods = methods_of(artifacts, comparison)
    metric = primary_metric(comparison.marker["task"]["kind"], methods)
    scores = _score(artifacts, methods, metric, seed) if metric else None
    return SweptTask(
        state="done", error=None, reason=None, comparison=comparison, methods=methods, scores=scores, **common
    )


def _present(artifacts: Artifacts, names: Sequence[str]) -> dict[str, Artifact]:
    return {name: artifacts[name] for name in names if name in artifacts}


def _ancestors(artifacts: Artifacts, one: Artifact) -> dict[str, Artifact]:
    """The artifact itself and all that it was made from, by id."""
    found = {id_of(one): one}
    for name in one.marker["inputs"]:
        found |= _ancestors(artifacts, artifacts[name])
    return found


def _score(artifacts: Artifacts, methods: Sequence[Json], metric: str, seed: int) -> TaskScores:
    """Reads one column of each evaluation; methods without the metric are left out."""
    scored = [one for one in methods if one["scores"][metric]]
    columns = {name: _read_column(artifacts[name], metric) for name in {one["evaluation"] for one in scored}}
    rows = np.column_stack([columns[one["evaluation"]] for one in scored])
    drawn = resample_columns(rows, _DRAWS, np.random.default_rng(seed)).astype(np.float32)
    names, means = [one["method"] for one in scored], rows.mean(axis=0)
    ours = rows[:, names.index("self_guide")]
    return TaskScores(
        metric, len(rows),
        means={name: float(mean) for name, mean in zip(names, means, strict=True)},
        resampled={name: drawn[:, at] for at, name in enumerate(names)},
        chances={name: sign_flip_p(ours - rows[:, at]) for at, name in enumerate(names) if name != "self_guide"},
    )  # fmt: skip


def _read_column(evaluation: Artifact, metric: str) -> Any:
    path = evaluation.rows_path
    try:
        return pq.ParquetFile(pa.BufferReader(path.read_bytes())).read([metric], use_threads=False)[metric].to_numpy()
    except (OSError, pa.ArrowException) as error:
        how = " ".join(str(error).split())[:200]
        remedy = f"move {evaluation.path} away, then run the same command to make it again"
        raise UserError(f"{path}: is damaged ({how}); {remedy}") from error
