"""Stage 1: the student writes inputs and answers them, streaming, without a barrier between the two.

Row i is generated once every row that it may see is decided, inputs are judged in index order, and the stage ends at
the first index where enough pairs are kept: nothing depends on the order in which answers arrive. Rows beyond that
index that were already under way are dropped, and counted in the events.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from engines.types import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    Outcome,
    Request,
    RequestFailed,
    Sample,
    Sampling,
    Work,
)
from selfguide.errors import TaskFailed
from selfguide.filters.chain import InputJudge, PairJudge, pairs_table
from selfguide.prompts import TooLong
from selfguide.records import ACCEPTED, FAILED, REJECTED, Ledger, spent
from selfguide.store import SHARD_ROWS, TOKEN_COUNTS, Artifact, Stage
from selfguide.taskrun import TaskRun, chosen

if TYPE_CHECKING:
    from cluster.channel import Channel
    from selfguide.config import Sampling as SamplingConfig

VERSION = 2
SAMPLE = pa.struct(
    [("text", pa.string()), ("finish_reason", pa.string()), ("tokens", pa.int32()), ("logprob", pa.float64())]
)
SCHEMA = pa.schema([
    ("row", pa.int32()), ("id", pa.string()), ("state", pa.string()), ("filter", pa.string()), ("reason", pa.string()),
    ("label", pa.string()), ("demonstrations", pa.list_(pa.int32())), ("input", pa.string()), ("tokens", pa.int32()),
    ("finish_reason", pa.string()), ("samples", pa.list_(SAMPLE)), ("label_logprobs", pa.list_(pa.float64())),
])  # fmt: skip
_FEW_FAILURES = 10
_MIN_YIELD = 0.05  # what the launch gate assumes at least, so that a barren task still makes progress


async def synthesize(run: TaskRun) -> Artifact:
    """Candidates with their sampled outputs; every one of them accepted, rejected or failed. Resumes by itself."""
    stage = synthesis_stage(run)
    async with run.lock(stage):
        if stage.done:
            return stage.done
        with stage.writing():
            return await _Synthesis(run, stage).run()


def synthesis_stage(run: TaskRun) -> Stage:
    """Pair filters are part of its identity only where they decide how many candidates are tried."""
    recipe = run.recipe
    filters = chosen(run.filters)
    wanted = ("inputs", "samples", "vote", "pairs") if run.target_rows else ("inputs",)
    synthesis = chosen(recipe.synthesis) | {"target_rows": run.target_rows}
    del synthesis["max_failed_share"]  # when to give up changes no row: whoever raises it goes on from there
    config: dict[str, Any] = {
        "synthesis": synthesis, "annotation": chosen(recipe.annotation),
        "filters": {name: filters[name] for name in wanted}, "engine": recipe.engine.kind,
    }  # fmt: skip
    if choices := constrained_to(run):
        config["choices"] = choices
    return run.store.stage("synthesis", run.made_by(VERSION, **config))


def constrained_to(run: TaskRun) -> tuple[str, ...]:
    """All that an answer may be; nothing: ()."""
    return run.prompts.choices if run.recipe.annotation.constrain_labels and run.is_classification else ()


class _Synthesis:
    """The state of one task's synthesis. `_rows[i]` is row i's record, filled in as it gets on."""

    def __init__(self, run: TaskRun, stage: Stage) -> None:
        self._run, self._stage = run, stage
        self._config, self._annotation = run.recipe.synthesis, run.recipe.annotation
        self._inputs = InputJudge(run.filters, run.context("input"))
        self._pairs = PairJudge(run.filters, run.context("output"))
        self._conditional = self._config.conditional == "always" or (
            self._config.conditional == "auto" and run.is_classification
        )
        self._choices = constrained_to(run)
        num_samples = self._annotation.num_samples
        early = self._annotation.stop_when_decided and run.is_classification
        self._num_first = num_samples // 2 + 1 if early else num_samples
        self._rows: list[dict[str, Any]] = []  # launched, in index order
        self._decided = 0  # rows below have a judged input
        self._complete: set[int] = set()  # rows at or above _judged whose outcome is known
        self._judged = 0  # rows below are final, their pairs judged and counted
        self._committed = 0  # rows below are on disk
        self._accepted: list[int] = []  # rows whose input may be shown, in index order
        self._kept = 0
        self._failed = 0
        self._tokens = dict.fromkeys(TOKEN_COUNTS, 0)
        self._sent: dict[str, tuple[int, str]] = {}
        self._answers: dict[int, dict[str, Outcome | None]] = {}  # of rows being annotated, by part, in order

    async def run(self) -> Artifact:
        self._recall(self._stage.committed())
        async with self._run.pool.channel(self._run.task.name, self._stage.log, self._stage.suspects()) as channel:
            while not self._finished:
                self._launch(channel)
                outcomes = await channel.receive() if self._sent else []
                channel.send([request for outcome in outcomes for request in self._take(outcome)])
                self._judge_inputs(channel)
                self._judge_pairs()
                self._commit()
                self._report()
        surplus = len(self._rows) - self._judged
        self._stage.log({"event": "surplus", "rows": surplus, **self._tokens})
        return self._finish(surplus)

    @property
    def _enough(self) -> bool:
        return self._run.target_rows is not None and self._kept >= self._run.target_rows

    @property
    def _finished(self) -> bool:
        return self._enough or self._judged >= self._config.num_candidates

    # ---- resume

    def _recall(self, rows: list[dict[str, Any]]) -> None:
        """Committed rows are final: only what follows from them is worked out again."""
        self._rows = rows
        self._decided = self._committed = len(rows)
        self._complete = set(range(len(rows)))
        # A row whose input was accepted and whose annotation failed has been shown, and is shown again.
        self._accepted = [row["row"] for row in rows if row["state"] != REJECTED and row["input"] is not None]
        self._failed = sum(row["state"] == FAILED for row in rows)
        self._inputs.recall([rows[i]["input"] for i in self._accepted])
        self._judge_pairs()

    # ---- inputs

    def _visible_upto(self, row: int) -> int:
        """Accepted inputs below this row may be shown to `row` (rounds as published, or a lag)."""
        if self._config.pool == "rounds":
            return self._config.round_size * (row // self._config.round_size)
        return max(0, row - self._config.lag + 1)

    def _launch(self, channel: Channel) -> None:
        requests = []
        while (row := len(self._rows)) < self._config.num_candidates and self._decided >= self._visible_upto(row):
            if not self._worth_launching():
                break
            requests += self._start_row(row)
        channel.send(requests)

    def _worth_launching(self) -> bool:
        """With a target, rows whose pairs will hardly be needed are not started. Affects waste, never the result."""
        pending = len(self._rows) - self._judged
        if self._run.target_rows is None or not pending:
            return True
        rate = max(self._kept / self._judged, _MIN_YIELD) if self._judged >= SHARD_ROWS // 4 else 1.0
        return self._kept + pending * rate < self._run.target_rows

    def _start_row(self, row: int) -> list[Work]:
        draw = random.Random(self._run.row_seed("demonstrations", row))
        label = draw.choice(self._run.task.labels) if self._conditional else None
        shown = self._draw_demonstrations(row, draw)
        record = {"row": row, "id": self._run.row_id(self._stage, row), "label": label, "demonstrations": shown}
        self._rows.append(record | dict.fromkeys(("state", "filter", "reason", "input", "tokens", "finish_reason")))
        synthetic = [(self._rows[i]["input"], self._rows[i]["label"]) for i in shown]
        order, sampling = row % self._config.gold_orders, self._config.sampling
        try:
            prompt = self._run.prompts.new_input(order, synthetic, label, sampling.max_tokens)
        except TooLong as error:
            self._fail(row, "prompt_too_long", str(error))
            return []
        self._rows[row]["demonstrations"] = shown[: prompt.num_synthetic]
        return [self._request(row, "input", prompt.ids, self._sampling(sampling, "input", row))]

    def _draw_demonstrations(self, row: int, draw: random.Random) -> list[int]:
        """k of the visible accepted inputs, k uniform from 1 to `max_demonstrations`; oldest first."""
        visible = self._accepted[: bisect.bisect_left(self._accepted, self._visible_upto(row))]
        most = min(len(visible), self._config.max_demonstrations)
        return sorted(draw.sample(visible, draw.randint(1, most))) if most else []

    def _judge_inputs(self, channel: Channel) -> None:
        """Judges the run of arrived inputs that begins at the first undecided row, and sends the accepted on."""
        start = self._decided
        while self._decided < len(self._rows) and self._rows[self._decided]["state"] is not None:
            self._decided += 1
        rows = [row for row in self._rows[start : self._decided] if row["state"] == "arrived"]
        if not rows:
            return
        columns = ([row[key] for row in rows] for key in ("input", "tokens", "finish_reason"))
        requests = []
        for row, verdict in zip(rows, self._inputs.judge(*columns), strict=True):
            if verdict is None:
                self._accepted.append(row["row"])
                row["state"] = "annotating"
                requests += self._annotate(row)
            else:
                row.update(state=REJECTED, filter=verdict[0], reason=verdict[1])
                self._complete.add(row["row"])
        channel.send(requests)

    # ---- outputs

    def _annotate(self, row: dict[str, Any]) -> list[Work]:
        """One request for each order of the gold examples; samples are spread over them."""
        config, prompts, weighed = self._annotation, self._run.prompts, self._run.is_calibrated
        orders = prompts.answer_orders(config.label_orders if weighed else min(config.orders, config.num_samples))
        room = max(config.sampling.max_tokens, prompts.label_room if weighed else 0)
        try:
            asked = [prompts.answer(row["input"], room, order=order).ids for order in orders]
        except TooLong as error:
            self._fail(row["row"], "prompt_too_long", str(error))
            return []
        parts = [f"output-{number}" if number else "output" for number in range(len(orders))]
        self._answers[row["row"]] = dict.fromkeys(parts)
        work = []
        for number, (part, ids) in enumerate(zip(parts, asked, strict=True)):
            share = len(range(number, self._num_first, len(orders)))
            sampling = None if weighed else self._sampling(config.sampling, part, row["row"], share, self._choices)
            work.append(self._request(row["row"], part, ids, sampling))
        return work

    def _sampling(
        self, config: SamplingConfig, part: str, row: int, n: int = 1, choices: tuple[str, ...] = ()
    ) -> Sampling:
        return Sampling(
            n=n, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens,
            stop=(*config.stop, *self._run.prompts.stops), seed=self._run.row_seed(part, row), choices=choices,
            logprobs=part != "input" and self._annotation.keep_best is not None,
        )  # fmt: skip

    def _request(self, row: int, part: str, ids: Sequence[int], sampling: Sampling | None) -> Work:
        """Without `sampling`, the labels are weighed."""
        name = f"{self._rows[row]['id']}/{part}"
        self._sent[name] = (row, part)
        self._tokens["prompt_tokens"] += len(ids)
        return Request(name, ids, sampling) if sampling else ChoiceRequest(name, ids, self._run.prompts.label_ids)

    def _take(self, outcome: Outcome) -> list[Work]:
        """Returns what is to be asked now."""
        row, part = self._sent.pop(outcome.id)
        for name, count in spent(outcome).items():
            self._tokens[name] += count
        if part != "input":
            answers = self._answers[row]
            answers[part] = outcome
            if part == "output" and isinstance(outcome, Completion) and not self._is_decided(outcome):
                return self._ask_rest(row)
            if None not in answers.values():
                self._take_answers(row, list(self._answers.pop(row).values()))
        elif isinstance(outcome, RequestFailed):
            self._fail(row, outcome.error, outcome.message)
        else:
            assert isinstance(outcome, Completion)
            [sample] = outcome.samples
            text, num_tokens = self._run.prompts.parse_input(sample.text), len(sample.token_ids)
            self._rows[row].update(state="arrived", input=text, tokens=num_tokens, finish_reason=sample.finish_reason)
        return []

    def _is_decided(self, first: Completion) -> bool:
        """More than half of the vote has come, for one label; or there is no more to come."""
        if self._num_first == self._annotation.num_samples:
            return True
        texts = {self._run.prompts.parse_output(sample.text) for sample in first.samples}
        finished = all(sample.finish_reason == "stop" for sample in first.samples)
        return finished and len(texts) == 1 and texts <= set(self._run.task.labels)

    def _ask_rest(self, row: int) -> list[Work]:
        config, prompts, part = self._annotation, self._run.prompts, "output-rest"
        self._answers[row][part] = None
        [order] = prompts.answer_orders(1)
        ids = prompts.answer(self._rows[row]["input"], config.sampling.max_tokens, order=order).ids
        rest = config.num_samples - self._num_first
        return [self._request(row, part, ids, self._sampling(config.sampling, part, row, rest, self._choices))]

    def _take_answers(self, row: int, outcomes: Sequence[Outcome | None]) -> None:
        """All orders' answers, in the orders' order; where several failed, the first says why."""
        failed = next((one for one in outcomes if isinstance(one, RequestFailed)), None)
        if failed:
            self._fail(row, failed.error, failed.message)
            return
        scored = [one.logprobs for one in outcomes if isinstance(one, ChoiceScores)]
        samples = [sample for one in outcomes if isinstance(one, Completion) for sample in one.samples]
        self._rows[row].update(
            state=ACCEPTED,
            samples=None if scored else [self._stored(sample) for sample in self._best(samples)],
            label_logprobs=[fmean(column) for column in zip(*scored, strict=True)] if scored else None,
        )
        self._complete.add(row)

    def _best(self, samples: list[Sample]) -> list[Sample]:
        keep = self._annotation.keep_best
        if keep is None:
            return samples
        return sorted(samples, key=lambda sample: sample.logprob or 0.0, reverse=True)[:keep]

    def _stored(self, sample: Sample) -> dict[str, Any]:
        text = self._run.prompts.parse_output(sample.text)
        tokens = len(sample.token_ids)
        return {"text": text, "finish_reason": sample.finish_reason, "tokens": tokens, "logprob": sample.logprob}

    def _fail(self, row: int, error: str, message: str) -> None:
        self._rows[row].update(state=FAILED, filter=error, reason=message)
        self._complete.add(row)
        self._failed += 1
        if self._failed > max(_FEW_FAILURES, self._config.max_failed_share * self._config.num_candidates):
            raise TaskFailed(
                f"{self._run.task.name}: {self._failed} rows failed in synthesis, the last with {error}: {message}; "
                "mend the cause, or raise synthesis.max_failed_share"
            )

    # ---- in index order

    def _judge_pairs(self) -> None:
        """Counts what is kept, row by row in index order, and stops at the row that makes it enough."""
        end = self._judged
        while end in self._complete:
            end += 1
        ready = self._rows[self._judged : end]
        pairs = [row for row in ready if row["state"] == ACCEPTED]
        stays = set()
        if pairs and self._run.target_rows is not None:
            verdicts = self._pairs.judge(pairs_table(pairs))
            stays = {row for row, name in verdicts.select("row", "filter").iter_rows() if name is None}
        for row in ready:
            if self._enough:
                return
            self._kept += row["row"] in stays
            self._judged += 1
            self._complete.discard(row["row"])

    def _commit(self) -> None:
        while self._judged - self._committed >= SHARD_ROWS or (self._finished and self._committed < self._judged):
            end = min(self._committed + SHARD_ROWS, self._judged)
            self._stage.commit(self._rows[self._committed : end], SCHEMA)
            self._stage.log({"event": "shard", "rows": end, **self._tokens})
            self._committed = end

    def _report(self) -> None:
        self._run.report(
            "synthesis", rows=self._judged, of=self._config.num_candidates, kept=self._kept or None,
            accepted=len(self._accepted), failed=self._failed, output_tokens=self._tokens["output_tokens"],
        )  # fmt: skip

    def _finish(self, surplus: int) -> Artifact:
        ledger = Ledger.of(self._rows[: self._judged])
        ledger.reconcile(self._judged)
        return self._stage.finish(None, SCHEMA, ledger, surplus=surplus, enough=self._enough, **self._stage.tokens())
