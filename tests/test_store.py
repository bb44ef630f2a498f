"""The run folder outlives kills, full disks and second writers, and says what made every stage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfguide.errors import UserError
from selfguide.records import Ledger, row_id, row_seed
from selfguide.store import SHARD_ROWS, Artifact, RunStore, Stage, TaskStore

SCHEMA = pa.schema([("row", pa.int32()), ("state", pa.string()), ("text", pa.string())])
MADE_BY = {"seed": 0, "synthesis": {"lag": 8, "stop": ["\n"]}}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


@pytest.fixture
def stage(store: RunStore) -> Stage:
    return store.task("colours").stage("synthesis", MADE_BY)


def again(stage: Stage) -> Stage:
    """The same stage as another process sees it."""
    return TaskStore(stage.path.parent.parent).stage(stage.name, MADE_BY)


def rows(start: int, end: int, text: str = "text") -> list[dict[str, Any]]:
    return [{"row": row, "state": "accepted", "text": f"{text} {row}"} for row in range(start, end)]


def finish(stage: Stage) -> Artifact:
    done = stage.committed()
    return stage.finish(None, SCHEMA, Ledger.of([row | {"filter": None} for row in done]), note="a fact")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what made a stage


def test_a_fingerprint_is_what_made_the_stage_in_any_order(store: RunStore, stage: Stage) -> None:
    turned = {"synthesis": {"stop": ["\n"], "lag": 8}, "seed": 0}
    assert store.task("colours").stage("synthesis", turned).fingerprint == stage.fingerprint
    assert RunStore(store.root).task("colours").stage("synthesis", MADE_BY).path == stage.path


@pytest.mark.parametrize(
    "made_by",
    [
        {**MADE_BY, "seed": 1},
        {**MADE_BY, "synthesis": {"lag": 9, "stop": ["\n"]}},
        {**MADE_BY, "synthesis": {"lag": 8, "stop": []}},
        {**MADE_BY, "synthesis": {"lag": 8}},
        {**MADE_BY, "more": None},
    ],
)
def test_a_fingerprint_changes_with_whatever_made_the_stage(
    store: RunStore, stage: Stage, made_by: dict[str, Any]
) -> None:
    assert store.task("colours").stage("synthesis", made_by).fingerprint != stage.fingerprint


def test_a_fingerprint_follows_the_rows_of_its_inputs_not_their_place(store: RunStore, tmp_path: Path) -> None:
    def fed(*digests: str, at: str = "a") -> str:
        inputs = [Artifact("synthesis", tmp_path / at, digest, {}) for digest in digests]
        return store.task("colours").stage("curation", MADE_BY, inputs).fingerprint

    assert fed("1") == fed("1", at="b")
    assert len({fed(), fed("1"), fed("2"), fed("1", "2"), fed("2", "1")}) == 5


def test_stages_and_tasks_have_folders_of_their_own(store: RunStore) -> None:
    places = [store.task(task).stage(name, MADE_BY).path for task in ("a", "b") for name in ("synthesis", "curation")]
    assert len(set(places)) == 4


@given(st.lists(st.text(max_size=300) | st.sampled_from(["..", ".", "../x", "a/b", "a_b", "A"]), unique=True))
@settings(max_examples=100, deadline=None)
def test_a_tasks_name_cannot_lead_out_of_the_run_folder(names: list[str]) -> None:
    store = RunStore.__new__(RunStore)
    store.root = Path("/run")
    places = [store.task(name).root for name in names]
    assert all(place.parent == Path("/run/tasks") and place.name not in ("", ".", "..") for place in places)
    assert len(set(places)) == len(names)


def test_ids_and_seeds_belong_to_the_row() -> None:
    parts = [(task, purpose, row) for task in ("a", "b") for purpose in ("input", "output") for row in range(50)]
    seeds = {row_seed(run, *part) for run in (0, 1) for part in parts}
    assert len(seeds) == 2 * len(parts)
    assert row_seed(0, "a", "input", 3) == row_seed(0, "a", "input", 3) != row_seed(0, "a", "input", 3, attempt=1)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert len({row_id(task, purpose, "f" * 16, row) for task, purpose, row in parts}) == len(parts)


# ---- shards


def test_shards_come_back_in_order_up_to_the_first_gap(stage: Stage) -> None:
    with stage.writing():
        for start in (0, SHARD_ROWS, 3 * SHARD_ROWS):
            stage.commit(rows(start, start + SHARD_ROWS), SCHEMA)
        assert again(stage).committed() == rows(0, 2 * SHARD_ROWS)
        stage.commit(rows(2 * SHARD_ROWS, 3 * SHARD_ROWS), SCHEMA)
        stage.commit(rows(4 * SHARD_ROWS, 4 * SHARD_ROWS + 5), SCHEMA)
    assert again(stage).committed() == rows(0, 4 * SHARD_ROWS + 5)


def test_a_committed_shard_is_never_written_again(stage: Stage) -> None:
    with stage.writing():
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
        with pytest.raises(UserError, match="this one stops"):
            stage.commit(rows(0, SHARD_ROWS, "other"), SCHEMA)
    assert stage.committed() == rows(0, SHARD_ROWS)
    assert not [name for name in files(stage.work) if name.endswith(".part")]


def test_half_a_file_never_counts(stage: Stage) -> None:
    with stage.writing():
        whole = stage.work / "rows-00000000.parquet"
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
        part = stage.work / ".rows-00000064.parquet.77.part"
        part.write_bytes(whole.read_bytes()[:100])
        assert again(stage).committed() == rows(0, SHARD_ROWS)
        stage.commit(rows(SHARD_ROWS, SHARD_ROWS + 1), SCHEMA)
    assert again(stage).committed() == rows(0, SHARD_ROWS + 1)


# ---- the end of a stage


def test_a_finished_stage_is_three_files(stage: Stage) -> None:
    stage.path.mkdir(parents=True)
    # What a process leaves that was killed as it finished.
    for name in (".done.json.77.part", ".rows.parquet.78.part", "rows.parquet", "events.jsonl"):
        (stage.path / name).write_text("half")
    with stage.writing():
        stage.commit(rows(0, 3), SCHEMA)
        artifact = finish(stage)
    assert files(stage.path) == {"rows.parquet", "events.jsonl", "done.json"}
    assert artifact.rows() == rows(0, 3)
    assert artifact.digest == hashlib.sha256(artifact.rows_path.read_bytes()).hexdigest()
    assert again(stage).done == artifact
    assert again(stage).fingerprint == artifact.marker["fingerprint"]
    assert artifact.marker["ledger"]["accepted"] == 3
    assert artifact.marker["note"] == "a fact"
    assert [event["event"] for event in again(stage).events()] == ["begin", "end"]


def test_equal_rows_have_equal_digests(store: RunStore) -> None:
    digests = set()
    for seed in (1, 2):
        stage = store.task("colours").stage("synthesis", {"seed": seed})
        with stage.writing():
            stage.commit(rows(0, 9), SCHEMA)
            digests.add(finish(stage).digest)
    assert len(digests) == 1


def test_weights_stay_beside_the_three_files(stage: Stage) -> None:
    with stage.writing():
        (stage.path / "weights").mkdir()
        stage.commit(rows(0, 3), SCHEMA)
        finish(stage)
    assert files(stage.path) == {"rows.parquet", "events.jsonl", "done.json", "weights"}


def test_a_file_that_a_worker_wrote_becomes_the_rows(stage: Stage) -> None:
    with stage.writing():
        written = stage.work / "judged.parquet"
        stage.commit(rows(0, 2), SCHEMA)
        (stage.work / "rows-00000000.parquet").rename(written)
        artifact = stage.finish(written, None, Ledger(2, 2, {}, {}))
    assert artifact.rows() == rows(0, 2)
    assert len(files(stage.path)) == 3


def test_a_stage_names_what_it_was_made_from(store: RunStore, stage: Stage) -> None:
    with stage.writing():
        stage.commit(rows(0, 3), SCHEMA)
        synthesis = finish(stage)
    next_stage = store.task("colours").stage("curation", MADE_BY, [synthesis])
    with next_stage.writing():
        next_stage.commit(rows(0, 2), SCHEMA)
        curation = finish(next_stage)
    assert curation.marker["inputs"] == [f"synthesis/{stage.fingerprint}"]
    assert [one.stage for one in store.task("colours").artifacts()] == ["synthesis", "curation"]
    assert [task.root.name for task in RunStore(store.root).tasks()] == ["colours"]


# ---- events


def test_a_torn_event_costs_that_event_alone(stage: Stage) -> None:
    with stage.writing():
        stage.log({"event": "engine_died", "rows": ["a"]})
    path = stage.work / "events.jsonl"
    for torn in (b'{"time": 1, "event": "sh', b'{"time": 1, "a": {"b": 2}'):
        with path.open("ab") as file:
            file.write(torn)
        with again(stage).writing():
            pass
    assert [event["event"] for event in stage.events()] == ["begin", "engine_died", "begin", "begin"]
    assert stage.suspects() == {"a"}


def test_tokens_add_up_over_the_processes_that_worked_on_a_stage(stage: Stage) -> None:
    for spent in (10, 7):
        with again(stage).writing():
            again(stage).log({"event": "shard", "prompt_tokens": spent - 1, "output_tokens": 1})
            again(stage).log({"event": "shard", "prompt_tokens": spent, "output_tokens": 2})
    assert stage.tokens() == {"prompt_tokens": 17, "output_tokens": 4, "cached_tokens": 0}


# ---- one writer

WRITER = """
import os, sys
from pathlib import Path
from selfguide.errors import UserError
from selfguide.records import Ledger
sys.path.insert(0, {tests!r})
from test_store import MADE_BY, SCHEMA, finish, rows
from selfguide.store import TaskStore
stage = TaskStore(Path({root!r})).stage("synthesis", MADE_BY)
{script}
"""
HOLD = """
with stage.writing():
    print("holds", flush=True)
    for command in sys.stdin:
        try:
            stage.commit(rows(0, 64, "zombie"), SCHEMA) if command == "commit\\n" else finish(stage)
            print("done", flush=True)
        except UserError as error:
            print(error, flush=True)
"""
DIES_AS_IT_COMMITS = """
with stage.writing():
    stage.commit(rows(0, 64), SCHEMA)
    os.link = lambda *_: os._exit(9)
    stage.commit(rows(64, 128), SCHEMA)
"""
DIES_AS_IT_FINISHES = """
with stage.writing():
    stage.commit(rows(0, 64), SCHEMA)
    replace = Path.replace
    Path.replace = lambda path, to: os._exit(9) if to.name == "done.json" else replace(path, to)
    finish(stage)
"""
Writer = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def writer(stage: Stage) -> Iterator[Writer]:
    """Starts another process that works on `stage`."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        code = WRITER.format(tests=str(Path(__file__).parent), root=str(stage.path.parent.parent), script=script)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], command: str = "") -> str:
    """Sends the command, waits for the line that comes back."""
    assert process.stdin
    assert process.stdout
    if command:
        process.stdin.write(f"{command}\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_stage_has_one_writer_at_a_time(stage: Stage, store: RunStore, writer: Writer) -> None:
    other = writer(HOLD)
    assert tell(other) == "holds"
    with pytest.raises(UserError, match=f"another process is at work here .*{other.pid}"), stage.writing():
        raise AssertionError("two writers")
    with pytest.raises(UserError, match="another process is at work here"):
        store.task("colours").retire("synthesis")
    assert tell(other, "commit") == "done"
    other.kill()
    other.wait()
    with stage.writing():  # a dead holder is succeeded, and what it committed stays
        assert stage.committed() == rows(0, 64, "zombie")


def test_a_writer_that_was_succeeded_can_change_nothing(stage: Stage, writer: Writer) -> None:
    """As it looks to a zombie: its lease names a process that started at another time, so it was taken for dead."""
    other = writer(HOLD)
    assert tell(other) == "holds"
    lease = stage.work / "lease-1"
    lease.write_text(json.dumps({**json.loads(lease.read_text()), "started": "1"}))
    with stage.writing():
        assert not lease.exists()
        assert "taken this stage over" in tell(other, "commit")
        assert "taken this stage over" in tell(other, "finish")
        stage.commit(rows(0, 64), SCHEMA)
        assert stage.committed() == rows(0, 64)
        finish(stage)
    assert "taken this stage over" in tell(other, "finish")
    assert stage.done
    assert stage.done.rows() == rows(0, 64)


@pytest.mark.parametrize("script", [DIES_AS_IT_COMMITS, DIES_AS_IT_FINISHES])
def test_a_kill_loses_nothing_that_was_committed(stage: Stage, writer: Writer, script: str) -> None:
    assert writer(script).wait() == 9
    assert stage.done is None
    with stage.writing():
        assert stage.committed() == rows(0, 64)
        stage.commit(rows(64, 70), SCHEMA)
        assert finish(stage).rows() == rows(0, 70)
    assert len(files(stage.path)) == 3


def test_in_one_process_the_newer_writer_fences_off_the_older(stage: Stage) -> None:
    newer = again(stage)
    with stage.writing(), newer.writing():
        for act in (lambda: stage.commit(rows(0, 1), SCHEMA), lambda: finish(stage)):
            with pytest.raises(UserError, match="taken this stage over"):
                act()
        newer.commit(rows(0, 2), SCHEMA)
    assert stage.committed() == rows(0, 2)


def test_a_holder_on_another_host_is_alive_while_its_heart_beats(stage: Stage) -> None:
    stage.work.mkdir(parents=True)
    lease = stage.work / "lease-4"
    lease.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "started": "1"}))
    with pytest.raises(UserError, match=r"another process is at work here .*elsewhere"), stage.writing():
        raise AssertionError("two writers")
    silent = time.time() - 3600
    os.utime(lease, (silent, silent))
    with stage.writing():
        assert files(stage.work) >= {"lease-5"}
        assert not lease.exists()


def test_leaving_gives_the_lease_back(stage: Stage) -> None:
    with pytest.raises(RuntimeError), stage.writing():
        raise RuntimeError
    assert not [name for name in files(stage.work) if name.startswith("lease-")]


# ---- --force


def test_retire_sets_a_stage_aside_and_keeps_it(store: RunStore, stage: Stage) -> None:
    with stage.writing():
        stage.commit(rows(0, 3), SCHEMA)
        finish(stage)
    task = store.task("colours")
    assert task.retire("curation") == 0
    assert task.retire("synthesis") == 1
    assert again(stage).done is None
    assert task.artifacts() == []
    with again(stage).writing():
        again(stage).log({"event": "begun anew"})
    assert (task.retire("synthesis"), task.retire("synthesis")) == (1, 0)
    kept = [path for path in stage.path.parent.glob("*.replaced-*") if (path / "rows.parquet").is_file()]
    assert len(kept) == 1


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, *, leave_bytes: int = 0) -> Path:
    """A file that takes all the space there is."""
    path = disk / "ballast"
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - leave_bytes)
    return path


@pytest.mark.parametrize("leave_bytes", [0, 4096, 8192, 12288])
def test_a_full_disk_is_said_in_one_line_and_loses_nothing(small_disk: Path, leave_bytes: int) -> None:
    stage = RunStore(small_disk / "run").task("colours").stage("synthesis", MADE_BY)
    with stage.writing():
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
    ballast = fill(small_disk, leave_bytes=leave_bytes)

    def log_much() -> None:
        for _ in range(9):
            stage.log({"event": "shard", "text": "x" * 8000})

    for act in (
        lambda: stage.commit(rows(SHARD_ROWS, 2 * SHARD_ROWS, os.urandom(9000).hex()), SCHEMA),
        log_much,
        lambda: finish(stage),
        lambda: RunStore(small_disk / "other"),
    ):
        with pytest.raises(UserError, match="No space left") as error, stage.writing():
            act()
        assert len(str(error.value).splitlines()) == 1
    assert not [name for name in files(stage.work) if name.endswith(".part")]
    ballast.unlink()
    fresh = again(stage)
    with fresh.writing():
        assert fresh.committed() == rows(0, SHARD_ROWS)
        fresh.commit(rows(SHARD_ROWS, SHARD_ROWS + 1), SCHEMA)
        assert finish(fresh).rows() == rows(0, SHARD_ROWS + 1)
    assert len(files(stage.path)) == 3


def test_a_read_only_disk_is_said_in_one_line_and_loses_nothing(small_disk: Path) -> None:
    stage = RunStore(small_disk / "run").task("colours").stage("synthesis", MADE_BY)
    with stage.writing():
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        for act in (
            lambda: stage.commit(rows(SHARD_ROWS, SHARD_ROWS + 1), SCHEMA),
            lambda: stage.log({"event": "shard"}),
            lambda: finish(stage),
            lambda: again(stage).writing().__enter__(),
            lambda: TaskStore(stage.path.parent.parent).retire("synthesis"),
            lambda: RunStore(small_disk / "other"),
        ):
            with pytest.raises(UserError, match="Read-only file system"):
                act()
        assert again(stage).committed() == rows(0, SHARD_ROWS)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with stage.writing():
        assert finish(stage).rows() == rows(0, SHARD_ROWS)


# ---- run folders


def test_a_folder_that_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match="is not empty and no run folder"):
        RunStore(tmp_path / "mine")
    assert files(tmp_path / "mine") == {"thesis.txt"}
    for create in (True, False):
        with pytest.raises(UserError, match="cannot be used as a run folder"):
            RunStore(tmp_path / "mine" / "thesis.txt", create=create)
    (tmp_path / "empty").mkdir()
    RunStore(tmp_path / "empty")


@pytest.mark.parametrize("content", ['{"format": 999}', "{}", "[]", "half", "", b"\xff"])
def test_a_run_folder_of_another_format_is_refused(store: RunStore, content: str | bytes) -> None:
    (store.root / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="another") as error:
        RunStore(store.root)
    assert len(str(error.value).splitlines()) == 1
