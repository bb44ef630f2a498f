"""Stage 2: which pairs are trained on. One pure function over a task's rows, run by Ray Data for many tasks at once."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from cluster.transforms import Transforms
from engines.files import AnyPath
from selfguide.config import Filters
from selfguide.errors import TaskFailed
from selfguide.filters import Context
from selfguide.records import ACCEPTED, Ledger
from selfguide.store import Artifact, Stage, write_whole
from selfguide.taskrun import TaskRun, chosen

VERSION = 2


@dataclass(frozen=True)
class CurationJob:
    """All that a worker needs: files and the chain, no rows."""

    rows: AnyPath
    kept: AnyPath
    filters: Filters
    context: Context
    calibrated: bool = False


async def curate(run: TaskRun, candidates: Artifact) -> Artifact:
    """Pairs, each accepted or rejected with its reason. Raises `TaskFailed` where too few are left to train on."""
    stage = curation_stage(run, candidates)
    async with run.lock(stage):
        if not (kept := stage.done):
            with stage.writing():
                path = stage.work / "rows.parquet"
                job = CurationJob(candidates.rows_path, path, run.filters, run.context("output"), run.is_calibrated)
                ledger = await run.transforms.apply(judge_file, job)
                ledger.reconcile(candidates.marker["ledger"]["accepted"])
                kept = stage.finish(path, None, ledger)
    run.report("curation", rows=kept.marker["ledger"]["candidates"], kept=kept.marker["ledger"]["accepted"])
    _check_enough(run, candidates, kept)
    return kept


def curation_stage(run: TaskRun, candidates: Artifact) -> Stage:
    return run.store.stage("curation", run.made_by(VERSION, filters=chosen(run.filters)), [candidates])


async def warm_filters() -> None:
    """Starts Ray Data and loads the filters in its workers: seconds that cost nothing while engines start."""
    await Transforms().apply(_load_filters, None)


def _load_filters(_: None) -> None:
    import selfguide.filters.chain  # noqa: F401


def judge_file(job: CurationJob) -> Ledger:
    """Reads synthesis rows; writes row, input, label, output, votes, share, margin, tokens, state, filter, reason."""
    import polars as pl

    from selfguide.filters.chain import SAMPLES, PairJudge, judge_set

    rows = pl.read_parquet(job.rows.read_bytes()).filter(pl.col("state") == ACCEPTED)
    judge, rows = PairJudge(job.filters, job.context), rows.cast({"samples": SAMPLES})
    pairs = judge.judge_calibrated(rows) if job.calibrated else judge.judge(rows)
    judged = judge_set(pairs, job.filters.sets, job.context).rename({"text": "output"})
    kept = io.BytesIO()
    judged.write_parquet(kept)
    write_whole(job.kept, kept.getvalue())
    return Ledger.of(judged.select("state", "filter", "reason").iter_rows(named=True))


def _check_enough(run: TaskRun, candidates: Artifact, kept: Artifact) -> None:
    need, have = run.recipe.finetuning.min_rows, kept.marker["ledger"]["accepted"]
    if have < need:
        losses = {**candidates.marker["ledger"]["rejected"], **candidates.marker["ledger"]["failed"]}
        losses |= {f"{name} (pairs)": count for name, count in kept.marker["ledger"]["rejected"].items()}
        worst = ", ".join(f"{name} {count}" for name, count in sorted(losses.items(), key=_by_count)[:4])
        raise TaskFailed(
            f"{run.task.name}: {have} of {candidates.marker['ledger']['candidates']} candidates are left, "
            f"finetuning.min_rows is {need}; lost to {worst}; loosen that filter or raise synthesis.num_candidates"
        )


def _by_count(item: tuple[str, Any]) -> int:
    return -int(item[1])
