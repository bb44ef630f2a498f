"""Stage 4: the same held-out rows for base, tuned student and controls; never a dropped row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa

from engines.types import (
    AdapterRef,
    Canary,
    ChoiceRequest,
    ChoiceScores,
    Completion,
    Outcome,
    Request,
    RequestFailed,
    Sampling,
    Score,
    ScoreRequest,
    Work,
)
from selfguide import metrics
from selfguide.calibration import calibrate, likeliest
from selfguide.config import Sampling as SamplingConfig
from selfguide.errors import TaskFailed
from selfguide.finetuning import Adapter
from selfguide.gpt2 import load_gpt2
from selfguide.intervals import AUTHORS_METRICS, METRICS
from selfguide.prompts import TooLong
from selfguide.records import ACCEPTED, FAILED, Ledger, spent
from selfguide.store import SHARD_ROWS, TOKEN_COUNTS, Artifact, Stage
from selfguide.synthesis import SAMPLE
from selfguide.taskrun import TaskRun, chosen
from selfguide.tasks import Instance

VERSION = 2
SCHEMA = pa.schema([
    ("row", pa.int32()), ("id", pa.string()), ("state", pa.string()), ("filter", pa.string()), ("reason", pa.string()),
    ("prediction", pa.string()), ("references", pa.list_(pa.string())), ("exact_match", pa.float64()),
    ("rouge_l", pa.float64()), ("authors_em", pa.float64()), ("authors_rouge_char", pa.float64()),
    ("prompt_tokens", pa.int32()), ("demonstrations", pa.int32()), ("samples", pa.list_(SAMPLE)),
    ("label_logprobs", pa.list_(pa.float64())),
])  # fmt: skip
MOST_OF_TRAINING = 0.3
"""An engine's log-probabilities may miss the trainer's by this share of what training changed (docs/concepts.md)."""


@dataclass(frozen=True)
class Protocol:
    """How one method asks: which student, how many demonstrations, and how the answer is chosen."""

    method: str
    sampling: SamplingConfig
    num_gold: int | None
    num_samples: int = 1
    filtered: bool = False
    """Take the first sample that the annotation filters let pass, likeliest first (the authors' control)."""
    adapter: Adapter | None = None
    labels: Literal["likeliest", "calibrated"] | None = None
    """Nothing is sampled: the label of highest log-probability in one pass, as it is, or standardised over all rows."""
    split: Literal["test", "validation"] = "test"
    """The rows that are asked."""

    def instances(self, run: TaskRun) -> tuple[Instance, ...]:
        return run.evaluation_instances if self.split == "test" else run.validation_instances

    @property
    def needs_logprobs(self) -> bool:
        return self.filtered


async def evaluate(run: TaskRun, protocol: Protocol) -> Artifact | None:
    """Predictions and scores, one row for each instance; None for a task without such rows."""
    if not protocol.instances(run):
        return None
    stage = evaluation_stage(run, protocol)
    async with run.lock(stage):
        if stage.done:
            return stage.done
        proof = await _prove(run, protocol.adapter) if protocol.adapter else None
        with stage.writing():
            return await _Evaluation(run, protocol, stage).run(proof)


def evaluation_stage(run: TaskRun, protocol: Protocol) -> Stage:
    """Methods that ask in the same way share a stage, whatever they are called."""
    config: dict[str, Any] = {
        "sampling": chosen(protocol.sampling), "num_gold": protocol.num_gold, "num_samples": protocol.num_samples,
        "protocol": run.recipe.evaluation.protocol, "constrain": list(_choices(run)) or False,
        "labels_from": run.task.labels_from, "engine": run.recipe.engine.kind,
    }  # fmt: skip
    if run.recipe.evaluation.gpt2 and not run.is_english:
        config["gpt2"] = load_gpt2(run.recipe.evaluation.gpt2).digest
    if run.recipe.evaluation.protocol == "official":
        config["instances"] = run.recipe.evaluation.num_instances
    if protocol.split == "validation":
        config["validation"] = len(run.validation_instances)
    if protocol.num_gold is not None:
        config["num_gold"] = min(protocol.num_gold, len(run.task.examples))
    elif not protocol.filtered:
        config["num_gold"] = len(run.task.examples)
    if protocol.filtered:
        config["filters"] = {"samples": chosen(run.filters)["samples"], "keep_best": run.recipe.annotation.keep_best}
    if protocol.labels:
        config["labels"] = protocol.labels
    inputs = []
    if protocol.adapter:
        config["adapter"] = protocol.adapter.ref.digest
        inputs = [protocol.adapter.artifact]
    return run.store.stage("evaluation", run.made_by(VERSION, **config), inputs)


def _choices(run: TaskRun) -> tuple[str, ...]:
    """What answers are constrained to; nothing: ()."""
    return run.prompts.choices if run.recipe.evaluation.constrain_labels and run.is_classification else ()


class _Evaluation:
    """The state of one evaluation; rows are instances, in order."""

    def __init__(self, run: TaskRun, protocol: Protocol, stage: Stage) -> None:
        self._run, self._protocol, self._stage = run, protocol, stage
        self._instances = protocol.instances(run)
        self._rows: dict[int, dict[str, Any]] = {}
        self._committed = 0
        self._tokens = dict.fromkeys(TOKEN_COUNTS, 0)

    async def run(self, proof: dict[str, Any] | None) -> Artifact:
        self._committed = len(self._stage.committed())
        requests = []
        for row in range(self._committed, len(self._instances)):
            requests += self._request(row)
        sent = {request.id: row for request, row in requests}
        affinity = self._run.task.name
        async with self._run.pool.channel(affinity, self._stage.log, self._stage.suspects()) as channel:
            channel.send([request for request, _ in requests])
            while sent:
                for outcome in await channel.receive():
                    self._take(sent.pop(outcome.id), outcome)
                self._commit()
        self._commit()
        return self._finish(proof)

    def _request(self, row: int) -> list[tuple[Work, int]]:
        """Nothing to send for a row that cannot fit: it is a miss, and says so."""
        protocol, prompts = self._protocol, self._run.prompts
        room = max(protocol.sampling.max_tokens, prompts.label_room if protocol.labels else 0)
        try:
            prompt = prompts.answer(self._instances[row].input, room, protocol.num_gold)
        except TooLong as error:
            self._store(row, state=FAILED, filter="prompt_too_long", reason=str(error))
            return []
        self._rows[row] = {"prompt_tokens": len(prompt.ids), "demonstrations": prompt.num_gold}
        self._tokens["prompt_tokens"] += len(prompt.ids)
        adapter, name = protocol.adapter.ref if protocol.adapter else None, self._run.row_id(self._stage, row)
        if protocol.labels:
            return [(ChoiceRequest(name, prompt.ids, prompts.label_ids, adapter), row)]
        return [(Request(name, prompt.ids, self._sampling(row), adapter), row)]

    def _sampling(self, row: int) -> Sampling:
        protocol, config = self._protocol, self._protocol.sampling
        return Sampling(
            n=protocol.num_samples, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
            max_tokens=config.max_tokens, stop=(*config.stop, *self._run.prompts.stops),
            seed=self._run.row_seed("evaluation", row), logprobs=protocol.needs_logprobs,
            choices=_choices(self._run),
        )  # fmt: skip

    def _take(self, row: int, outcome: Outcome) -> None:
        if isinstance(outcome, RequestFailed):
            self._store(row, state=FAILED, filter=outcome.error, reason=outcome.message)
            return
        for name, count in spent(outcome).items():
            self._tokens[name] += count
        if isinstance(outcome, ChoiceScores):
            chosen_label = likeliest(outcome.logprobs, self._run.task.labels)
            self._store(row, state=ACCEPTED, label_logprobs=outcome.logprobs, prediction=chosen_label)
            return
        assert isinstance(outcome, Completion)
        parse = self._run.prompts.parse_output
        samples = [
            {"text": parse(s.text), "finish_reason": s.finish_reason, "tokens": len(s.token_ids), "logprob": s.logprob}
            for s in outcome.samples
        ]
        if self._protocol.filtered:
            samples.sort(key=lambda sample: sample["logprob"] or 0.0, reverse=True)
            samples = samples[: self._run.recipe.annotation.keep_best]
        self._store(row, state=ACCEPTED, samples=samples, prediction=samples[0]["text"])

    def _store(self, row: int, **fields: Any) -> None:
        instance = self._instances[row]
        blank = dict.fromkeys(SCHEMA.names) | {"row": row, "id": instance.id, "prediction": ""}
        self._rows[row] = blank | {"references": list(instance.references)} | self._rows.get(row, {}) | fields

    def _commit(self) -> None:
        """Shards in order, each scored once it is whole."""
        total = len(self._instances)
        while (end := min(self._committed + SHARD_ROWS, total)) > self._committed:
            rows = [self._rows.get(row, {}) for row in range(self._committed, end)]
            if not all("state" in row for row in rows):
                return
            self._stage.commit(self._scored(rows), SCHEMA)
            self._stage.log({"event": "shard", "rows": end, **self._tokens})
            self._committed = end
            self._run.report(self._protocol.method, rows=end, of=total, output_tokens=self._tokens["output_tokens"])

    def _scored(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._protocol.filtered:
            _choose_filtered(self._run, rows)
        predictions, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
        exact = [metrics.exact_match(p, r) for p, r in zip(predictions, references, strict=True)]
        rouge: list[float] | list[None] = [None] * len(rows)
        if score := rouge_of(self._run):
            rouge = [score(p, r) for p, r in zip(predictions, references, strict=True)]
        scored = [row | {"exact_match": e, "rouge_l": r} for row, e, r in zip(rows, exact, rouge, strict=True)]
        authors = self._run.recipe.evaluation.protocol == "authors"
        return [row | self._authors_score(row) for row in scored] if authors else scored

    def _authors_score(self, row: dict[str, Any]) -> dict[str, float]:
        """The authors' own metric, beside the official ones: which of the two depends on the kind of task."""
        prediction, references = row["prediction"], row["references"]
        if self._run.task.kind == "generation":
            return {"authors_rouge_char": metrics.authors_rouge_char(prediction, references)}
        return {"authors_em": metrics.authors_em(prediction, references, self._split_labels)}

    @cached_property
    def _split_labels(self) -> tuple[str, ...]:
        """The authors search answers for the distinct references of the split, as first seen."""
        return tuple(dict.fromkeys(instance.references[0] for instance in self._instances))

    def _finish(self, proof: dict[str, Any] | None) -> Artifact:
        rows, changed = self._stage.committed(), None
        if self._protocol.labels == "calibrated":
            rows = changed = self._scored(_calibrated(rows, self._run.task.labels))
        ledger = Ledger.of(rows)
        ledger.reconcile(len(self._instances))
        task = self._run.task
        facts = {
            "scores": mean_scores(rows), "proof": proof, "kind": task.kind, "labels_from": task.labels_from,
            "protocol": self._run.recipe.evaluation.protocol, "split": self._protocol.split,
        }  # fmt: skip
        return self._stage.finish(changed, SCHEMA, ledger, **facts, **self._stage.tokens())


def rouge_of(run: TaskRun) -> Callable[[str, Sequence[str]], float] | None:
    """The task's official ROUGE-L (prediction, references), or None where its tokenizer is not named."""
    if run.is_english:
        return metrics.rouge_l
    return load_gpt2(run.recipe.evaluation.gpt2).rouge_l if run.recipe.evaluation.gpt2 else None


def mean_scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means x 100 over all rows, failed ones being misses; ROUGE-L is None where it is unavailable.

    The authors' metrics are there only where their protocol computed them.
    """
    columns = {metric: [row[metric] for row in rows] for metric in (*METRICS, *AUTHORS_METRICS)}
    means = {metric: None if None in column else round(100 * fmean(column), 4) for metric, column in columns.items()}
    return {"n": len(rows)} | {key: mean for key, mean in means.items() if key in METRICS or mean is not None}


def _choose_filtered(run: TaskRun, rows: list[dict[str, Any]]) -> None:
    """The first sample, likeliest first, that the annotation filters let pass; none: an empty answer, a miss."""
    import polars as pl

    from selfguide.filters.chain import PairJudge, pairs_table

    answered = [{**row, "input": "", "label": None} for row in rows if row["state"] == ACCEPTED]
    if not answered:
        return
    judged = PairJudge(run.filters, run.context("output")).judge_samples(pairs_table(answered))
    alive = judged.filter(pl.col("filter").is_null()).group_by("row", maintain_order=True).first()
    first = dict(alive.select("row", "text").iter_rows())
    for row in rows:
        row["prediction"] = first.get(row["row"], "")


def _calibrated(rows: list[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Shards hold the likeliest labels; the calibrated ones follow from all rows that were answered."""
    answered = [row for row in rows if row["state"] == ACCEPTED]
    elected = calibrate([row["label_logprobs"] for row in answered], labels)
    predictions = {row["row"]: one.label for row, one in zip(answered, elected, strict=True)}
    return [row | {"prediction": predictions.get(row["row"], "")} for row in rows]


async def _prove(run: TaskRun, adapter: Adapter) -> dict[str, Any]:
    """Compares the engine's log-probabilities of training rows with the trainer's, before the adapter is scored.

    Raises `TaskFailed` where the engine does not serve what was trained. Differences: mean absolute, nats a token.
    """
    tuned = await canary_logprobs(run, adapter.canaries, adapter.ref)
    base = await canary_logprobs(run, adapter.canaries, None)
    trained = [lp for canary in adapter.canaries for lp in canary.tuned_logprobs]
    before = [lp for canary in adapter.canaries for lp in canary.base_logprobs]
    missed, moved, noise = (_mean_difference(*pair) for pair in ((tuned, trained), (trained, before), (base, before)))
    proof = {"engine_difference": missed, "training_difference": moved, "noise": noise, "adapter": adapter.ref.digest}
    simulated = run.recipe.engine.kind == "simulated"
    if simulated or moved <= max(noise, adapter.least_change or 0.0):
        return proof | {"status": "simulated" if simulated else "indistinguishable from base"}
    if not missed <= MOST_OF_TRAINING * moved:  # neither is NaN
        raise TaskFailed(
            f"{run.task.name}: the engine does not serve the trained adapter: its log-probabilities differ from the "
            f"trainer's by {missed:.3g} nats a token, training changed them by {moved:.3g}"
        )
    return proof | {"status": "proven" if adapter.least_change is None else "differs from base"}


async def canary_logprobs(run: TaskRun, canaries: Sequence[Canary], ref: AdapterRef | None) -> list[float]:
    """The engine's log-probability of each token of each completion; raises `TaskFailed` where it refuses."""
    side = ref.digest[:12] if ref else "base"
    requests = [
        ScoreRequest(f"canary/{side}/{i}", canary.prefix_ids, canary.completion_ids, ref)
        for i, canary in enumerate(canaries)
    ]
    scores: dict[str, tuple[float, ...]] = {}
    async for outcome in run.pool.score(requests, run.task.name):
        if isinstance(outcome, RequestFailed):
            raise TaskFailed(f"{run.task.name}: the adapter cannot be served: {outcome.message}")
        assert isinstance(outcome, Score)
        scores[outcome.id] = outcome.token_logprobs
    return [lp for request in requests for lp in scores[request.id]]


def _mean_difference(ours: list[float], theirs: list[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
