"""Which stages a run finds done, and what is left of the others."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Literal

from selfguide.config import Finetuning
from selfguide.curation import curation_stage
from selfguide.estimate.lengths import bytes_per_token, candidate_tokens, evaluation_tokens, pair_bytes, training_tokens
from selfguide.estimate.pace import Pace, PaceBook
from selfguide.evaluation import Protocol, evaluation_stage
from selfguide.finetuning import finetuning_stage, read_adapter
from selfguide.methods import tuned_protocol, untuned_protocols
from selfguide.sizes import ModelSize, checkpoint_bytes, saved_bytes
from selfguide.store import Artifact, RunStore, Stage
from selfguide.synthesis import synthesis_stage
from selfguide.taskrun import TaskRun

_BEHIND = {"curation": "the rows of synthesis, which are", "finetuning": "the pairs of curation, which are"}
_FILES_BYTES = 8 << 10
"""A stage's marker and events, and what a Parquet file has beside its rows."""


@dataclass(frozen=True)
class Plan:
    """One stage: what it took where it is done, else what is left of it.

    `most_*` are bounds, the others expectations, None where nothing tells. Tokens in are prompts; in finetuning, all
    tokens that are trained on, over all epochs. `peak_bytes` lie on the disk only while the stage works.
    """

    stage: str
    status: Literal["done", "unfinished", "to do"]
    fingerprint: str | None = None
    rows_done: int = 0
    rows: int | None = None
    most_rows: int = 0
    tokens_in: int | None = None
    most_tokens_in: int = 0
    tokens_out: int | None = None
    most_tokens_out: int = 0
    disk_bytes: int = 0
    peak_bytes: int = 0
    seconds: float | None = None
    notes: tuple[str, ...] = ()


class Planner:
    """One task's stages against one run folder."""

    def __init__(self, run: TaskRun, store: RunStore, size: ModelSize, force: frozenset[str]) -> None:
        self._run, self._size, self._force = run, size, force
        self._pace = PaceBook(run, store)
        self._token_bytes = bytes_per_token(run)

    def plan(self) -> list[Plan]:
        """A later stage's fingerprint follows from the earlier one's rows, and is known only once those are there."""
        run = self._run
        synthesis = synthesis_stage(run)
        candidates = self._done(synthesis)
        curation = curation_stage(run, candidates) if candidates else None
        kept = self._done(curation)
        finetuning = finetuning_stage(run, kept) if kept else None
        first = self._plan_synthesis(synthesis)
        second = self._plan_curation(curation, candidates)
        third = self._plan_finetuning(finetuning, kept)
        return [first, second, third, *self._plan_evaluations(self._done(finetuning))]

    def _done(self, stage: Stage | None) -> Artifact | None:
        return None if stage is None or stage.name in self._force else stage.done

    def _begin(self, name: str, stage: Stage | None, total: int) -> Plan:
        """What is left of `total` rows."""
        if stage is None:
            note = f"its fingerprint follows from {_BEHIND.get(name, 'the adapter, which is')} not there yet"
            return Plan(name, "to do", most_rows=total, notes=(note,))
        if stage.name in self._force or not stage.work.is_dir():
            return Plan(name, "to do", stage.fingerprint, most_rows=total)
        num_done = len(stage.committed())
        return Plan(name, "unfinished", stage.fingerprint, num_done, most_rows=max(0, total - num_done))

    def _plan_synthesis(self, stage: Stage) -> Plan:
        if done := self._done(stage):
            return _finished(done)
        config, annotation = self._run.recipe.synthesis, self._run.recipe.annotation
        plan, pace = self._begin("synthesis", stage, config.num_candidates), self._pace.synthesis(stage)
        plan = replace(plan, rows=plan.most_rows)
        if config.target_rows is not None:
            plan = _until_enough(plan, config.target_rows, pace)
        answers = config.sampling.max_tokens + annotation.num_samples * annotation.sampling.max_tokens
        return self._count_tokens(plan, pace, candidate_tokens(self._run), answers)

    def _plan_curation(self, stage: Stage | None, candidates: Artifact | None) -> Plan:
        if stage and (done := self._done(stage)):
            return _finished(done)
        annotated = candidates.marker["ledger"]["accepted"] if candidates else None
        most = self._run.recipe.synthesis.num_candidates if annotated is None else annotated
        plan = self._begin("curation", stage, most)
        disk_bytes = _FILES_BYTES + round(most * pair_bytes(self._run))
        return replace(plan, rows=annotated, disk_bytes=disk_bytes, seconds=self._pace.curation_s())

    def _plan_finetuning(self, stage: Stage | None, kept: Artifact | None) -> Plan:
        if stage and (done := self._done(stage)):
            return _finished(done)
        recipe = self._run.recipe
        pairs = kept.marker["ledger"]["accepted"] if kept else None
        most = pairs or recipe.synthesis.target_rows or recipe.synthesis.num_candidates
        a_row, notes = training_tokens(self._run)
        plan = self._begin("finetuning", stage, most)
        left = 1.0 - (_share_trained(stage) if stage and plan.status == "unfinished" else 0.0)
        tokens = round(left * most * _epochs(recipe.finetuning, most) * a_row)
        rate = self._pace.trained_per_second()
        return replace(
            plan, rows=pairs, tokens_in=tokens if pairs else None, most_tokens_in=tokens,
            disk_bytes=_FILES_BYTES + saved_bytes(self._size, recipe.finetuning),
            peak_bytes=checkpoint_bytes(self._size, recipe.finetuning),
            seconds=round(tokens / rate, 1) if rate else None, notes=(*plan.notes, *notes),
        )  # fmt: skip

    def _plan_evaluations(self, trained: Artifact | None) -> list[Plan]:
        run = self._run
        if not run.evaluation_instances:
            return []
        asked = untuned_protocols(run)
        untuned = [asked[name] for name in ("base", *run.recipe.evaluation.controls)]
        plans = [self._plan_evaluation(protocol, evaluation_stage(run, protocol)) for protocol in untuned]
        tuned = tuned_protocol(run, read_adapter(trained) if trained else None)
        return [*plans, self._plan_evaluation(tuned, evaluation_stage(run, tuned) if trained else None)]

    def _plan_evaluation(self, protocol: Protocol, stage: Stage | None) -> Plan:
        name = f"evaluation: {protocol.method}"
        if stage and (done := self._done(stage)):
            return replace(_finished(done), stage=name)
        plan = self._begin(name, stage, len(self._run.evaluation_instances))
        a_prompt, notes = evaluation_tokens(self._run, protocol)
        plan = replace(plan, rows=plan.most_rows, notes=(*plan.notes, *notes))
        pace, answers = self._pace.evaluation(stage, protocol), protocol.num_samples * protocol.sampling.max_tokens
        pace = replace(pace, tokens_in=a_prompt) if pace else None  # its prompts may have held other demonstrations
        return self._count_tokens(plan, pace, a_prompt, answers)

    def _count_tokens(self, plan: Plan, pace: Pace | None, a_prompt: float, answers: int) -> Plan:
        """`a_prompt` and `answers` are tokens of a row: as rendered, and at most."""
        a_prompt = pace.tokens_in if pace else a_prompt
        tokens_in = None if plan.rows is None else round(plan.rows * a_prompt)
        tokens_out = None if plan.rows is None or pace is None else round(plan.rows * pace.tokens_out)
        rate, most_out = pace.per_second if pace else None, plan.most_rows * answers
        return replace(
            plan, tokens_in=tokens_in, most_tokens_in=round(plan.most_rows * a_prompt),
            tokens_out=tokens_out, most_tokens_out=most_out,
            disk_bytes=_FILES_BYTES + round((most_out if tokens_out is None else tokens_out) * self._token_bytes),
            seconds=round(tokens_out / rate, 1) if rate and tokens_out is not None else None,
        )  # fmt: skip


def _finished(artifact: Artifact) -> Plan:
    marker = artifact.marker
    rows = marker["ledger"]["candidates"]
    tokens_in = marker.get("prompt_tokens", marker.get("train", {}).get("tokens", 0))
    tokens_out = marker.get("output_tokens", 0)
    size = sum(path.stat().st_size for path in artifact.path.rglob("*") if path.is_file())
    return Plan(
        artifact.stage, "done", artifact.path.name, rows, rows, rows, tokens_in, tokens_in, tokens_out, tokens_out,
        disk_bytes=size, seconds=marker["seconds"],
    )  # fmt: skip


def _until_enough(plan: Plan, target: int, pace: Pace | None) -> Plan:
    """Synthesis ends when enough pairs are kept: how many candidates that takes, the share so far tells."""
    if pace is None or not pace.kept:
        note = f"ends when {target:,} pairs are kept; how many candidates that takes is unknown until measured"
        return replace(plan, rows=None, notes=(*plan.notes, note))
    wanted = math.ceil(target / pace.kept) - plan.rows_done
    note = f"ends when {target:,} pairs are kept; of {pace.source}, {pace.kept:.0%} were"
    return replace(plan, rows=max(0, min(plan.most_rows, wanted)), notes=(*plan.notes, note))


def _epochs(finetuning: Finetuning, rows: int) -> int:
    """As `engines.sft` counts them: tiny sets train longer."""
    steps = math.ceil(max(1, rows) / (finetuning.batch_size * finetuning.gradient_accumulation))
    return max(finetuning.epochs, math.ceil(finetuning.min_steps / steps))


def _share_trained(stage: Stage) -> float:
    """Of an unfinished training, by its last whole checkpoint."""
    steps = [int(path.parent.name.split("-")[1]) for path in stage.work.glob("trainer/checkpoint-*/trainer_state.json")]
    log = stage.work / "trainer" / "progress.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    total = json.loads(lines[-1])["steps"] if lines else 0
    return max(steps, default=0) / total if total else 0.0
