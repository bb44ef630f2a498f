"""A handful of rows on real engines, through all stages but training: what is sent, what comes back, and the verdicts.

The rows are the first ones of a run with the same recipe: same prompts, same seeds. Nothing of it is kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from selfguide.preview.shown import show_preview

if TYPE_CHECKING:
    from engines.types import Sample
    from selfguide.api import Session
    from selfguide.config import Recipe
    from selfguide.preview.tap import Tap
    from selfguide.taskrun import Progress, TaskRun
    from selfguide.tasks import Task

__all__ = ["preview_in", "preview_task", "show_preview"]


async def preview_task(
    task: Task, recipe: Recipe, num_rows: int, progress: Progress = lambda task, stage, counts: None
) -> dict[str, Any]:
    """Starts engines, looks, and stops them; the result is that of `preview_in`."""
    from selfguide.api import open_session

    async with open_session(recipe, progress, trains=False) as session:
        return await preview_in(session, task, num_rows)


async def preview_in(session: Session, task: Task, num_rows: int) -> dict[str, Any]:
    """A document with everything, plain JSON values; its texts are as they came, nothing is escaped."""
    from selfguide.api import check_run
    from selfguide.preview.tap import Tap
    from selfguide.store import RunStore
    from selfguide.synthesis import synthesize

    tap = Tap(session.pool)
    with tempfile.TemporaryDirectory(prefix="selfguide-preview-") as folder:
        whole = session.task_run(task, RunStore(Path(folder)), lambda task, stage, counts: None)
        check_run(whole)
        run = replace(whole, recipe=_first_rows(whole.recipe, num_rows), pool=cast(Any, tap))
        candidates = (await synthesize(run)).rows()
        pairs = _elect(run, candidates)
        return {
            "task": task.name, "kind": task.kind, "labels": list(task.labels), "recipe": whole.recipe.name,
            "student": Path(whole.student.folder).name, "chat": whole.student.chat,
            "context": whole.student.max_model_len,
            "rows": [_describe_row(run, tap, row, pairs.get(row["row"])) for row in candidates],
            "later_prompt": _describe_later(run, candidates),
            "training": _describe_training(run, pairs),
            "evaluation": await _evaluate_one(run, tap),
        }  # fmt: skip


def _first_rows(recipe: Recipe, num_rows: int) -> Recipe:
    """How many rows there will be has no part in a row's prompt and seed."""
    synthesis = recipe.synthesis.model_copy(update={"num_candidates": num_rows, "target_rows": None})
    return recipe.model_copy(update={"synthesis": synthesis})


def _elect(run: TaskRun, candidates: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Curation's verdicts by row."""
    from selfguide.filters.chain import PairJudge, judge_set, pairs_table
    from selfguide.records import ACCEPTED

    accepted = [row for row in candidates if row["state"] == ACCEPTED]
    context = run.context("output")
    judge, table = PairJudge(run.filters, context), pairs_table(accepted)
    judged = judge.judge_calibrated(table) if run.is_calibrated else judge.judge(table)
    return {row["row"]: row for row in judge_set(judged, run.filters.sets, context).iter_rows(named=True)}


# ---- a row of synthesis


def _describe_row(run: TaskRun, tap: Tap, row: dict[str, Any], pair: dict[str, Any] | None) -> dict[str, Any]:
    asked, answered = f"{row['id']}/input", f"{row['id']}/output"
    annotated = row["state"] == "accepted"
    verdict = None if annotated else {"state": row["state"], "filter": row["filter"], "reason": row["reason"]}
    return {
        "row": row["row"],
        "label": row["label"],
        "input_prompt": _describe_prompt(run, tap, asked),
        "input_raw": next(iter(_samples(tap, asked)), None),
        "input": row["input"],
        "verdict": verdict or {"state": "accepted", "filter": None, "reason": None},
        "output_prompt": _describe_prompt(run, tap, answered),
        "samples": _describe_samples(run, tap, row) if annotated else [],
        "pair": _pick(pair, "state", "filter", "reason", "votes", "share", "margin") | {"output": pair["text"]}
        if pair
        else None,
    }


def _pick(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: row[key] for key in keys}


def _describe_prompt(run: TaskRun, tap: Tap, request_id: str) -> dict[str, Any] | None:
    if request_id not in tap.sent:
        return None
    from engines.types import Request

    request = tap.sent[request_id]
    return _cut_prompt(run, request.prompt_ids if isinstance(request, Request) else request.prefix_ids)


def _cut_prompt(run: TaskRun, ids: Sequence[int]) -> dict[str, Any]:
    cut, decode = run.prompts.num_fixed(ids), run.student.tokenizer.decode
    fixed, varying = decode(ids[:cut], specials=True), decode(ids[cut:], specials=True)
    return {"fixed_tokens": cut, "varying_tokens": len(ids) - cut, "fixed": fixed, "varying": varying}


def _samples(tap: Tap, request_id: str) -> list[dict[str, Any]]:
    """What the engine said, unparsed."""
    samples: tuple[Sample, ...] = getattr(tap.received.get(request_id), "samples", ())
    return [{"text": one.text, "tokens": len(one.token_ids), "finish_reason": one.finish_reason} for one in samples]


def _describe_samples(run: TaskRun, tap: Tap, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples that were kept, with their verdicts; a label that was read off stands in `text`."""
    from selfguide.filters.chain import PairJudge, pairs_table

    raw = _samples(tap, f"{row['id']}/output")
    judged = PairJudge(run.filters, run.context("output")).judge_samples(pairs_table([row]))
    keys = ("text", "finish_reason", "tokens", "logprob", "filter", "reason")
    found = [_pick(one, *keys) for one in judged.iter_rows(named=True)]
    if run.recipe.annotation.keep_best is None:
        found = [one | {"raw": came["text"]} for one, came in zip(found, raw, strict=True)]
    return found


# ---- what comes later


def _describe_later(run: TaskRun, candidates: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A prompt as rows get it once others were accepted: with demonstrations. Rendered, not sent."""
    config = run.recipe.synthesis
    shown = [row for row in candidates if row["state"] == "accepted"][: config.max_demonstrations]
    if not shown:
        return None
    synthetic = [(row["input"], row["label"]) for row in shown]
    prompt = run.prompts.new_input(0, synthetic, candidates[0]["label"], config.sampling.max_tokens)
    return _cut_prompt(run, prompt.ids) | {"demonstrations": prompt.num_synthetic}


def _describe_training(run: TaskRun, pairs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One row as the trainer gets it: of the first pair that was kept, or of a gold example where none was."""
    from selfguide.prompts import TooLong

    kept = next((pair for pair in pairs.values() if pair["filter"] is None), None)
    gold = run.task.examples[0]
    source = f"row {kept['row']}" if kept else "gold example 0, since no row was kept"
    text, output = (kept["input"], kept["text"]) if kept else (gold.input, gold.output)
    longest = run.recipe.finetuning.max_length
    try:
        ids, cut = run.prompts.training(text, output, longest, run.num_demonstrations)
    except TooLong as error:
        return {"source": source, "left_out": f"finetuning.max_length {longest:,}: {error}"}
    decode = run.student.tokenizer.decode
    prompt, loss = decode(ids[:cut], specials=True), decode(ids[cut:], specials=True)
    return {"source": source, "prompt_tokens": cut, "loss_tokens": len(ids) - cut, "prompt": prompt, "loss": loss}


async def _evaluate_one(run: TaskRun, tap: Tap) -> dict[str, Any] | None:
    """The first held-out row, asked of the untuned student; None where there is none."""
    from selfguide.evaluation import evaluate
    from selfguide.methods import untuned_protocols

    before = set(tap.sent)
    one = replace(run, task=replace(run.task, instances=run.evaluation_instances[:1]))
    artifact = await evaluate(one, untuned_protocols(one)["base"])
    if artifact is None:
        return None
    [row] = artifact.rows()
    scores = _pick(row, "id", "state", "filter", "reason", "prediction", "references", "exact_match", "rouge_l")
    asked = next((name for name in tap.sent if name not in before), "")
    raw = next(iter(_samples(tap, asked)), None)
    return scores | {"prompt": _describe_prompt(one, tap, asked), "raw": raw}
