"""The real command, its processes killed in each stage and run again, ends with the rows of an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from benchmarks import kill_drill, processes
from benchmarks.kill_drill import Counts, Driver, Kill
from selfguide import api
from selfguide.api import Session
from selfguide.store import RunStore, leases
from selfguide.tasks import load_task
from tests.conftest import REAL_TRAINING

SENTIMENT = Path(__file__).parent.parent / "selfguide" / "examples" / "sentiment.json"
SLOW = {"engine.kind": "simulated", "engine.tokens_per_s": 40}
ROWS = {"synthesis.target_rows": None, "synthesis.num_candidates": 200}  # as the drill sets them
KILLS = [
    Kill("synthesis", "actor", delay_s=0.5),
    Kill("synthesis", "driver", delay_s=1.5),
    Kill("curation", "driver"),
    Kill("finetuning", "driver"),
    Kill("evaluation", "driver"),
]


@pytest.mark.timeout(600)  # six starts of Ray
async def test_a_run_killed_in_every_stage_ends_as_if_undisturbed(
    open_simulated: Callable[..., AbstractAsyncContextManager[Session]], random_student: Path, tmp_path: Path
) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "killed"
    async with open_simulated(**ROWS, **REAL_TRAINING) as session:
        await api.run(load_task(SENTIMENT), session.recipe, undisturbed, session=session)
    settings = [f"{key}={value}" for key, value in SLOW.items()]
    committed = kill_and_resume(kill_drill.run_command(SENTIMENT, settings, str(random_student)), run)
    final = kill_drill.final_rows(run)
    assert len(committed) >= 200
    assert all(final[key] == row for key, row in committed.items()), "a committed row was changed"
    check_succession(run)
    counts = Counts()
    kill_drill.compare(run, undisturbed, counts)
    assert (counts.lost, counts.doubled, counts.same_adapter) == (0, 0, 1)
    assert counts.agreement.keys() >= {"synthesis", "curation", "finetuning", "base", "self_guide"}
    assert set(counts.agreement.values()) == {100.0}


def kill_and_resume(command: list[str], run: Path) -> dict[tuple[Path, int], kill_drill.Row]:
    """The rows that the dead drivers left on disk. They leave no process, and leases that nobody holds."""
    committed: dict[tuple[Path, int], kill_drill.Row] = {}
    driver = Driver(command, run)
    for kill in KILLS:
        assert kill_drill.strike(driver, kill), driver.log.read_text()
        if kill.victim != "driver":
            continue
        driver.bury()
        assert not processes.living(driver.workers)
        held = leases(run)
        assert not any(alive for _, alive in held)
        assert kill.stage in {lease.parents[2].name for lease, _ in held}, "the stage was not under way"
        committed = kill_drill.committed_rows(run) | committed  # as each was first seen
        driver = Driver(command, run)
    kill_drill.finish(driver)
    assert not leases(run)
    return committed


def check_succession(run: Path) -> None:
    """Each process that worked on a stage has taken the lease over from the last."""
    for artifact in RunStore(run).task("sentiment").artifacts():
        events = [json.loads(line) for line in (artifact.path / "events.jsonl").read_text().splitlines()]
        epochs = [event["epoch"] for event in events if event["event"] == "begin"]
        assert epochs == sorted(set(epochs))  # one that died with its lease fresh has left no event
        assert epochs[-1] == 2 or artifact.stage in ("evaluation", "comparison")
