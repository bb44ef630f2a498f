"""Ways to label inputs, side by side: what each costs, and how far it agrees with the vote of free samples.

    python -m benchmarks.bench_annotation [--tasks 3] [--candidates 200] [--repeats 5] > bench_annotation.json

The embedded student takes its classification tasks through synthesis on one vLLM engine, once for each way, in turn
within a repeat; every repeat has a seed of its own. All ways ask for the same inputs. A few come out otherwise, since
the company of a row decides a close draw on this engine: agreement is over the inputs that both have. Prefixes are
warm for all alike, after a round that is not counted.

- seconds: the whole stage, the writing of inputs too, which is the same for all
- ratio: seconds of free samples / seconds of this way
- tokens: read by the engine (without those in its prefix cache) and written, for the stage
- agreement: the same label as the vote of free samples; right: the label that is true in the student's world
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.nano import tasks as world
from benchmarks.ratio import emit, ratio, spread
from selfguide import load_recipe
from selfguide.api import Session, open_session
from selfguide.curation import CurationJob, judge_file
from selfguide.filters.labels import ValidLabel
from selfguide.progress import stderr_line
from selfguide.store import Artifact, RunStore
from selfguide.synthesis import synthesize
from selfguide.tasks import Task, load_task

FOLDER = Path(__file__).resolve().parents[1] / "selfguide" / "nano" / "tasks"
FREE = "10 free samples"
WAYS: dict[str, dict[str, Any]] = {
    FREE: {},
    "stopped when decided": {"annotation.stop_when_decided": True},
    "10 constrained samples": {"annotation.constrain_labels": True},
    "label distribution": {"annotation.mode": "calibrated"},
    "label distribution, 4 orders": {"annotation.mode": "calibrated", "annotation.label_orders": 4},
    "1 greedy sample": {"annotation.num_samples": 1, "annotation.sampling.temperature": 0.0},
}
COMMON = {
    "synthesis.target_rows": None, "annotation.mode": "sample", "annotation.orders": 1, "annotation.num_samples": 10,
    "filters.vote.min_share": 0.3,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 tasks, 100 candidates, 3 repeats")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.candidates, args.repeats = 2, 100, 3
    names = sorted(path for path in FOLDER.glob("*classification.json") if path.stem in world.HELD_IN)
    tasks = [load_task(path) for path in names[: args.tasks]]
    repeats = asyncio.run(measure(tasks, args))
    ratios = {
        way: ratio([one[FREE]["seconds"] / one[way]["seconds"] for one in repeats]) for way in WAYS if way != FREE
    }
    figures = {
        way: {name: spread([one[way][name] for one in repeats]) for name in repeats[0][way]} for way in WAYS
    }  # fmt: skip
    emit("annotation", vars(args), ratios, ways=figures, repeats=repeats)


async def measure(tasks: Sequence[Task], args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    common = COMMON | {"synthesis.num_candidates": args.candidates}
    async with open_session(load_recipe("nano", common)) as session:
        found = []
        for repeat in range(args.repeats + 1):
            begun = {way: await label_all(session, tasks, common | change, repeat) for way, change in WAYS.items()}
            stderr_line(f"{repeat} of {args.repeats} rounds" + ("" if repeat else " (not counted)"))
            found.append({way: figures | compare(labels, begun[FREE][1]) for way, (figures, labels) in begun.items()})
    return found[1:]


Labels = Mapping[tuple[str, str], str]
"""By task and input."""


async def label_all(
    session: Session, tasks: Sequence[Task], changes: Mapping[str, Any], seed: int
) -> tuple[dict[str, float], Labels]:
    """All tasks at once, in a run folder that is thrown away."""
    recipe = load_recipe("nano", {**changes, "seed": seed})
    with tempfile.TemporaryDirectory(prefix="selfguide-annotation-") as folder:
        store, mine = RunStore(Path(folder)), replace(session, recipe=recipe)
        runs = [mine.task_run(task, store, lambda name, stage, counts: None) for task in tasks]
        before, began = replace(session.pool.counts), time.monotonic()
        done = await asyncio.gather(*map(synthesize, runs))
        seconds, after = time.monotonic() - began, session.pool.counts
        labels = {}
        for run, candidates in zip(runs, done, strict=True):
            reads = (ValidLabel(),) if not run.is_calibrated else ()
            filters = run.filters.model_copy(update={"samples": reads, "pairs": (), "sets": ()})
            kept = Path(folder) / "kept" / "rows.parquet"
            kept.parent.mkdir(exist_ok=True)
            judge_file(CurationJob(candidates.rows_path, kept, filters, run.context("output"), run.is_calibrated))
            for row in Artifact("curation", kept.parent, "", {}).rows():
                labels[run.task.name, row["input"]] = row["output"]
    read = after.prompt_tokens - before.prompt_tokens - (after.cached_tokens - before.cached_tokens)
    written = after.output_tokens - before.output_tokens
    return {"seconds": seconds, "tokens_read": read, "tokens_written": written}, labels


def compare(labels: Labels, free: Labels) -> dict[str, float]:
    shared = labels.keys() & free.keys()
    truths = {key: truth for key in labels if (truth := world.truth(*key)) is not None}
    return {
        "inputs": len(labels), "inputs_shared": len(shared),
        "agreement": sum(labels[key] == free[key] for key in shared) / max(1, len(shared)),
        "right": sum(labels[key] == truth for key, truth in truths.items()) / max(1, len(truths)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
