"""Kills a run's processes, resumes it, and compares what it made with an undisturbed run.

    python benchmarks/kill_drill.py --engine simulated --kills 12 > kill_drill.json
    python benchmarks/kill_drill.py --engine vllm --kills 6 --task selfguide/examples/time_first.json

Each kill is a SIGKILL at a seeded random moment of a stage: of the driver, of an engine's actor, of vLLM's core below
it, or of the trainer. After the driver's death the same command is run again. What had been committed is copied aside
before each resume and looked for in the end. Rows are lost or doubled where a stage does not hold exactly one row for
each that it was given; agreement is the share of rows that are the same in all columns as in the undisturbed run.

Exits with an error where a row is lost, doubled or changed, a process is left behind, or, with simulated engines, which
answer the same whatever happens, where agreement is not whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.processes import GONE_S, Process, bury_all, descendants, living, start_of
from selfguide.environment import environment
from selfguide.records import ACCEPTED
from selfguide.store import Artifact, RunStore

REPO = Path(__file__).resolve().parent.parent
STAGES = ("synthesis", "curation", "finetuning", "evaluation")
VICTIMS = {
    "synthesis": ("core", "driver", "actor"),
    "curation": ("driver",),
    "finetuning": ("trainer", "driver"),
    "evaluation": ("driver", "core", "actor"),
}
"""Who is killed in which stage, lap by lap."""
SETTINGS = {"synthesis.target_rows": "null", "synthesis.num_candidates": "200"}
"""Several shards; and rows whose number does not depend on what they say."""
TITLES = {"actor": "ray::EngineActor", "core": "VLLM::EngineCore", "trainer": "ray::TrainerActor.train"}
RAY_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")
"""They do no work of ours, and look for their dead head for a minute before they end."""
Row = dict[str, Any]


@dataclass
class Kill:
    """One kill. `open` are the stages that were under way, `num_committed` their rows on disk; `gone_s` is how long a
    driver's processes outlived it; `missed`: the victim had ended before its time."""

    stage: str
    victim: str
    delay_s: float = 0.0
    open: list[str] = field(default_factory=list)
    num_committed: int = 0
    gone_s: float | None = None
    missed: bool = False


@dataclass
class Counts:
    """What the comparison found: rows, then processes, then runs. `agreement` is in per cent, by stage or method."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0
    num_compared: int = 0
    left_behind: int = 0
    num_runs: int = 0
    same_adapter: int = 0
    equal: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    @property
    def agreement(self) -> dict[str, float]:
        return {name: round(100 * self.equal[name] / total, 2) for name, total in self.total.items()}


def main() -> None:
    args = parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="selfguide-kills-"))
    command = run_command(args.task, [f"engine.kind={args.engine}", f"engine.tokens_per_s={args.tokens_per_s}"])
    say(f"run folders: {folder}")
    result, counts = drill(command, plan(args.kills, args.engine), folder, args.seed)
    config = {**vars(args), "task": args.task.name, "out": None, "settings": SETTINGS}
    print(json.dumps({"benchmark": "kill_drill", "environment": environment(), "config": config, **result}, indent=2))
    bad = counts.lost + counts.doubled + counts.changed + counts.left_behind
    if bad or (args.engine == "simulated" and set(counts.agreement.values()) != {100.0}):
        raise SystemExit("the killed runs are not what the undisturbed one is; see the counts")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=("simulated", "vllm"), default="simulated")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--task", type=Path, default=REPO / "selfguide" / "examples" / "sentiment.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-s", type=float, default=10.0, help="speed of simulated engines")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    return parser.parse_args()


def run_command(task: Path, settings: Iterable[str], model: str = "random") -> list[str]:
    """The console script beside this interpreter; add `--out FOLDER`."""
    script = str(Path(sys.executable).parent / "selfguide")
    changes = [*(f"{key}={value}" for key, value in SETTINGS.items()), *settings]
    options = [word for change in changes for word in ("--set", change)]
    return [script, "run", str(task), "--recipe", "smoke", "--model", model, *options]


def plan(num_kills: int, engine: str) -> list[Kill]:
    """Laps through the stages; each lap has its own run folder, and another victim in each stage."""
    kills = []
    for lap in range(num_kills):
        for stage in STAGES:
            victims = [one for one in VICTIMS[stage] if one != "core" or engine == "vllm"]
            kills.append(Kill(stage, victims[lap % len(victims)]))
    return kills[:num_kills]


def laps(kills: Sequence[Kill]) -> Iterator[list[Kill]]:
    """Splits where a stage comes before its predecessor."""
    lap: list[Kill] = []
    for kill in kills:
        if lap and STAGES.index(kill.stage) <= STAGES.index(lap[-1].stage):
            yield lap
            lap = []
        lap.append(kill)
    yield lap


# ---- killing


def drill(command: Sequence[str], kills: Sequence[Kill], folder: Path, seed: int) -> tuple[dict[str, Any], Counts]:
    """Runs undisturbed, then lap by lap with kills; returns what JSON shows, and the counts."""
    undisturbed = folder / "undisturbed"
    finish(Driver(command, undisturbed))
    seconds, counts, draw = stage_seconds(undisturbed), Counts(), random.Random(seed)
    dead: list[Process] = []
    for number, lap in enumerate(laps(kills)):
        run = folder / f"lap-{number}"
        # Early moments are likelier: what is left of a stage after a resume is shorter.
        dead += run_lap(command, lap, run, lambda kill: draw.triangular(0, seconds[kill.stage], 0), counts)
        compare(run, undisturbed, counts)
        say(f"lap {number}: {counts.lost} lost, {counts.doubled} doubled, {counts.changed} changed, {counts.agreement}")
    counts.left_behind = bury_all(dead)
    shown = asdict(counts) | {"agreement_percent": counts.agreement}
    return {"kills": [asdict(kill) for kill in kills], **shown}, counts


def run_lap(
    command: Sequence[str], lap: Sequence[Kill], run: Path, draw_delay: Callable[[Kill], float], counts: Counts
) -> list[Process]:
    """One run folder from start to end, with the lap's kills; returns the families of the drivers that were killed."""
    committed: dict[tuple[Path, int], Row] = {}
    driver, dead = Driver(command, run), []
    for kill in lap:
        kill.delay_s = round(draw_delay(kill), 3)
        if not strike(driver, kill):
            kill.missed = True
            say(f"{kill.victim} in {kill.stage}: gone before it could be killed")
            continue
        say(f"killed {kill.victim} in {'+'.join(kill.open)} after {kill.delay_s} s, {kill.num_committed} rows on disk")
        if kill.victim == "driver":
            kill.gone_s = driver.bury()
            dead += driver.family
            committed = committed_rows(run) | committed  # as each was first seen
            driver = Driver(command, run)
    finish(driver)
    final = final_rows(run)
    counts.num_compared += len(committed)
    counts.changed += sum(final.get(key) != row for key, row in committed.items())
    return dead


class Driver:
    """The command as a child process, and all that it has started."""

    def __init__(self, command: Sequence[str], folder: Path, out: str = "") -> None:
        """Its run folder is `folder`, or the URL `out`; its log lies beside `folder`."""
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*command, "--out", out or str(folder)], stdout=log, stderr=log)
        self.family: list[Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self, victim: str) -> bool:
        """Whether there was one to kill."""
        if self.ended:
            return False
        family = descendants(self._process.pid)
        self.family = [(pid, start_of(pid), command) for pid, command in family.items()]
        if victim == "driver":
            self._process.kill()
            self._process.wait()  # it may be about to close a stage, whose shards then go
            return True
        pids = [pid for pid, command in family.items() if command.startswith(TITLES[victim])]
        for pid in pids[:1]:
            os.kill(pid, signal.SIGKILL)
        return bool(pids)

    @property
    def workers(self) -> list[Process]:
        """The family without what may linger: whatever could still write into the run folder."""
        return [one for one in self.family if not one[2].startswith(RAY_AGENTS)]

    def bury(self) -> float:
        """Seconds until nothing that the dead driver had started can write any more."""
        self._process.wait()
        began = time.monotonic()
        while living(self.workers):
            if time.monotonic() - began > GONE_S:
                break
            time.sleep(0.02)
        return round(time.monotonic() - began, 2)

    def wait(self) -> int:
        return self._process.wait()


def finish(driver: Driver) -> None:
    if code := driver.wait():
        tail = "\n".join(driver.log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{driver.folder}: the run ended with {code}:\n{tail}")


def strike(driver: Driver, kill: Kill) -> bool:
    """Kills once the stage has been under way for the delay, or has ended; False where there was nobody to kill."""

    def is_open() -> bool:
        return not driver.ended and state_of(driver.folder, kill.stage) == "open"

    while not driver.ended and state_of(driver.folder, kill.stage) == "waiting":
        time.sleep(0.005)
    due = time.monotonic() + kill.delay_s
    while is_open() and time.monotonic() < due:
        time.sleep(0.005)
    while not (hit := driver.kill(kill.victim)) and is_open():
        time.sleep(0.005)  # the victim has not begun yet, or is being restarted
    kill.open = [stage for stage in STAGES if state_of(driver.folder, stage) == "open"]
    kill.num_committed = sum(pq.read_metadata(path).num_rows for path in shards(driver.folder))
    return hit


def state_of(folder: Path, stage: str) -> str:
    """ "waiting", "open" or "done". Of the evaluations the tuned student's counts, which ends with the comparison."""
    done = {path.parent.parent.name for path in folder.glob("tasks/*/*/*/done.json")}
    if (stage if stage != "evaluation" else "comparison") in done:
        return "done"
    began = {path.parent.parent.name for path in folder.glob("tasks/*/*/*/work")}
    return "open" if stage in began and (stage != "evaluation" or "finetuning" in done) else "waiting"


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each stage took; of the evaluations, the last."""
    return {one.stage: one.marker["seconds"] for one in artifacts(folder) if one.stage in STAGES}


# ---- comparing


def artifacts(folder: Path) -> list[Artifact]:
    return [artifact for task in RunStore(folder).tasks() for artifact in task.artifacts()]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("tasks/*/*/*/work/rows-*.parquet"))


def committed_rows(folder: Path) -> dict[tuple[Path, int], Row]:
    """Every row that is on disk now, by its stage's path in the run folder and its number."""
    files = [*shards(folder), *(one.rows_path for one in artifacts(folder))]
    found: dict[tuple[Path, int], Row] = {}
    for file in files:
        found |= rows_in(file, folder)
    return found


def rows_in(file: Path, folder: Path) -> dict[tuple[Path, int], Row]:
    """A shard's rows, or a finished stage's."""
    stage = (file.parent.parent if file.parent.name == "work" else file.parent).relative_to(folder)
    return {(stage, row["row"]): row for row in pq.read_table(file).to_pylist()}


def final_rows(folder: Path) -> dict[tuple[Path, int], Row]:
    return {(one.path.relative_to(folder), row["row"]): row for one in artifacts(folder) for row in one.rows()}


def compare(run: Path, undisturbed: Path, counts: Counts) -> None:
    """Adds what became of the run's rows to the counts."""
    compare_task(methods(artifacts(run)), methods(artifacts(undisturbed)), counts)


def compare_task(ours: dict[str, Artifact], theirs: dict[str, Artifact], counts: Counts) -> None:
    expected = expected_rows(ours, theirs)
    for name, artifact in ours.items():
        rows = [row["row"] for row in artifact.rows()]
        counts.lost += len(expected[name] - set(rows))
        counts.doubled += len(rows) - len(set(rows))
        other = {row["row"]: content(row) for row in theirs[name].rows()}
        mine = {row["row"]: content(row) for row in artifact.rows()}
        counts.equal[name] = counts.equal.get(name, 0) + sum(mine.get(key) == row for key, row in other.items())
        counts.total[name] = counts.total.get(name, 0) + len(other.keys() | mine.keys())
    counts.num_runs += 1
    counts.same_adapter += adapter_of(ours) == adapter_of(theirs)


def methods(done: Sequence[Artifact]) -> dict[str, Artifact]:
    """The artifacts of the one comparison among them: stages by name, evaluations by method."""
    [comparison] = [one for one in done if one.stage == "comparison"]
    by_name = {one.stage: one for one in done if one.stage in ("synthesis", "curation", "finetuning")}
    evaluations = {one.path.name: one for one in done if one.stage == "evaluation"}
    return by_name | {name: evaluations[path] for name, path in comparison.marker["made_by"]["methods"].items()}


def expected_rows(ours: dict[str, Artifact], theirs: dict[str, Artifact]) -> dict[str, set[int]]:
    """What each stage was given; where that is the same in every run, what the undisturbed one holds."""
    given = {"curation": accepted(ours["synthesis"]), "finetuning": accepted(ours["curation"])}
    return {name: given.get(name) or {row["row"] for row in theirs[name].rows()} for name in ours}


def adapter_of(found: dict[str, Artifact]) -> str:
    return str(found["finetuning"].marker["train"]["checkpoints"][-1]["digest"])


def accepted(artifact: Artifact) -> set[int]:
    return {row["row"] for row in artifact.rows() if row["state"] == ACCEPTED}


def content(value: Any) -> Any:
    """A row as it is compared: log-probabilities to a thousandth, since numerics vary with the batch."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [content(one) for one in value]
    return {key: content(one) for key, one in value.items()} if isinstance(value, dict) else value


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
