"""A whole sweep over hundreds of simulated engines: how much of them it keeps busy, and what the runners cost.

    python -m benchmarks.bench_scale NI_DIR [--quick] --engines 64 256 > scale.json

Each run is `selfguide sweep` in a process of its own with the recipe `simulated`, whose engines answer at a set speed.
Every number is read from the run folder. The ideal is what no scheduler can beat: all sequences in all slots without a
gap. Start-up is left out; the tail, where fewer tasks are left than engines, is not.

- efficiency: sequence-seconds of all rows / (engines x slots x seconds of the session)
- rows per second of runner CPU: answered and stored rows over the CPU time of the runners' processes, all threads;
  from the first totals on, ten seconds in, and with the start, which is some seconds of imports
- memory: resident bytes of driver and runners at a tenth, half and the end of the session
- files, bytes: what lies in the run folder at the end
- reconciled: every task has one end, and each stage's rows are as many as its ledger says
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.ratio import emit, ratio
from selfguide.progress import stderr_line
from selfguide.recipefile import load_recipe, parse_change
from selfguide.store import Journal, RunStore

FLOORS = {"efficiency": 0.95, "rows_per_runner_cpu_s": 2000.0}


def main() -> None:
    args = parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="selfguide-scale-"))
    runs = [
        measure(args, engines, folder / f"{engines}-engines-{repeat}")
        for repeat in range(args.repeats)
        for engines in args.engines
    ]
    if args.out is None:
        shutil.rmtree(folder)
    ratios = {
        f"{name}_{engines}_engines": ratio([one[name] for one in runs if one["engines"] == engines], floor)
        for name, floor in FLOORS.items()
        for engines in args.engines
    }
    if args.quick:  # few tasks are mostly ramp and tail
        ratios = {key: one | {"floor": None} for key, one in ratios.items()}
    emit("scale", {**vars(args), "paths": len(args.paths), "out": None}, ratios, runs=runs)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="task files, folders, a clone of NI-V2")
    parser.add_argument("--engines", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--slots", type=int, default=8, help="sequences of one engine")
    parser.add_argument("--runners", type=int, default=1)
    parser.add_argument("--rows-per-s", type=float, default=1000.0, help="what all engines together may answer")
    parser.add_argument("--set", action="append", default=[], help="further changes to the recipe")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="16 engines, once")
    args = parser.parse_args()
    if args.quick:
        args.engines, args.repeats = [16], 1
    return args


def changes(args: argparse.Namespace, engines: int) -> list[str]:
    """A speed at which all engines together answer as many rows as this machine's cores can see through."""
    recipe = load_recipe("simulated")
    tokens = recipe.engine.simulation.answer_tokens
    per_token = args.rows_per_s * tokens / (engines * args.slots)
    return [
        f"cluster.num_engines={engines}", f"cluster.num_runners={args.runners}", "cluster.num_trainers=4",
        f"engine.max_num_seqs={args.slots}", f"engine.tokens_per_s={per_token:.4g}",
        "engine.simulation.prefill_tokens_per_s=0", "engine.simulation.adapter_load_s=0",
        "finetuning.simulated_tokens_per_s=1e7", "synthesis.num_candidates=400", "synthesis.lag=128",
        "annotation.num_samples=1", "evaluation.num_instances=100", "evaluation.controls=[]", "engine.per_actor=64",
        "evaluation.bootstrap_samples=1000", *args.set,
    ]  # fmt: skip


def measure(args: argparse.Namespace, engines: int, out: Path) -> dict[str, Any]:
    wanted = changes(args, engines)
    options = [word for change in wanted for word in ("--set", change)]
    script = str(Path(sys.executable).parent / "selfguide")
    command = [script, "sweep", *args.paths, "--recipe", "simulated", "--model", "random", "--out", str(out), *options]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    result = {
        "engines": engines, "exit": done.returncode, "command_s": round(time.monotonic() - began, 1),
        "changes": dict(map(parse_change, wanted)), **read_session(out, engines * args.slots), **count_files(out),
        **reconcile(out),
    }  # fmt: skip
    stderr_line(json.dumps({key: value for key, value in result.items() if key != "changes"}))
    return result


def read_session(out: Path, slots: int) -> dict[str, Any]:
    events = Journal(out / "sweep" / "events.jsonl").read()
    totals = [event for event in events if event["event"] == "totals"]
    first, last = totals[0], totals[-1]
    cpu_s, start_cpu_s = sum(last["runner_cpu_s"]), sum(first["runner_cpu_s"])
    return {
        "tasks": last["tasks"], "done": last["done"], "failed": last["failed"], "rows": last["rows"],
        "seconds": last["seconds"], "rows_per_s": round(last["rows"] / last["seconds"], 1),
        "efficiency": round(last["engine_sequence_s"] / (slots * last["seconds"]), 4),
        "efficiency_while_tasks_wait": efficiency_while_waiting(totals, slots),
        "rows_per_runner_cpu_s": round((last["rows"] - first["rows"]) / (cpu_s - start_cpu_s), 1),
        "rows_per_runner_cpu_s_with_start": round(last["rows"] / cpu_s, 1),
        "driver_rss_mib": memory(totals, lambda one: one["driver_rss_bytes"]),
        "runner_rss_mib": memory(totals, lambda one: sum(one["runner_rss_bytes"])),
        "stale": last["stale"], "deaths": last["engine_deaths"],
    }  # fmt: skip


def efficiency_while_waiting(totals: Sequence[Mapping[str, Any]], slots: int) -> Any:
    """Between the first totals and the last at which a task still waited to be begun: no tail."""
    busy = [one for one in totals if one["waiting"]]
    if len(busy) < 2:
        return None
    seconds = busy[-1]["seconds"] - busy[0]["seconds"]
    return round((busy[-1]["engine_sequence_s"] - busy[0]["engine_sequence_s"]) / (slots * seconds), 4)


def memory(totals: Sequence[Mapping[str, Any]], of: Any) -> list[float]:
    """MiB at a tenth, half and the end."""
    places = (len(totals) // 10, len(totals) // 2, len(totals) - 1)
    return [round(of(totals[place]) / 2**20, 1) for place in places]


def count_files(out: Path) -> dict[str, int]:
    files = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(files)}


def reconcile(out: Path) -> dict[str, Any]:
    """Rows of all finished stages, and how many stages do not hold what their ledgers say."""
    rows = wrong = stages = 0
    for task in RunStore(out, create=False).tasks():
        for one in task.artifacts():
            found, stages = pq.read_metadata(one.rows_path).num_rows, stages + 1
            rows += found
            wrong += found != one.marker["ledger"]["candidates"]
    return {"stages": stages, "stored_rows": rows, "unreconciled_stages": wrong}


if __name__ == "__main__":
    main()
