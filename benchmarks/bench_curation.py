"""Curation of many ready tasks at once: what Ray Data and the filters cost for each.

    python -m benchmarks.bench_curation [--tasks 256] [--rows 512] [--repeats 5] > bench_curation.json

A simulated engine writes one task's candidates; each task then curates a copy of them with the recipe's chain, all
handed in at once, as in a sweep where so many became ready together. Seconds are from the first call to the last
result, over the number of tasks; `alone_s` is a task that comes by itself. The first run of all, which starts Ray
Data's workers, is not counted. `whole_chain_s` is the function itself in this process, without Ray Data.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ratio import emit, ratio, spread
from cluster.placement import ClusterSpec
from cluster.session import ray_session
from cluster.transforms import Transforms
from selfguide import load_recipe
from selfguide.api import open_session
from selfguide.curation import CurationJob, judge_file, warm_filters
from selfguide.store import RunStore
from selfguide.synthesis import synthesize
from selfguide.tasks import load_task

TASK = Path(__file__).resolve().parents[1] / "selfguide" / "nano" / "tasks"
MOST_MS = 50.0
"""A task."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="64 tasks, 3 repeats")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.repeats = 64, 3
    with tempfile.TemporaryDirectory(prefix="selfguide-curation-") as folder:
        jobs = asyncio.run(prepare(args, Path(folder)))
        with ray_session(ClusterSpec()):
            repeats = asyncio.run(measure(jobs, args.repeats))
    many = [1000 * one["all_s"] / len(jobs) for one in repeats]
    spreads = {name: spread([one[name] for one in repeats]) for name in ("all_s", "alone_s", "whole_chain_s")}
    emit("curation", vars(args), {"ms_per_task": ratio(many, ceiling=MOST_MS)}, **spreads, repeats=repeats)


async def prepare(args: argparse.Namespace, folder: Path) -> list[CurationJob]:
    """One task's candidates, and as many jobs on copies of them."""
    changes = {"synthesis.num_candidates": args.rows, "cluster.num_engines": 2, "engine.tokens_per_s": 5000}
    task = load_task(sorted(TASK.glob("*.json"))[0])
    async with open_session(load_recipe("simulated", {"model.path": "random", **changes})) as session:
        run = session.task_run(task, RunStore(folder / "run"), lambda name, stage, counts: None)
        candidates = (await synthesize(run)).rows_path.read_bytes()
    jobs = []
    for number in range(args.tasks):
        rows, kept = folder / f"{number}.parquet", folder / f"{number}-kept.parquet"
        rows.write_bytes(candidates)
        jobs.append(CurationJob(rows, kept, run.filters, run.context("output"), run.is_calibrated))
    return jobs


async def measure(jobs: Sequence[CurationJob], repeats: int) -> list[dict[str, Any]]:
    await warm_filters()
    await curate_all(jobs[:64])
    found = []
    for _ in range(repeats):
        began = time.monotonic()
        ledgers = await curate_all(jobs)
        all_s = time.monotonic() - began
        began = time.monotonic()
        await curate_all(jobs[:1])
        alone_s = time.monotonic() - began
        began = time.monotonic()
        own = judge_file(jobs[0])
        found.append({"all_s": all_s, "alone_s": alone_s, "whole_chain_s": time.monotonic() - began})
        if any(ledger != own for ledger in ledgers):
            raise SystemExit("the same candidates were judged otherwise")
    return found


async def curate_all(jobs: Sequence[CurationJob]) -> list[Any]:
    transforms = Transforms()
    return await asyncio.gather(*(transforms.apply(judge_file, job) for job in jobs))


if __name__ == "__main__":
    main()
