"""Kills a sweep's processes, again and again, and compares what it made with an undisturbed sweep.

    python -m benchmarks.sweep_drill --engine simulated --kills 200 > sweep_drill.json
    python -m benchmarks.sweep_drill --engine vllm --kills 30 > sweep_drill.json

Laps of `selfguide sweep`, each in a run folder of its own and resumed to its end. Every few seconds a seeded draw takes
one of its processes and sends it SIGKILL: the driver (then the same command is run again), a runner, an engine's actor,
vLLM's core, a trainer, or the trainers' queue. What was on the disk at each death of a driver is looked for in the end.

Exits with an error where a row is lost, doubled or changed, a task failed, a row was set aside as poison, or, with
simulated engines, which answer the same whatever happens, where not every row and adapter is that of the calm sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kill_drill import (
    REPO,
    Driver,
    Row,
    artifacts,
    bury_all,
    committed_rows,
    content,
    descendants,
    final_rows,
    finish,
    say,
)
from selfguide.environment import environment

TITLES = {
    "runner": "ray::RunnerActor", "engine": "ray::EngineActor", "trainer": "ray::TrainerActor",
    "queue": "ray::TrainerQueue", "core": "VLLM::EngineCore",
}  # fmt: skip
WEIGHTS = {"driver": 1, "runner": 3, "engine": 4, "core": 2, "trainer": 3, "queue": 1}
SETTINGS = {
    "simulated": [
        "cluster.num_engines=8", "engine.per_actor=4", "cluster.num_runners=2", "cluster.num_trainers=2",
        "cluster.limits.max_deaths=10000", "finetuning.simulated_tokens_per_s=40000", "engine.tokens_per_s=40",
        "synthesis.num_candidates=80", "evaluation.controls=[]", "evaluation.bootstrap_samples=500",
    ],
    "vllm": ["cluster.num_runners=2", "cluster.limits.max_deaths=10000", "synthesis.target_rows=null",
             "synthesis.num_candidates=80", "evaluation.controls=[]"],
}  # fmt: skip


@dataclass
class Kill:
    """`after_s` the one before; `num_committed` rows were on the disk when a driver died."""

    victim: str
    after_s: float
    num_committed: int | None = None


@dataclass
class Counts:
    """Rows, then tasks, then processes. `compared` are rows of the calm sweep, `equal` those that are the same."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0
    poisoned: int = 0
    compared: int = 0
    equal: int = 0
    adapters: int = 0
    equal_adapters: int = 0
    failed_tasks: int = 0
    left_behind: int = 0
    failures: list[str] = field(default_factory=list)


def main() -> None:
    args = parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="selfguide-drill-"))
    command = sweep_command(args)
    say(f"run folders: {folder}")
    began = time.monotonic()
    finish(Driver(command, folder / "calm"))
    calm_s = round(time.monotonic() - began, 1)
    say(f"calm: {calm_s} s")
    kills, counts, draw = list[Kill](), Counts(), random.Random(args.seed)
    while len(kills) < args.kills:
        run = folder / f"lap-{len(kills)}"
        lap(command, run, draw, kills, args, counts)
        compare(run, folder / "calm", counts)
        say(f"{len(kills)} kills: {asdict(counts)}")
    config = {**vars(args), "out": None, "tasks": len(args.tasks), "settings": SETTINGS[args.engine]}
    by_victim = dict(Counter(kill.victim for kill in kills))
    result = {"calm_s": calm_s, "seconds": round(time.monotonic() - began, 1), "victims": by_victim, **asdict(counts)}
    document = {"benchmark": "sweep_drill", "environment": environment(), "config": config, **result}
    print(json.dumps({**document, "kills": [asdict(kill) for kill in kills]}, indent=1))
    wrong = counts.lost + counts.doubled + counts.changed + counts.poisoned + counts.failed_tasks + counts.left_behind
    whole = (counts.equal, counts.equal_adapters) == (counts.compared, counts.adapters)
    if wrong or (args.engine == "simulated" and not whole):
        raise SystemExit("the killed sweeps are not what the calm one is; see the counts")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="*", default=[str(REPO / "selfguide" / "nano" / "tasks")])
    parser.add_argument("--engine", choices=("simulated", "vllm"), default="simulated")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds between kills, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    return parser.parse_args()


def sweep_command(args: argparse.Namespace) -> list[str]:
    recipe = "simulated" if args.engine == "simulated" else "smoke"
    options = [word for change in SETTINGS[args.engine] for word in ("--set", change)]
    script = str(Path(sys.executable).parent / "selfguide")
    return [script, "sweep", *args.tasks, "--recipe", recipe, "--model", "random", *options]


# ---- killing


def lap(
    command: Sequence[str], run: Path, draw: random.Random, kills: list[Kill], args: argparse.Namespace, counts: Counts
) -> None:
    """One sweep to its end, killed as long as it lasts and kills are left."""
    seen: dict[tuple[Path, int], Row] = {}
    driver, dead = Driver(command, run), []
    last = time.monotonic()
    while not driver.ended and len(kills) < args.kills:
        due = last + draw.uniform(0.5, 1.5) * args.every_s
        while time.monotonic() < due and not driver.ended:
            time.sleep(0.02)
        victim = strike(driver, draw)
        if victim is None:
            continue
        now = time.monotonic()
        kills.append(Kill(victim, round(now - last, 2)))
        last = now
        if victim == "driver":
            driver.bury()
            dead += driver.family
            found = committed_rows(run)
            kills[-1].num_committed = len(found)
            seen = found | seen  # as each was first seen
            driver = Driver(command, run)
    finish_lap(driver, counts)
    final = final_rows(run)
    counts.changed += sum(final.get(key) != row for key, row in seen.items())
    counts.left_behind += bury_all(dead)


def strike(driver: Driver, draw: random.Random) -> str | None:
    """Kills one process of the sweep once there are runners at work; None where there was nobody to kill."""
    family = descendants(driver.pid)
    there = {name: [pid for pid, line in family.items() if line.startswith(title)] for name, title in TITLES.items()}
    if not there["runner"] or driver.ended:
        return None
    names = [name for name in WEIGHTS if name == "driver" or there[name]]
    victim = draw.choices(names, [WEIGHTS[name] for name in names])[0]
    if victim == "driver":
        return victim if driver.kill("driver") else None
    try:
        os.kill(draw.choice(sorted(there[victim])), signal.SIGKILL)
    except ProcessLookupError:
        return None
    return victim


def finish_lap(driver: Driver, counts: Counts) -> None:
    """Failed tasks end the command with 1, and are counted below."""
    if (code := driver.wait()) not in (0, 1):
        counts.failures.append(f"{driver.folder.name} ended with {code}")
        counts.failed_tasks += 1


# ---- comparing


def compare(run: Path, calm: Path, counts: Counts) -> None:
    """Every stage of every task, row by row."""
    ours, theirs = stages(run), stages(calm)
    for name, artifact in theirs.items():
        expected = {row["row"]: content(row) for row in artifact.rows()}
        counts.compared += len(expected)
        if name not in ours:
            counts.lost += len(expected)
            counts.failures.append(f"{run.name}: {name} is missing")
            continue
        rows = ours[name].rows()
        found = {row["row"]: content(row) for row in rows}
        counts.lost += len(expected.keys() - found.keys())
        counts.doubled += len(rows) - len(found)
        counts.poisoned += sum(row.get("filter") == "poison" for row in rows)
        counts.equal += sum(found.get(key) == row for key, row in expected.items())
        if artifact.stage == "finetuning":
            counts.adapters += 1
            counts.equal_adapters += digest_of(artifact) == digest_of(ours[name])
    for line in (run / "sweep" / "outcomes.jsonl").read_text().splitlines():
        outcome = json.loads(line)
        if outcome["state"] != "done":
            counts.failed_tasks += 1
            counts.failures.append(f"{run.name}: {outcome['task']}: {outcome['reason']}")


def stages(run: Path) -> dict[str, Any]:
    """Of simulated engines fingerprints are the same in every run. Real ones may sample otherwise in another batch, and
    what follows from that has other fingerprints: a stage is then known by its place in the order of its kind."""
    found: dict[str, Any] = {}
    order: Counter[str] = Counter()
    for one in artifacts(run):
        kind = f"{one.path.parent.parent.name}/{one.stage}"
        asked = one.marker["made_by"].get("num_gold"), "adapter" in one.marker["made_by"]
        name = f"{kind}/{asked}" if one.stage == "evaluation" else kind
        order[name] += 1
        found[f"{name}/{order[name]}"] = one
    return found


def digest_of(artifact: Any) -> str:
    return str(artifact.marker["train"]["checkpoints"][-1]["digest"])


if __name__ == "__main__":
    main()
