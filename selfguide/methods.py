"""SELF-GUIDE and its controls: each an async function over a TaskRun, readable on one screen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfguide.comparison import differences, record
from selfguide.curation import curate
from selfguide.evaluation import Protocol, evaluate
from selfguide.finetuning import Adapter, finetune, finetune_gold
from selfguide.intervals import Difference
from selfguide.store import Artifact
from selfguide.synthesis import synthesize
from selfguide.taskrun import TaskRun


@dataclass(frozen=True)
class Comparison:
    """What became of the task: the finetuned student, and every method's scores on the same rows.

    `place` is the comparison's folder below the run folder. Without held-out data `evaluations` and `differences`
    (tuned minus the other method, in points) are empty.
    """

    task: str
    place: str
    adapter: Adapter
    evaluations: Mapping[str, Artifact]
    differences: Mapping[str, Mapping[str, Difference]]


async def self_guide(run: TaskRun) -> Comparison:
    """SELF-GUIDE (2407.12874 section 2), and beside it the untuned student and its controls on the same rows."""
    candidates = await synthesize(run)
    kept = await curate(run, candidates)
    untuned = asyncio.create_task(evaluate_untuned(run))  # fills the engines while the trainer works
    try:
        adapter = await finetune(run, kept)
        gold = await few_shot_sft(run) if "few_shot_sft" in wanted_controls(run) else None
        return await compare(run, adapter, await untuned | ({"few_shot_sft": gold} if gold else {}))
    finally:
        untuned.cancel()
        await asyncio.gather(untuned, return_exceptions=True)


async def sweep_self_guide(run: TaskRun) -> dict[str, Any]:
    """SELF-GUIDE as a sweep's job: where the comparison lies, below the run folder."""
    comparison = await self_guide(run)
    return {"comparison": comparison.place}


async def evaluate_untuned(run: TaskRun) -> dict[str, Artifact]:
    """The base and those of the recipe's controls that train nothing, by method."""
    methods = {
        "base": base, "few_shot_icl": few_shot_icl, "filtered_decoding": filtered_decoding,
        "constrained_labels": constrained_labels, "calibrated_labels": calibrated_labels,
    }  # fmt: skip
    evaluations = {}
    for name in ("base", *wanted_controls(run)):
        if name in methods and (artifact := await methods[name](run)):
            evaluations[name] = artifact
    return evaluations


def wanted_controls(run: TaskRun) -> tuple[str, ...]:
    """The recipe's controls, as far as they apply to the task."""
    of_labels = () if run.is_classification else ("constrained_labels", "calibrated_labels")
    trainable = run.task.examples and run.evaluation_instances
    gone = (*of_labels, *(() if trainable else ("few_shot_sft",)))
    return tuple(dict.fromkeys(name for name in run.recipe.evaluation.controls if name not in gone))


def untuned_protocols(run: TaskRun) -> dict[str, Protocol]:
    """How each method asks the untuned student: the base, and the controls whether the recipe wants them or not."""
    sampling, annotation = run.recipe.evaluation.sampling, run.recipe.annotation
    known = (
        Protocol("base", sampling, run.num_demonstrations),
        Protocol("few_shot_icl", sampling, None),
        Protocol("filtered_decoding", annotation.sampling, None, annotation.num_samples, filtered=True),
        Protocol("constrained_labels", sampling, run.num_demonstrations, labels="likeliest"),
        Protocol("calibrated_labels", sampling, run.num_demonstrations, labels="calibrated"),
    )
    return {protocol.method: protocol for protocol in known}


def tuned_protocol(run: TaskRun, adapter: Adapter | None, method: str = "self_guide") -> Protocol:
    return Protocol(method, run.recipe.evaluation.sampling, run.num_demonstrations, adapter=adapter)


async def base(run: TaskRun) -> Artifact | None:
    """The untuned student on the very prompts that the tuned one gets."""
    return await evaluate(run, untuned_protocols(run)["base"])


async def few_shot_icl(run: TaskRun) -> Artifact | None:
    """The untuned student with all the demonstrations that fit."""
    return await evaluate(run, untuned_protocols(run)["few_shot_icl"])


async def filtered_decoding(run: TaskRun) -> Artifact | None:
    """The untuned student, sampled and filtered at inference as annotation is (docs/methods.md)."""
    return await evaluate(run, untuned_protocols(run)["filtered_decoding"])


async def constrained_labels(run: TaskRun) -> Artifact | None:
    """The untuned student, held to the labels: the likeliest one, from one pass on the base's prompts."""
    return await evaluate(run, untuned_protocols(run)["constrained_labels"])


async def calibrated_labels(run: TaskRun) -> Artifact | None:
    """The same, each label standardised over all evaluation inputs: what calibration does without any training."""
    return await evaluate(run, untuned_protocols(run)["calibrated_labels"])


async def few_shot_sft(run: TaskRun) -> Artifact | None:
    """A student finetuned on the gold examples alone, asked as the tuned one is."""
    return await evaluate(run, tuned_protocol(run, await finetune_gold(run), "few_shot_sft"))


async def tuned(run: TaskRun, adapter: Adapter) -> Artifact | None:
    """The finetuned student, once the engine has been proven to serve it."""
    return await evaluate(run, tuned_protocol(run, adapter))


async def compare(run: TaskRun, adapter: Adapter, untuned: Mapping[str, Artifact]) -> Comparison:
    """Scores the tuned student and sets it against every untuned method, row by row."""
    ours = await tuned(run, adapter)
    evaluations = {} if ours is None else {**untuned, "self_guide": ours}
    recorded = await record(run, adapter, evaluations)
    place = f"tasks/{run.store.root.name}/{recorded.stage}/{recorded.path.name}"
    return Comparison(run.task.name, place, adapter, evaluations, differences(recorded))
