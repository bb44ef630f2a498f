"""Several tasks through every stage in one session: funnel, stage seconds, tokens per second, and whether all adds up.

python benchmarks/spine.py TASK.json ... [--recipe smoke] [--out DIR] > spine.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import selfguide
from selfguide.api import open_session
from selfguide.progress import stderr_line
from selfguide.records import Ledger
from selfguide.store import Artifact, RunStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", type=Path)
    parser.add_argument("--recipe", default="smoke")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="selfguide-spine-"))
    asyncio.run(run_all(args.tasks, selfguide.load_recipe(args.recipe), out))
    json.dump([describe(out, path.stem) for path in args.tasks], sys.stdout, indent=1)


async def run_all(paths: list[Path], recipe: selfguide.Recipe, out: Path) -> None:
    """One task after another, so that each one's seconds are its own."""
    async with open_session(recipe) as session:
        stderr_line(f"session ready in {session.start_s:.1f} s; run folder {out}")
        for path in paths:
            began = asyncio.get_running_loop().time()
            await selfguide.run(selfguide.load_task(path), recipe, out, session=session)
            stderr_line(f"{path.stem}: {asyncio.get_running_loop().time() - began:.1f} s")


def describe(out: Path, task: str) -> dict[str, Any]:
    """The task's finished stages, each checked against its own rows once more."""
    stages = [describe_stage(artifact) for artifact in RunStore(out).task(task).artifacts()]
    for stage in stages:
        stderr_line(f"{task:45.45} {json.dumps(stage)}")
    return {"task": task, "stages": stages}


def describe_stage(artifact: Artifact) -> dict[str, Any]:
    marker = artifact.marker
    rows = artifact.rows()
    if rows and "state" in rows[0]:
        Ledger.of(rows).reconcile(marker["ledger"]["candidates"])
    seconds, tokens = marker["seconds"], marker.get("output_tokens")
    speed = None if not tokens or not seconds else round(tokens / seconds, 1)
    facts = {
        key: marker[key] for key in ("prompt_tokens", "cached_tokens", "output_tokens", "surplus") if key in marker
    }
    stage = {"stage": marker["stage"], "seconds": seconds, "output_tokens_per_s": speed, **facts, **marker["ledger"]}
    return stage | ({"train_tokens": marker["train"]["tokens"]} if "train" in marker else {})


if __name__ == "__main__":
    main()
