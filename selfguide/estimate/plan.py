"""Which stages a run finds done, and what is left of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from engines.files import folder_bytes
from selfguide.config import Finetuning
from selfguide.curation import curation_stage
from selfguide.estimate.assumed import Assumptions
from selfguide.estimate.lengths import (
    bytes_per_token,
    candidate_tokens,
    evaluation_tokens,
    gold_tokens,
    num_orders,
    pair_bytes,
    training_tokens,
)
from selfguide.estimate.pace import Pace, PaceBook
from selfguide.evaluation import Protocol, evaluation_stage
from selfguide.finetuning import finetuning_stage, gold_finetuning_stage, read_adapter
from selfguide.methods import tuned_protocol, untuned_protocols, wanted_controls
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
    tokens that are trained on, over all epochs. `peak_bytes` lie on the disk only while the stage works. `gpu_seconds`
    are those of all GPUs that it holds.
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
    gpu_seconds: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Answers:
    """Tokens of a row's answers: at most, and as long as the gold examples."""

    most: int
    usual: float


class Planner:
    """One task's stages against one run folder. What was assumed stands in where nothing was measured."""

    def __init__(
        self, run: TaskRun, store: RunStore, size: ModelSize, force: frozenset[str], assumed: Assumptions | None = None
    ) -> None:
        self._run, self._size, self._force, self._assumed = run, size, force, assumed
        self._pace = PaceBook(run, store)
        self._token_bytes = bytes_per_token(run)
        cluster = run.recipe.cluster
        self._engine_gpus = cluster.num_engines * run.recipe.engine.tensor_parallel
        self._trainer_gpus = cluster.gpus_per_trainer

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
        if self._run.target_rows is not None:
            plan = _until_enough(plan, self._run.target_rows, pace)
        if plan.rows is None and self._assumed:
            plan = replace(plan, rows=plan.most_rows)
        an_input, an_output = gold_tokens(self._run)
        most = config.sampling.max_tokens + annotation.num_samples * annotation.sampling.max_tokens
        answers = _Answers(most, an_input + annotation.num_samples * an_output)
        if self._run.is_calibrated:  # a prompt of which labels are read costs one token
            weighed = num_orders(self._run)
            answers = _Answers(config.sampling.max_tokens + weighed, an_input + weighed)
        return self._count_tokens(plan, pace, candidate_tokens(self._run), answers)

    def _plan_curation(self, stage: Stage | None, candidates: Artifact | None) -> Plan:
        if stage and (done := self._done(stage)):
            return _finished(done)
        annotated = candidates.marker["ledger"]["accepted"] if candidates else None
        most = self._run.recipe.synthesis.num_candidates if annotated is None else annotated
        plan = self._begin("curation", stage, most)
        disk_bytes = _FILES_BYTES + round(most * pair_bytes(self._run))
        return replace(plan, rows=annotated, disk_bytes=disk_bytes, seconds=self._curation_s(), gpu_seconds=0.0)

    def _curation_s(self) -> float | None:
        """Measured, or next to nothing."""
        return self._pace.curation_s() or (0.0 if self._assumed else None)

    def _plan_finetuning(self, stage: Stage | None, kept: Artifact | None) -> Plan:
        if stage and (done := self._done(stage)):
            return _finished(done)
        pairs = kept.marker["ledger"]["accepted"] if kept else None
        most = pairs or self._run.target_rows or self._run.recipe.synthesis.num_candidates
        expected = self._expected_pairs() if pairs is None and self._assumed else pairs
        plan = self._begin("finetuning", stage, most)
        return self._count_training(plan, expected, _share_trained(stage) if stage else 0.0)

    def _count_training(self, plan: Plan, rows: int | None, share_done: float = 0.0) -> Plan:
        """`rows` are expected of the `most_rows` that there may be."""
        config, (a_row, notes) = self._run.recipe.finetuning, training_tokens(self._run)

        def count(number: int) -> int:
            return round((1.0 - share_done) * number * _epochs(config, number) * a_row)

        plan = replace(
            plan, rows=rows, tokens_in=count(rows) if rows else None, most_tokens_in=count(plan.most_rows),
            disk_bytes=_FILES_BYTES + saved_bytes(self._size, config),
            peak_bytes=checkpoint_bytes(self._size, config), notes=(*plan.notes, *notes),
        )  # fmt: skip
        return self._time_training(plan)

    def _expected_pairs(self) -> int:
        """Where nothing was kept yet: the target, or the assumed share of all candidates."""
        assert self._assumed
        config = self._run.recipe.synthesis
        share = math.ceil(config.num_candidates * min(1.0, self._assumed.kept_share))
        return min(self._run.target_rows or share, config.num_candidates)

    def _time_training(self, plan: Plan) -> Plan:
        tokens = plan.most_tokens_in if plan.tokens_in is None else plan.tokens_in
        if rate := self._pace.trained_per_second():
            return _timed(plan, tokens / rate, self._trainer_gpus)
        if self._assumed:
            gpus = self._trainer_gpus or 1
            return _timed(plan, self._assumed.seconds(train=tokens) / gpus, gpus)
        return plan

    def _plan_evaluations(self, trained: Artifact | None) -> list[Plan]:
        run = self._run
        if not run.evaluation_instances:
            return []
        asked, plans = untuned_protocols(run), dict[str, Plan]()
        for name in ("base", *(name for name in wanted_controls(run) if name in asked)):
            stage = evaluation_stage(run, asked[name])
            shared = None if self._done(stage) else _shared(f"evaluation: {name}", stage, plans)
            plans[name] = shared or self._plan_evaluation(asked[name], stage)
        gold = self._plan_few_shot_sft() if "few_shot_sft" in wanted_controls(run) else []
        return [*plans.values(), *gold, self._plan_tuned("self_guide", trained)]

    def _plan_few_shot_sft(self) -> list[Plan]:
        """The control that is trained on the gold examples, and its evaluation."""
        stage = gold_finetuning_stage(self._run)
        done, name = self._done(stage), "finetuning: few_shot_sft"
        rows = len(self._run.task.examples)
        plan = (
            replace(_finished(done), stage=name) if done else self._count_training(self._begin(name, stage, rows), rows)
        )
        return [plan, self._plan_tuned("few_shot_sft", done)]

    def _plan_tuned(self, method: str, trained: Artifact | None) -> Plan:
        protocol = tuned_protocol(self._run, read_adapter(trained) if trained else None, method)
        return self._plan_evaluation(protocol, evaluation_stage(self._run, protocol) if trained else None)

    def _plan_evaluation(self, protocol: Protocol, stage: Stage | None) -> Plan:
        name = f"evaluation: {protocol.method}"
        if stage and (done := self._done(stage)):
            return replace(_finished(done), stage=name)
        plan = self._begin(name, stage, len(self._run.evaluation_instances))
        a_prompt, notes = evaluation_tokens(self._run, protocol)
        plan = replace(plan, rows=plan.most_rows, notes=(*plan.notes, *notes))
        pace = self._pace.evaluation(stage, protocol)
        pace = replace(pace, tokens_in=a_prompt) if pace else None  # its prompts may have held other demonstrations
        count = protocol.num_samples
        answers = _Answers(count * protocol.sampling.max_tokens, count * gold_tokens(self._run)[1])
        return self._count_tokens(plan, pace, a_prompt, _Answers(1, 1) if protocol.labels else answers)

    def _count_tokens(self, plan: Plan, pace: Pace | None, a_prompt: float, answers: _Answers) -> Plan:
        """`a_prompt` and `answers` are tokens of a row."""
        a_prompt = pace.tokens_in if pace else a_prompt
        an_answer = pace.tokens_out if pace else None
        if an_answer is None and self._assumed:
            an_answer = min(answers.most, self._assumed.answer_length * answers.usual)
        tokens_in = None if plan.rows is None else round(plan.rows * a_prompt)
        tokens_out = None if plan.rows is None or an_answer is None else round(plan.rows * an_answer)
        most_out = plan.most_rows * answers.most
        plan = replace(
            plan, tokens_in=tokens_in, most_tokens_in=round(plan.most_rows * a_prompt),
            tokens_out=tokens_out, most_tokens_out=most_out,
            disk_bytes=_FILES_BYTES + round((most_out if tokens_out is None else tokens_out) * self._token_bytes),
        )  # fmt: skip
        return self._time_engines(plan, pace.per_second if pace else None)

    def _time_engines(self, plan: Plan, rate: float | None) -> Plan:
        """At the measured output tokens of a second, which prompts have slowed already, or as assumed."""
        if plan.tokens_in is None or plan.tokens_out is None:
            return plan
        if rate:
            return _timed(plan, plan.tokens_out / rate, self._engine_gpus)
        if self._assumed:
            seconds = self._assumed.seconds(prompt=plan.tokens_in, output=plan.tokens_out)
            return _timed(plan, seconds / self._engine_gpus, self._engine_gpus)
        return plan


def _timed(plan: Plan, seconds: float, gpus: float) -> Plan:
    return replace(plan, seconds=round(seconds, 1), gpu_seconds=round(seconds * gpus, 1))


def _shared(name: str, stage: Stage, plans: Mapping[str, Plan]) -> Plan | None:
    """Methods that ask alike share one evaluation, which is planned once."""
    for other, plan in plans.items():
        if plan.fingerprint == stage.fingerprint:
            note = f"asks what {other} asks: they share one evaluation"
            return Plan(
                name, plan.status, stage.fingerprint, 0, 0, 0, 0, 0, 0, seconds=0.0, gpu_seconds=0.0, notes=(note,)
            )
    return None


def _finished(artifact: Artifact) -> Plan:
    marker = artifact.marker
    rows = marker["ledger"]["candidates"]
    tokens_in = marker.get("prompt_tokens", marker.get("train", {}).get("tokens", 0))
    tokens_out = marker.get("output_tokens", 0)
    return Plan(
        artifact.stage, "done", artifact.path.name, rows, rows, rows, tokens_in, tokens_in, tokens_out, tokens_out,
        disk_bytes=folder_bytes(artifact.path), seconds=marker["seconds"],
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
