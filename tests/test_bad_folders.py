"""Damaged run folders, full disks, two writers, tasks that come to nothing: one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from selfguide import api, cli
from selfguide.api import Session
from selfguide.curation import curate
from selfguide.errors import TaskFailed, UserError
from selfguide.evaluation import evaluation_stage
from selfguide.methods import untuned_protocols
from selfguide.records import Ledger
from selfguide.scorecard import evaluate_tasks
from selfguide.store import SHARD_ROWS, RunStore, Stage, TaskStore
from selfguide.synthesis import synthesis_stage, synthesize
from selfguide.tasks import load_task

TASK = Path(cli.__file__).parent / "examples" / "sentiment.json"
DEEP = b"[" * 100_000
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- damaged stages

SCHEMA = pa.schema([("row", pa.int32()), ("state", pa.string()), ("text", pa.string())])


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return RunStore(tmp_path / "run").task("colours").stage("synthesis", {"seed": 0})


def write_stage(stage: Stage, *, finish: bool) -> None:
    rows = [{"row": row, "state": "accepted", "text": f"text {row}", "filter": None} for row in range(SHARD_ROWS)]
    with stage.writing():
        stage.commit([{key: row[key] for key in SCHEMA.names} for row in rows], SCHEMA)
        if finish:
            stage.finish(stage.committed(), SCHEMA, Ledger.of(rows))


MARKERS = (b"{", b"[]", b"{}", b"\xff", DEEP, b'{"stage": "synthesis", "rows_digest": "x"}')


@pytest.mark.parametrize(
    ("name", "data"),
    [*(("done.json", data) for data in MARKERS), *(("rows.parquet", data) for data in (b"", b"PAR1", None))],
)
def test_a_damaged_stage_is_named_and_made_again_once_it_is_gone(
    stage: Stage, tmp_path: Path, name: str, data: bytes | None
) -> None:
    write_stage(stage, finish=True)
    good = content(stage.path)
    (stage.path / name).unlink() if data is None else (stage.path / name).write_bytes(data)
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: is damaged .*; move {stage.path} away") as error:
        _ = stage.done
    assert len(str(error.value).splitlines()) == 1
    if name == "done.json":  # a report reads markers alone
        with pytest.raises(UserError, match="is damaged"):
            TaskStore(stage.path.parent.parent).artifacts()
    assert content(tmp_path) == before
    stage.path.rename(tmp_path / "away")
    write_stage(stage, finish=True)
    assert stage.done
    assert content(stage.path)["rows.parquet"] == good["rows.parquet"]


def test_a_damaged_shard_is_named(stage: Stage) -> None:
    write_stage(stage, finish=False)
    [shard] = stage.work.glob("rows-*")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"is damaged .*; move {stage.path} away"):
        stage.committed()


def test_files_of_others_in_a_stage_are_passed_over(stage: Stage) -> None:
    """A lease of no process, one that cannot be read, events that are none."""
    write_stage(stage, finish=False)
    (stage.work / "lease-mine").touch()
    (stage.work / "epoch-").touch()
    with (stage.work / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n"text"\n{"event": "no time"}\n' + DEEP + b"\n")
    (stage.work / "lease-7").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="another process is at work here"), stage.writing():
        raise AssertionError("two writers")
    os.utime(stage.work / "lease-7", (0, 0))
    with stage.writing():
        assert [event["event"] for event in stage.events()] == ["begin", "begin"]
        assert stage.suspects() == set()


# ---- disks

FULL = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from selfguide.errors import UserError
from selfguide.store import RunStore
SCHEMA = pa.schema([("row", pa.int32()), ("state", pa.string()), ("text", pa.string())])
stage = RunStore(Path(sys.argv[1])).task("colours").stage("synthesis", {"seed": 0})
rows = [{"row": row, "state": "accepted", "text": f"{row}" * 9999} for row in range(64, 128)]
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
try:
    with stage.writing():
        for act in (lambda: stage.commit(rows, SCHEMA), lambda: stage.log({"event": "x" * 999}), lambda: 1 / 0):
            try:
                act()
            except UserError as error:
                print(error)
except ZeroDivisionError:
    print("ended")
"""


def test_a_disk_that_takes_no_more_loses_nothing(stage: Stage, tmp_path: Path) -> None:
    """Files may not grow beyond 400 bytes, as where a quota is spent."""
    write_stage(stage, finish=False)
    before = {name: data for name, data in content(stage.work).items() if name.startswith("rows-")}
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    said = "cannot be written (File too large); free space or choose another --out, then run the same command again"
    names = ("rows-00000064.parquet", "events.jsonl")
    assert lines == [*(f"{stage.work / name}: {said}" for name in names), "ended"]
    assert {name: data for name, data in content(stage.work).items() if "rows-" in name} == before
    assert [event["event"] for event in stage.events()] == ["begin", "begin"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("verb", [["recipes", "paper"], ["validate", TASK]])
def test_standard_output_that_takes_nothing(verb: list[object], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", "from selfguide.cli import main; main()", *map(str, verb)]
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("selfguide: standard output cannot be written (No space left on device); ")
    assert done.stderr.count("\n") == 1


# ---- runs

HOLD = """
import sys
from pathlib import Path
from selfguide.store import Stage
path = Path(sys.argv[1])
with Stage(path.parent.name, path, {}, []).writing():
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process is at work in the stage."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "holds\n"
        yield
        process.communicate()


async def test_two_runs_on_one_folder_at_once(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    async with open_simulated() as session:
        run = session.task_run(load_task(TASK), RunStore(tmp_path), lambda *_: None)
        base = evaluation_stage(run, untuned_protocols(run)["base"])
        with held(synthesis_stage(run).path), held(base.path):
            before = content(tmp_path)
            busy = r"another process is at work here .*; wait for it or end it"
            with pytest.raises(UserError, match=busy):
                await api.run(run.task, session.recipe, tmp_path, session=session)
            with pytest.raises(UserError, match=busy):
                await evaluate_tasks([run.task], session.recipe, tmp_path, session=session)
            after = content(tmp_path)
        assert {name: after[name] for name in before} == before


async def test_another_task_of_the_same_name_shares_nothing(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    task = load_task(TASK)
    task = replace(task, instances=task.instances[:4])
    async with open_simulated() as session:
        await evaluate_tasks([task], session.recipe, tmp_path, session=session)
        before = content(tmp_path)
        other = replace(task, instruction="Another one.", digest="0" * 64)
        await evaluate_tasks([other], session.recipe, tmp_path, session=session)
        after = content(tmp_path)
    assert {name: after[name] for name in before} == before
    assert sum(name.endswith("done.json") for name in after) == 2


async def fail(session: Session, task: Path, out: Path) -> str:
    with pytest.raises(TaskFailed) as error:
        await api.run(load_task(task), session.recipe, out, session=session)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


async def test_when_all_rows_are_rejected_the_worst_filter_is_named(
    open_simulated: OpenSimulated, tmp_path: Path
) -> None:
    """Too few rows is no mistake of the command line: exit code 1. What was made is kept, and not made again."""
    nothing_passes = [{"name": "noise", "words": ["", *"aeiou 0123456789"], "exempt_gold": False}]
    async with open_simulated(**{"filters.inputs": nothing_passes}) as session:
        said = await fail(session, TASK, tmp_path)
        assert "finetuning.min_rows is" in said
        assert "loosen that filter or raise synthesis.num_candidates" in said
        rows = {name: data for name, data in content(tmp_path).items() if name.endswith("rows.parquet")}
        dispatched = session.pool.counts.dispatched
        assert await fail(session, TASK, tmp_path) == said
        assert session.pool.counts.dispatched == dispatched
    assert {name: data for name, data in content(tmp_path).items() if name.endswith("rows.parquet")} == rows


async def test_a_task_with_one_class(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    """It is remarked, and runs all the same, as free text: there is nothing to balance or to elect."""
    examples = [{"input": "Warm soup.", "output": "Positive"}, {"input": "A fast train.", "output": "Positive"}]
    instances = [{"input": "A clean room.", "output": "Positive"}]
    task = {"instruction": "Judge the review.", "examples": examples, "instances": instances, "kind": "classification"}
    path = tmp_path / "one.json"
    path.write_text(json.dumps(task))
    loaded = load_task(path)
    assert loaded.labels == ("Positive",)
    assert any("too few labels are found in examples (1): declare labels" in remark for remark in loaded.remarks)
    async with open_simulated() as session:
        run = session.task_run(loaded, RunStore(tmp_path / "run"), lambda *_: None)
        candidates = await synthesize(run)
        kept = await curate(run, candidates)
        document = await evaluate_tasks([loaded], session.recipe, tmp_path / "run", session=session)
    assert all(row["label"] is None for row in candidates.rows())
    assert kept.marker["ledger"]["accepted"] > 1
    assert document["tasks"][0]["scores"]["base"]["exact_match"]["n"] == 1
