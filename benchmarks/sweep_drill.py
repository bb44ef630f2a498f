"""Kills a sweep's processes, again and again, and compares what it made with an undisturbed sweep.

    python -m benchmarks.sweep_drill --engine simulated --kills 200 > sweep_drill.json
    python -m benchmarks.sweep_drill --engine vllm --kills 30 > sweep_drill.json

Laps of `selfguide sweep`, each in a run folder of its own and resumed to its end. At seeded moments while tasks are
under way a seeded draw names a victim for SIGKILL: the driver (then the same command is run again), a runner, an
engine's actor, vLLM's core, a trainer, the trainers' queue, or a worker of Ray Data. Rows that are on the disk at a
kill are copied aside and looked for in the end, as is every process that was ever seen below a driver.

Exits with an error where a row is lost, doubled, changed or set aside as poison, a task is not done, the command ends
by itself before its tasks do, a process is left behind, or, with simulated engines, which answer the same whatever
happens, where not every row, adapter and comparison is that of the undisturbed sweep.
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
    Counts,
    Driver,
    Row,
    compare_task,
    final_rows,
    finish,
    methods,
    rows_in,
    say,
    shards,
)
from benchmarks.processes import Process, bury_all, descendants, living, start_of
from selfguide.environment import environment
from selfguide.store import Artifact, RunStore

TITLES = {
    "runner": "ray::RunnerActor", "engine": "ray::EngineActor", "core": "VLLM::EngineCore",
    "trainer": "ray::TrainerActor", "queue": "ray::TrainerQueue", "data": "ray::MapBatches",
}  # fmt: skip
SHARES = {
    "simulated": {"driver": 2, "runner": 4, "engine": 4, "trainer": 3, "queue": 1, "data": 2},
    "vllm": {"driver": 2, "runner": 3, "engine": 3, "core": 3, "trainer": 3, "queue": 1, "data": 1},
}
"""Of 16 kills."""
SETTINGS = {
    "simulated": [
        "cluster.num_engines=8", "engine.per_actor=4", "cluster.num_runners=2", "cluster.num_trainers=2",
        "cluster.tasks_in_flight=8", "cluster.limits.max_deaths=10000",
        "cluster.limits.max_crashes=1000", "engine.tokens_per_s=120",
        "finetuning.simulated_tokens_per_s=80000", "synthesis.num_candidates=128", "synthesis.lag=64",
        "evaluation.controls=[]", "evaluation.bootstrap_samples=500",
    ],
    "vllm": [
        "cluster.num_runners=2", "cluster.limits.max_deaths=10000", "cluster.limits.max_crashes=1000",
        "synthesis.target_rows=null", "synthesis.num_candidates=128", "evaluation.controls=[]",
        "evaluation.bootstrap_samples=500",
    ],
}  # fmt: skip
EVERY_S = {"simulated": 1.5, "vllm": 12.0}
NUM_TASKS = {"simulated": 16, "vllm": 24}
PATIENCE_S = 5.0
"""So long a victim that is not there now is waited for, before the next one is drawn."""
MOST_STARTS = 100
"""Of the command in one lap."""


@dataclass
class Kill:
    """`at_s` after the command's start in its lap, with so many stages open and rows on the disk; `gone_s` is how long
    anything that was below the victim outlived it."""

    lap: int
    victim: str
    at_s: float
    open: dict[str, int]
    num_committed: int
    gone_s: float | None = None


@dataclass
class Found(Counts):
    """What the comparison found, over all laps and tasks."""

    poisoned: int = 0
    same_comparison: int = 0
    num_starts: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def flaws(self) -> int:
        return self.lost + self.doubled + self.changed + self.poisoned + self.left_behind + len(self.failures)

    @property
    def whole(self) -> bool:
        same = self.equal == self.total and self.num_runs == self.same_adapter == self.same_comparison
        return self.num_runs > 0 and same


def main() -> None:
    args = parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="selfguide-drill-"))
    tasks = args.tasks or [str(path) for path in example_tasks()[: NUM_TASKS[args.engine]]]
    command = sweep_command(args.engine, tasks)
    say(f"run folders: {folder}")
    began = time.monotonic()
    finish(Driver(command, folder / "calm"))
    calm_s = round(time.monotonic() - began, 1)
    say(f"undisturbed: {calm_s} s")
    drill = Drill(command, args)
    while len(drill.kills) < args.kills:
        run = folder / f"lap-{drill.lap}"
        drill.run_lap(run)
        compare(run, folder / "calm", drill.found)
        say(f"{len(drill.kills)} kills: {summary(drill.found)}")
    drill.found.left_behind = bury_all(list(drill.seen))
    config = {
        "engine": args.engine, "kills": args.kills, "tasks": len(tasks), "seed": args.seed, "every_s": args.every_s,
        "settings": SETTINGS[args.engine],
    }  # fmt: skip
    victims = dict(Counter(kill.victim for kill in drill.kills))
    times = {"undisturbed_s": calm_s, "seconds": round(time.monotonic() - began, 1), "laps": drill.lap}
    result = {**times, "victims": victims, **summary(drill.found), "kills": [asdict(kill) for kill in drill.kills]}
    print(json.dumps({"benchmark": "sweep_drill", "environment": environment(), "config": config, **result}, indent=1))
    if drill.found.flaws or (args.engine == "simulated" and not drill.found.whole):
        raise SystemExit("the killed sweeps are not what the undisturbed one is; see the counts")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="*", help="task files or folders; by default some that come with the code")
    parser.add_argument("--engine", choices=tuple(SHARES), default="simulated")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--every-s", type=float, help="seconds between kills, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    args.every_s = args.every_s or EVERY_S[args.engine]
    return args


def example_tasks() -> list[Path]:
    """Of the embedded student's world, classification and generation in turn."""
    files = sorted((REPO / "selfguide" / "nano" / "tasks").glob("*.json"))
    half = len(files) // 2
    return [path for pair in zip(files, files[half:], strict=False) for path in pair] + files[2 * half :]


def sweep_command(engine: str, tasks: Sequence[str]) -> list[str]:
    recipe = "simulated" if engine == "simulated" else "smoke"
    options = [word for change in SETTINGS[engine] for word in ("--set", change)]
    script = str(Path(sys.executable).parent / "selfguide")
    return [script, "sweep", *tasks, "--recipe", recipe, "--model", "random", *options]


# ---- killing


class Drill:
    """The kills so far, who is next, and every process that was seen."""

    def __init__(self, command: Sequence[str], args: argparse.Namespace) -> None:
        self._command, self._args = command, args
        self._draw = random.Random(args.seed)
        self._deck: list[str] = []
        self.lap = 0
        self.kills: list[Kill] = []
        self.seen: set[Process] = set()
        self.found = Found()

    def run_lap(self, run: Path) -> None:
        """One sweep to its end, killed as long as it lasts and kills are left."""
        witness, last_words, starts = Witness(run), "", 0
        while last_words != "done":
            starts += 1
            if starts > MOST_STARTS:
                raise SystemExit(f"{run}: not at its end after {MOST_STARTS} starts")
            last_words = self._run_once(Driver(self._command, run), witness)
            if last_words not in ("done", "killed"):
                self.found.failures.append(f"{run.name}: {last_words}")
                say(self.found.failures[-1])
        self.found.num_starts += starts
        final = final_rows(run)
        self.found.num_compared += witness.count
        self.found.changed += sum(final.get(key) != row for key, row in witness.rows.items())
        self.lap += 1

    def _run_once(self, driver: Driver, witness: Witness) -> str:
        """One start of the command: "done", "killed", or what it said last where it ended otherwise."""
        began, sessions = time.monotonic(), num_sessions(driver.folder)
        pending: list[tuple[Kill, float, list[Process]]] = []
        while not driver.ended and len(self.kills) < self._args.kills:
            victim = self._next_victim()
            due = time.monotonic() + self._draw.uniform(0, 2 * self._args.every_s)
            while not driver.ended and (num_sessions(driver.folder) == sessions or time.monotonic() < due):
                if victim == "driver" and time.monotonic() >= due:
                    break  # it may also die as it starts
                self._watch(driver, pending)
            while not driver.ended and time.monotonic() < due + PATIENCE_S:
                if targets := self._targets(driver, victim):
                    break
                self._watch(driver, pending)
            else:
                self._deck.insert(0, victim)
                continue
            witness.look()
            kill = Kill(self.lap, victim, round(time.monotonic() - began, 2), open_stages(driver.folder), witness.count)
            if victim == "driver":
                driver.kill("driver")
                self.seen |= set(driver.family)
                kill.gone_s = driver.bury()
                witness.look()
                self._note(kill)
                return "killed"
            if (below := strike(self._draw.choice(targets))) is None:
                self._deck.append(victim)
                continue
            self._note(kill)
            pending.append((kill, time.monotonic(), below))
        while not driver.ended:
            self._watch(driver, pending)
        return "done" if driver.wait() == 0 else last_line(driver)

    def _next_victim(self) -> str:
        if not self._deck:
            self._deck = [name for name, share in SHARES[self._args.engine].items() for _ in range(share)]
            self._draw.shuffle(self._deck)
        return self._deck.pop()

    def _targets(self, driver: Driver, victim: str) -> list[int]:
        family = descendants(driver.pid)
        self.seen |= {(pid, start_of(pid), line) for pid, line in family.items()}
        if victim == "driver":
            return [driver.pid]
        return sorted(pid for pid, line in family.items() if line.startswith(TITLES[victim]))

    def _watch(self, driver: Driver, pending: list[tuple[Kill, float, list[Process]]]) -> None:
        """Looks who is there now, and which of the killed are gone."""
        self._targets(driver, "driver")
        for one in list(pending):
            kill, since, below = one
            if not living(below):
                kill.gone_s = round(time.monotonic() - since, 2)
                pending.remove(one)
        time.sleep(0.05)

    def _note(self, kill: Kill) -> None:
        self.kills.append(kill)
        open_now = " ".join(f"{name}:{count}" for name, count in kill.open.items())
        say(f"{len(self.kills)}: {kill.victim} after {kill.at_s} s; {kill.num_committed} rows on the disk; {open_now}")


def strike(pid: int) -> list[Process] | None:
    """Kills the process; returns it and all that was below it, or None where it had ended."""
    below = [(one, start_of(one), line) for one, line in {pid: "", **descendants(pid)}.items()]
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return below


class Witness:
    """Rows as they were when they were first seen on the disk. Each file is written once and read once."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._read: set[Path] = set()
        self.rows: dict[tuple[Path, int], Row] = {}

    @property
    def count(self) -> int:
        return len(self.rows)

    def look(self) -> None:
        done = [marker.with_name("rows.parquet") for marker in self._run.glob("tasks/*/*/*/done.json")]
        for file in {*shards(self._run), *done} - self._read:
            try:
                self.rows = rows_in(file, self._run) | self.rows
            except FileNotFoundError:
                continue  # a shard that has just become part of its stage's rows
            self._read.add(file)


def num_sessions(run: Path) -> int:
    """How often tasks have begun to be dealt in this folder."""
    events = run / "sweep" / "events.jsonl"
    return events.read_text().count('"session_began"') if events.is_file() else 0


def open_stages(run: Path) -> dict[str, int]:
    """How many tasks are in each stage."""
    return dict(sorted(Counter(path.parent.parent.name for path in run.glob("tasks/*/*/*/work")).items()))


def last_line(driver: Driver) -> str:
    lines = [line for line in driver.log.read_text(errors="replace").splitlines() if line.strip()]
    return f"ended with {driver.wait()}: {lines[-1] if lines else ''}"


# ---- comparing


def compare(run: Path, calm: Path, found: Found) -> None:
    """Every stage of every task, row by row; and what the sweep says of its tasks."""
    ours, theirs = by_task(run), by_task(calm)
    states = {line["task"]: line for line in map(json.loads, (run / "sweep" / "outcomes.jsonl").open())}
    for task, expected in theirs.items():
        outcome = states.get(task, {"state": "missing", "reason": None})
        if outcome["state"] != "done":
            found.failures.append(f"{run.name}: {task} is {outcome['state']}: {outcome['reason']}")
            continue
        compare_task(methods(ours[task]), methods(expected), found)
        found.same_comparison += facts(ours[task]) == facts(expected)
        found.poisoned += sum(one.marker["ledger"]["failed"].get("poison", 0) for one in ours[task])


def by_task(run: Path) -> dict[str, list[Artifact]]:
    return {task.root.name: list(task.artifacts()) for task in RunStore(run).tasks()}


def facts(done: Sequence[Artifact]) -> dict[str, Any]:
    """What a comparison says, without when and by which commit."""
    [comparison] = [one for one in done if one.stage == "comparison"]
    passing = ("seconds", "finished", "environment")
    return {name: value for name, value in comparison.marker.items() if name not in passing}


def summary(found: Found) -> dict[str, Any]:
    rows = {name: {"equal": found.equal[name], "of": total} for name, total in found.total.items()}
    agreement = round(100 * sum(found.equal.values()) / max(1, sum(found.total.values())), 3)
    counts = {name: value for name, value in asdict(found).items() if name not in ("equal", "total")}
    return {**counts, "agreement_percent": agreement, "rows": rows}


if __name__ == "__main__":
    main()
