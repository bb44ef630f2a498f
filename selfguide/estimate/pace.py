"""What a run folder tells of a student's pace: tokens of a row, the share of rows that is kept, tokens of a second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from selfguide.evaluation import Protocol
from selfguide.filters.chain import PairJudge, pairs_table
from selfguide.records import ACCEPTED
from selfguide.store import SHARD_ROWS, Artifact, RunStore, Stage, busy_seconds
from selfguide.taskrun import TaskRun, chosen


@dataclass(frozen=True)
class Pace:
    """Tokens of a row, the share of candidates that become pairs, and output tokens of a second; None is unknown."""

    source: str
    tokens_in: float
    tokens_out: float
    per_second: float | None = None
    kept: float | None = None


class PaceBook:
    """Finished stages of the same student on the same kind of engine. Rates are told by all tasks, rows by the own."""

    def __init__(self, run: TaskRun, store: RunStore) -> None:
        self._run = run
        self._own = [one for one in run.store.artifacts() if self._is_comparable(one)]
        self._all = [one for task in store.tasks() for one in task.artifacts() if self._is_comparable(one)]

    def _is_comparable(self, one: Artifact) -> bool:
        made_by, kind = one.marker["made_by"], self._run.recipe.engine.kind
        return bool(made_by.get("model") == self._run.student.digest and made_by.get("engine", kind) == kind)

    def synthesis(self, stage: Stage) -> Pace | None:
        """Of this stage as far as it got, or of the last synthesis of the task that sampled alike."""
        recipe = self._run.recipe
        wanted = (chosen(recipe.synthesis.sampling), chosen(recipe.annotation))
        for one in reversed([one for one in self._own if one.stage == "synthesis"]):
            made_by = one.marker["made_by"]
            if (made_by["synthesis"]["sampling"], made_by["annotation"]) == wanted:
                return self._rated(replace(_of_artifact(one), kept=self._kept_share(one)), "synthesis")
        started = _of_unfinished(stage)
        targeted = self._run.target_rows is not None
        return replace(started, kept=self._kept_so_far(stage) if targeted else None) if started else None

    def _kept_share(self, synthesis: Artifact) -> float | None:
        num_candidates = synthesis.marker["ledger"]["candidates"]
        if synthesis.marker["enough"]:
            return float(synthesis.marker["made_by"]["synthesis"]["target_rows"] / num_candidates)
        behind = [f"synthesis/{synthesis.path.name}"]
        curated = [one for one in self._own if one.stage == "curation" and one.marker["inputs"] == behind]
        return float(curated[-1].marker["ledger"]["accepted"] / num_candidates) if curated else None

    def _kept_so_far(self, stage: Stage) -> float:
        rows = stage.committed()
        pairs = [row for row in rows if row["state"] == ACCEPTED]
        if not pairs:
            return 0.0
        judged = PairJudge(self._run.filters, self._run.context("output")).judge(pairs_table(pairs))
        return float(judged["filter"].is_null().sum() / len(rows))

    def evaluation(self, stage: Stage | None, protocol: Protocol) -> Pace | None:
        """Of the last evaluation of the task that sampled alike, or of this one as far as it got."""
        wanted = (chosen(protocol.sampling), protocol.num_samples, protocol.labels)
        alike = [one for one in self._own if one.stage == "evaluation" and _asking(one) == wanted]
        if alike:
            return self._rated(_of_artifact(alike[-1]), "evaluation")
        return _of_unfinished(stage) if stage else None

    def _rated(self, pace: Pace, stage: str) -> Pace:
        rate = _rate((one.marker["output_tokens"], one.marker["seconds"]) for one in self._all if one.stage == stage)
        return replace(pace, per_second=rate)

    def curation_s(self) -> float | None:
        """Seconds of a curation: most of them pass before its first row."""
        seconds = [one.marker["seconds"] for one in self._all if one.stage == "curation"]
        return max(seconds, default=None)

    def trained_per_second(self) -> float | None:
        """Tokens that finetuning by the same method trains on in a second."""
        method = self._run.recipe.finetuning.method
        alike = [one for one in self._all if one.stage == "finetuning" and _method(one.marker) == method]
        return _rate((one.marker["train"]["tokens"], one.marker["seconds"]) for one in alike)


def _asking(evaluation: Artifact) -> tuple[Any, ...]:
    made_by = evaluation.marker["made_by"]
    return made_by["sampling"], made_by["num_samples"], made_by.get("labels")


def _method(marker: Any) -> str:
    return str(marker["made_by"]["finetuning"]["method"])


def _rate(work: Iterable[tuple[float, float]]) -> float | None:
    pairs = list(work)
    seconds = sum(one for _, one in pairs)
    return sum(tokens for tokens, _ in pairs) / seconds if seconds > 0 else None


def _of_artifact(one: Artifact) -> Pace:
    rows = max(1, one.marker["ledger"]["candidates"])
    tokens = one.marker["prompt_tokens"] / rows, one.marker["output_tokens"] / rows
    return Pace(f"{one.stage}/{one.path.name}", *tokens)


def _of_unfinished(stage: Stage) -> Pace | None:
    """From its events, once a shard is there."""
    rows = len(stage.committed())
    if rows < SHARD_ROWS:
        return None
    tokens, events = stage.tokens(), stage.events()
    rate = _rate([(tokens["output_tokens"], busy_seconds(events))])
    return Pace("its first rows", tokens["prompt_tokens"] / rows, tokens["output_tokens"] / rows, rate)
