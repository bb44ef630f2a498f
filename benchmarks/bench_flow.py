"""Eight tasks end to end: as SELF-GUIDE's authors schedule them, and as one sweep.

    python -m benchmarks.bench_flow [--quick] [--repeats 5] [--model FOLDER] > flow.json

The authors' flow, made again from their code's order of work (`benchmarks.authors_flow`): for each task a fresh engine
for inputs, in rounds of ten, one for outputs, a fresh trainer, and a fresh engine for each student that is evaluated,
one after another. Ours is `selfguide sweep` on the eight tasks with the same student, recipe and counts of rows, and
with two trainers. Since the flow's tasks share nothing, it is measured on one task in each repeat, in turn, and counted
eight times (`flow_s` is that product; `flow_tasks` has what was measured). `whole` is all of both; `running` leaves out
the start of each of the flow's processes up to a ready engine or trainer, and of the sweep up to its ready session.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.authors_flow import STAGES
from benchmarks.ratio import emit, ratio, spread
from selfguide.nano import TASKS
from selfguide.progress import stderr_line
from selfguide.store import Journal, RunStore

FLOORS = {"whole": 5.0, "running": 2.0}
CHOSEN = ("nano101", "nano120", "nano102", "nano121", "nano103", "nano122", "nano104", "nano123")
CHANGES = (
    "synthesis.num_candidates=160", "synthesis.target_rows=null", "evaluation.num_instances=32",
    "evaluation.controls=[]", "cluster.num_trainers=2",
)  # fmt: skip
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipe", default="smoke")
    parser.add_argument("--model", default="random")
    parser.add_argument("--set", action="append", default=[], help="further changes to the recipe, for both")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    args = parser.parse_args()
    args.repeats = 1 if args.quick else args.repeats
    tasks = [next(TASKS.glob(f"{name}_*.json")) for name in CHOSEN]
    changes = [*CHANGES, f"model.path={args.model}", *args.set]
    options = ["--recipe", args.recipe, *(word for change in changes for word in ("--set", change))]
    repeats = []
    for number in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="selfguide-flow-") as folder:
            flow = run_flow(tasks[number % len(tasks)], Path(folder) / "flow", options)
            repeats.append({"flow_task": flow, "sweep": run_sweep(tasks, Path(folder) / "sweep", options)})
        stderr_line(json.dumps(repeats[-1]))
    ratios = {
        span: ratio([len(tasks) * one["flow_task"][f"{span}_s"] / one["sweep"][f"{span}_s"] for one in repeats], floor)
        for span, floor in FLOORS.items()
    }
    seconds = {f"flow_{span}_s": spread([len(tasks) * one["flow_task"][f"{span}_s"] for one in repeats])
               for span in FLOORS} | {f"sweep_{span}_s": spread([one["sweep"][f"{span}_s"] for one in repeats])
               for span in FLOORS}  # fmt: skip
    emit("flow", {**vars(args), "changes": changes, "num_tasks": len(tasks)}, ratios, seconds=seconds, repeats=repeats)


def run_flow(task: Path, folder: Path, options: Sequence[str]) -> Json:
    """One task, stage by stage, each in a process of its own."""
    folder.mkdir()
    began, stages = time.monotonic(), []
    for stage in STAGES:
        command = [sys.executable, "-m", "benchmarks.authors_flow", stage, str(task), str(folder), *options]
        done = subprocess.run([*command, "--spawned", str(time.time())], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the flow's {stage} ended with {done.returncode}")
        stages.append(json.loads(done.stdout.splitlines()[-1]))
        stderr_line(f"{task.stem} {json.dumps(stages[-1])}")
    whole_s = time.monotonic() - began
    return {"task": task.stem, "whole_s": whole_s, "running_s": sum(one["work_s"] for one in stages), "stages": stages}


def run_sweep(tasks: Sequence[Path], out: Path, options: Sequence[str]) -> Json:
    command = [str(Path(sys.executable).parent / "selfguide"), "sweep", *map(str, tasks), "--out", str(out), *options]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    whole_s = time.monotonic() - began
    totals = [one for one in Journal(out / "sweep" / "events.jsonl").read() if one["event"] == "totals"]
    if done.returncode or not totals or totals[-1]["done"] != len(tasks):
        raise SystemExit(f"the sweep ended with {done.returncode}, and not with {len(tasks)} tasks")
    return {"whole_s": whole_s, "running_s": totals[-1]["seconds"], "ledgers": read_ledgers(out)}


def read_ledgers(out: Path) -> Json:
    """Candidates and accepted rows of each kind of stage, over all tasks."""
    sums: dict[str, dict[str, int]] = {}
    for task in RunStore(out, create=False).tasks():
        for one in task.artifacts():
            if "ledger" in one.marker:
                kind = sums.setdefault(one.marker["stage"], {"candidates": 0, "accepted": 0})
                for name in kind:
                    kind[name] += one.marker["ledger"].get(name) or 0
    return dict(sums)


if __name__ == "__main__":
    main()
