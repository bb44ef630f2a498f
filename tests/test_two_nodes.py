"""A sweep over two nodes of Ray, one of which is taken away in the middle: nothing is lost, and nobody is blamed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfguide.methods import self_guide
from selfguide.store import RunStore
from selfguide.tasks import load_task
from tests.conftest import OpenSimulated

NODES = """
import os, signal, sys
from ray.cluster_utils import Cluster

head = {"num_cpus": 4, "include_dashboard": False, "temp_dir": sys.argv[1], "object_store_memory": 128 << 20}
cluster = Cluster(initialize_head=True, head_node_args=head)
second = cluster.add_node(num_cpus=4, object_store_memory=128 << 20)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(second, allow_graceful=False)
print("removed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
ROWS = {
    "synthesis.num_candidates": 120, "synthesis.target_rows": None, "synthesis.lag": 32,
    "evaluation.num_instances": 24, "finetuning.simulated_tokens_per_s": 1e6,
}  # fmt: skip
SWEEP = {
    **ROWS, "engine.kind": "simulated", "engine.per_actor": 1, "engine.tokens_per_s": 12, "cluster.num_engines": 4,
    "engine.max_num_seqs": 16, "cluster.engine_cpus": 0.5, "cluster.trainer_cpus": 0.2,
}  # fmt: skip
TASKS = ("a", "b", "c", "d")


@pytest.fixture
def two_nodes() -> Iterator[subprocess.Popen[str]]:
    """A process that has started two nodes and said their address; a line to it takes the second one away."""
    folder = tempfile.mkdtemp(prefix="sg-", dir="/tmp")  # Ray's sockets want a short path
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", NODES, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.communicate("\n\n")
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    (tmp_path / "tasks").mkdir()
    files = []
    for name in TASKS:
        content = {
            "instruction": f"Say whether the review of {name} is good or bad.", "labels": ["good", "bad"],
            "examples": [{"input": "It works.", "output": "good"}, {"input": "It broke.", "output": "bad"}],
            "instances": [{"input": f"Review {i} of {name}.", "output": ["good"]} for i in range(24)],
        }  # fmt: skip
        files.append(tmp_path / "tasks" / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    return files


def rows_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Of every finished stage, by its path in the run folder."""
    found = (one for task in RunStore(out).tasks() for one in task.artifacts())
    return {str(one.path.relative_to(out)): one.rows() for one in found}


async def test_a_node_that_is_taken_away_costs_no_row_and_blames_none(
    two_nodes: subprocess.Popen[str], tasks: list[Path], random_student: Path, open_simulated: OpenSimulated,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    assert two_nodes.stdout is not None
    assert two_nodes.stdin is not None
    settings = {**SWEEP, "cluster.address": two_nodes.stdout.readline().strip(), "model.path": str(random_student)}
    command = [str(Path(sys.executable).with_name("selfguide")), "sweep", *map(str, tasks), "--recipe", "smoke"]
    command += ["--out", str(out), "--json", *(f"--set={key}={json.dumps(value)}" for key, value in settings.items())]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as sweep:  # fmt: skip
        assert sweep.stdout is not None
        for line in sweep.stdout:  # until rows of synthesis are on their way in all engines
            if json.loads(line).get("active", {}).get("synthesis", {"rows": 0})["rows"] > 60:
                break
        print("", file=two_nodes.stdin, flush=True)
        assert two_nodes.stdout.readline() == "removed\n"
        said, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, errors
    *_, totals, ended = [json.loads(line) for line in said.splitlines()]
    assert (totals["done"], totals["failed"], ended["stopped"]) == (len(TASKS), 0, False)
    assert (totals["engine_deaths"], totals["poisoned"]) == (0, 0), "a node's loss was counted against its engines"
    lines = [line for path in out.glob("tasks/*/*/*/events.jsonl") for line in path.read_text().splitlines()]
    deaths = [event for event in map(json.loads, lines) if event["event"] == "engine_died"]
    # Ray may have put the runner on the lost node; then nobody is left who could tell which rows it had in flight.
    assert totals["runner_deaths"] or any(event["rows"] for event in deaths), "no row was in the engines"
    assert not any(event["blame"] for event in deaths)
    async with open_simulated(**ROWS) as session:
        runs = [
            session.task_run(load_task(path), RunStore(tmp_path / "undisturbed"), lambda *_: None) for path in tasks
        ]
        await asyncio.gather(*map(self_guide, runs))
    assert rows_of(out) == rows_of(tmp_path / "undisturbed")
