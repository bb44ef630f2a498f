"""Run folders in an object store: a real S3 server on loopback, real processes, kills, and a server that goes away."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from benchmarks.kill_drill import Driver, run_command
from engines import adapter_cache, files
from engines.adapter_cache import bring_near, touch
from engines.adapters import BadAdapter
from engines.files import AnyPath, Url, cache_folder, folder_bytes, locate, send_folder
from engines.remote_training import train_by_url
from engines.sft import Finetuner
from engines.types import AdapterRef, Completion, Request, Sampling, TrainResult, TrainSpec
from selfguide import api
from selfguide.api import Session
from selfguide.cli import app
from selfguide.doctor.case import Case
from selfguide.doctor.hardware import check_disk
from selfguide.errors import UserError
from selfguide.recipefile import load_recipe
from selfguide.report import write_report
from selfguide.store import SHARD_ROWS, Journal, RunStore, Stage, TaskStore, leases
from selfguide.sweep import run_jobs
from selfguide.sweep.plan import plan_sweep
from selfguide.tasks import load_task
from tests.conftest import REAL_TRAINING
from tests.test_store import HOLD, MADE_BY, SCHEMA, Writer, again, finish, rows, tell

# Before Ray starts: its processes inherit them.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
SENTIMENT = Path(__file__).parent.parent / "selfguide" / "examples" / "sentiment.json"
WriteLora = Callable[..., AdapterRef]
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]


def start_server(port: int = 0) -> ThreadedMotoServer:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    server = start_server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def options(server: ThreadedMotoServer) -> str:
    return f"endpoint_override=127.0.0.1:{server.get_host_and_port()[1]}&scheme=http&region=us-east-1"


@pytest.fixture
def root(options: str, request: pytest.FixtureRequest) -> Url:
    """A run folder of the test's own, in a bucket that is there."""
    from pyarrow.fs import FileSystem

    FileSystem.from_uri(f"s3://runs?{options}&allow_bucket_creation=true")[0].create_dir("runs")
    url = locate(f"s3://runs/{abs(hash(request.node.nodeid))}?{options}")
    assert isinstance(url, Url)
    return url


@pytest.fixture
def stage(root: Url) -> Stage:
    return RunStore(root).task("colours").stage("synthesis", MADE_BY)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selfguide" / "adapters"


def names(folder: Url) -> list[str]:
    return [info.path[len(folder.path) + 1 :] for info in folder.infos() if info.is_file]


# ---- URLs


def test_a_url_reads_as_a_path_does(root: Url) -> None:
    for name in ("a/b/1.json", "a/c/2.json", "a/c/x/2.json", "3.json"):
        (root / name).write_bytes(name.encode())
    assert [path.path[len(root.path) + 1 :] for path in root.glob("a/*/*.json")] == ["a/b/1.json", "a/c/2.json"]
    assert {path.name for path in root.glob("a/*")} == {"b", "c"}
    assert (root / "a").is_dir()
    assert not (root / "a").is_file()
    assert not (root / "b").is_dir()
    assert (root / "a/b/1.json").read_text() == "a/b/1.json"
    assert (root / "a" / "b").parent == root / "a"
    assert folder_bytes(root) == sum(map(len, names(root)))
    with pytest.raises(FileNotFoundError):
        (root / "none").read_bytes()
    (root / "none").unlink(missing_ok=True)
    assert locate(str(root)) == root


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/folder", "unknown kind of URL"),
        ("s3://bucket", "names no folder in the bucket"),
        ("s3:///folder", "names no bucket"),
        ("s3://me:hush@bucket/folder", "must not hold credentials"),
        ("s3://bucket/folder?secret_key=hush", "unknown option secret_key"),
    ],
)
def test_what_is_no_place_is_refused_and_secrets_are_not_repeated(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        locate(text)
    assert "hush" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_path_is_a_path() -> None:
    assert locate("runs/a") == Path("runs/a")
    assert locate("file:///tmp/a") == Path("/tmp/a")
    assert locate(Path("x")) == Path("x")


def test_a_missing_bucket_is_said_in_one_line(options: str) -> None:
    with pytest.raises(UserError, match="there is no such bucket; make it") as error:
        RunStore(locate(f"s3://absent/run?{options}"))
    assert len(str(error.value).splitlines()) == 1


# ---- stages


def test_a_finished_stage_is_three_objects_as_on_a_disk(stage: Stage, tmp_path: Path) -> None:
    local = RunStore(tmp_path / "run").task("colours").stage("synthesis", MADE_BY)
    for one in (stage, local):
        with one.writing():
            one.commit(rows(0, SHARD_ROWS), SCHEMA)
            one.log({"event": "shard", "rows": SHARD_ROWS})
            one.commit(rows(SHARD_ROWS, SHARD_ROWS + 3), SCHEMA)
            finish(one)
    assert names(stage.path) == ["done.json", "events.jsonl", "rows.parquet"]
    assert stage.done
    assert local.done
    assert stage.done.digest == local.done.digest
    assert again(stage).done == stage.done
    assert stage.done.rows() == rows(0, SHARD_ROWS + 3)
    assert [event["event"] for event in again(stage).events()] == ["begin", "shard", "end"]
    assert [one.stage for one in TaskStore(stage.path.parent.parent).artifacts()] == ["synthesis"]


def test_damaged_rows_are_named(stage: Stage) -> None:
    with stage.writing():
        stage.commit(rows(0, 3), SCHEMA)
        finish(stage)
    (stage.path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"rows.parquet.* is damaged"):
        _ = again(stage).done


def test_a_shard_is_never_written_again(stage: Stage) -> None:
    with stage.writing():
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
        with pytest.raises(UserError, match="written already"):
            stage.commit(rows(0, SHARD_ROWS, "other"), SCHEMA)
    assert again(stage).committed() == rows(0, SHARD_ROWS)


def test_a_death_is_written_down_at_once_and_other_events_with_the_next_shard(stage: Stage) -> None:
    with stage.writing():
        stage.log({"event": "shard", "output_tokens": 5})
        assert again(stage).events() == []
        stage.log({"event": "engine_died", "rows": ["a"]})
        assert [event["event"] for event in again(stage).events()] == ["begin", "shard", "engine_died"]
        assert again(stage).suspects() == {"a"}
        stage.log({"event": "shard", "output_tokens": 7})
    with again(stage).writing():  # leaving has written the rest
        pass
    assert again(stage).tokens()["output_tokens"] == 7
    assert [event["epoch"] for event in again(stage).events() if event["event"] == "begin"] == [1, 2]


def test_retired_stages_keep_their_objects(stage: Stage) -> None:
    with stage.writing():
        stage.commit(rows(0, 3), SCHEMA)
        finish(stage)
    task = TaskStore(stage.path.parent.parent)
    assert (task.retire("synthesis"), task.retire("synthesis")) == (1, 0)
    assert again(stage).done is None
    assert task.artifacts() == []
    assert sum(name.endswith("rows.parquet") for name in names(task.root)) == 1


def test_a_journal_keeps_the_order_of_its_writers(root: Url, tmp_path: Path) -> None:
    for path in (root / "journal.jsonl", tmp_path / "journal.jsonl"):
        for writer in range(2):
            journal = Journal(path)
            for number in range(3):
                journal.append({"event": "x", "writer": writer, "number": number}, durable=number != 1)
        read = Journal(path).read()
        assert [(one["writer"], one["number"]) for one in read] == [(w, n) for w in range(2) for n in range(3)]


# ---- one writer

CODE = """
import sys, time
from selfguide.errors import UserError
sys.path.insert(0, {tests!r})
from test_store import MADE_BY, SCHEMA, finish, rows
from engines.files import locate
from selfguide.store import TaskStore
stage = TaskStore(locate({root!r})).stage("synthesis", MADE_BY)
{script}
"""
RACE = """
print("ready", flush=True)
sys.stdin.readline()
try:
    with stage.writing():
        print("holds", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture
def writer(stage: Stage) -> Iterator[Writer]:
    """Starts another process that works on `stage`."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        code = CODE.format(tests=str(Path(__file__).parent), root=str(stage.path.parent.parent), script=script)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_stage_has_one_writer_at_a_time(stage: Stage, root: Url, writer: Writer) -> None:
    other = writer(HOLD)
    assert tell(other) == "holds"
    with pytest.raises(UserError, match=f"another process is at work here .*{other.pid}"), stage.writing():
        raise AssertionError("two writers")
    with pytest.raises(UserError, match="another process is at work here"):
        RunStore(root).task("colours").retire("synthesis")
    assert [alive for _, alive in leases(root)] == [True]
    assert tell(other, "commit") == "done"
    other.kill()
    other.wait()
    assert [alive for _, alive in leases(root)] == [False]
    with stage.writing():  # a dead holder is succeeded, and what it committed stays
        assert stage.committed() == rows(0, 64, "zombie")
        assert finish(stage).rows() == rows(0, 64, "zombie")
    assert leases(root) == []


def test_of_two_that_claim_at_the_same_moment_at_most_one_begins(stage: Stage, writer: Writer) -> None:
    contenders = [writer(RACE) for _ in range(3)]
    assert [tell(one) for one in contenders] == ["ready"] * 3
    for one in contenders:
        assert one.stdin
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.stdout.readline().strip() for one in contenders if one.stdout]
    assert said.count("holds") <= 1
    assert all("another process" in line for line in said if line != "holds")
    for one in contenders:
        one.kill()
        one.wait()
    with stage.writing():
        assert [event["event"] for event in stage.events()][-1] == "begin"


def test_a_writer_that_was_taken_for_dead_changes_nothing_that_counts(stage: Stage, writer: Writer) -> None:
    other = writer(HOLD)
    assert tell(other) == "holds"
    [claim] = stage.work.glob("lease-*")
    claim.write_bytes(json.dumps({**json.loads(claim.read_bytes()), "started": "1"}).encode())
    with stage.writing():
        assert "taken this stage over" in tell(other, "commit")
        claim.write_bytes(b"{}")  # as its own heartbeat would, had it looked just before it was succeeded
        assert "taken this stage over" in tell(other, "finish")
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
        # What a PUT that was under way all the while leaves:
        late = (stage.work / "rows-00000000-000002.parquet").read_bytes()
        (stage.work / "rows-00000000-000001.parquet").write_bytes(late)
        (stage.work / "rows-00000064-000001.parquet").write_bytes(late)
        assert again(stage).committed() == rows(0, SHARD_ROWS)
        assert finish(stage).rows() == rows(0, SHARD_ROWS)
    assert names(stage.path) == ["done.json", "events.jsonl", "rows.parquet"]


# ---- a server that goes away


def test_a_store_that_dies_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    server = start_server()
    port = server.get_host_and_port()[1]
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    from pyarrow.fs import FileSystem

    FileSystem.from_uri(f"s3://short?{options}&allow_bucket_creation=true")[0].create_dir("short")
    stage = RunStore(locate(f"s3://short/run?{options}")).task("colours").stage("synthesis", MADE_BY)
    with stage.writing():
        stage.commit(rows(0, SHARD_ROWS), SCHEMA)
        server.stop()
        with pytest.raises(UserError, match="the store does not answer; check endpoint_override") as error:
            stage.commit(rows(SHARD_ROWS, 2 * SHARD_ROWS), SCHEMA)
    assert len(str(error.value).splitlines()) == 1
    server = start_server(port)  # moto's objects live in its process, as those of a store outlive a failed network
    with stage.writing():
        assert stage.committed() == rows(0, SHARD_ROWS)
    server.stop()


# ---- adapters on a node


@pytest.fixture
def remote(root: Url, cache: Path, write_lora: WriteLora, tmp_path: Path) -> Callable[[int], AdapterRef]:
    """Adapters that are in the store alone."""

    def make(seed: int) -> AdapterRef:
        ref = write_lora(tmp_path / f"lora-{seed}", seed)
        send_folder(Path(ref.url), root / f"lora-{seed}")
        return replace(ref, url=str(root / f"lora-{seed}"))

    return make


def test_an_adapter_is_fetched_once_and_shared(remote: Callable[[int], AdapterRef], cache: Path) -> None:
    ref = remote(0)
    found: list[AdapterRef] = []
    threads = [threading.Thread(target=lambda: found.append(bring_near(ref, 1.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [replace(ref, url=str(cache / ref.digest))] * 4
    assert [path.name for path in cache.iterdir()] == [ref.digest]
    weights = cache / ref.digest / "adapter_model.safetensors"
    first = weights.stat().st_ino
    assert bring_near(ref, 1.0) == found[0]
    assert weights.stat().st_ino == first
    local = replace(ref, url=str(cache.parent / "mine"))
    assert bring_near(local, 1.0) == local


def test_a_damaged_adapter_is_fetched_again(
    remote: Callable[[int], AdapterRef], root: Url, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = remote(1)
    weights = cache / ref.digest / "adapter_model.safetensors"
    whole = (root / "lora-1" / weights.name).read_bytes()
    bring_near(ref, 1.0)
    weights.write_bytes(whole[:-100])  # a node that went down
    bring_near(ref, 1.0)
    assert weights.read_bytes() == whole
    weights.unlink()
    fetch, cut = files.fetch_folder, [True]

    def fetch_cut(source: Url, target: Path) -> None:
        fetch(source, target)
        if cut and cut.pop():
            (target / weights.name).write_bytes(whole[:-100])

    monkeypatch.setattr(adapter_cache, "fetch_folder", fetch_cut)
    bring_near(ref, 1.0)
    assert weights.read_bytes() == whole
    weights.unlink()
    (root / "lora-1" / weights.name).write_bytes(whole[:-100])
    with pytest.raises(BadAdapter, match="its weights are not those that were trained"):
        bring_near(ref, 1.0)
    assert not list(cache.iterdir())


def test_an_adapter_that_cannot_be_fetched_is_the_rows_failure(root: Url, cache: Path) -> None:
    with pytest.raises(BadAdapter, match=r"its weights are not those"):
        bring_near(AdapterRef("0" * 64, str(root / "nothing"), 4, ""), 1.0)


def test_the_cache_drops_what_was_used_longest_ago(remote: Callable[[int], AdapterRef], cache: Path) -> None:
    refs = [remote(seed) for seed in range(2, 6)]
    for number, ref in enumerate(refs[:3]):
        bring_near(ref, 1.0)
        os.utime(cache / ref.digest, (number, number))
    assert touch(cache / refs[0].digest)  # in use again
    size_gib = folder_bytes(cache / refs[0].digest) / 2**30
    bring_near(refs[3], 2.5 * size_gib)
    assert {path.name for path in cache.iterdir()} == {refs[0].digest, refs[3].digest}
    assert not touch(cache / refs[1].digest)
    assert touch(cache.parent / "elsewhere")


async def test_vllm_reads_an_adapter_from_the_store(
    vllm_session: Session, write_lora: WriteLora, root: Url, tmp_path: Path
) -> None:
    """The engine's process keeps its cache where it was started: the node's own."""
    ref = write_lora(tmp_path / "lora", 77)
    send_folder(Path(ref.url), root / "lora")
    shutil.rmtree(ref.url)
    ref = replace(ref, url=str(root / "lora"))
    sampling, answers = Sampling(temperature=0.0, max_tokens=8), []
    for adapter in (ref, None):
        request = Request("row", [70] * 30, sampling, adapter)
        [answer] = [one async for one in vllm_session.pool.generate([request])]
        assert isinstance(answer, Completion), answer
        answers.append(answer.samples)
    assert answers[0] != answers[1]
    shutil.rmtree(cache_folder() / "adapters" / ref.digest)


# ---- training on a node that may be lost


class TwoEpochs:
    """Stands in for TRL: two steps with a checkpoint each. Its node goes down after step `last`."""

    def __init__(self, last: int) -> None:
        self.found: list[str] = []
        self._last = last

    def train(self, spec: TrainSpec, rows: Path, work: Path, saved: Callable[[Path], None]) -> TrainResult:
        assert rows.read_bytes() == b"rows"
        self.found = sorted(path.name for path in work.glob("checkpoint-*"))
        for step in range(len(self.found) + 1, 3):
            folder = work / f"checkpoint-{step}"
            for name in ("adapter_model.safetensors", "inner/optimizer.pt", "trainer_state.json"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"{step} {name}")
            (work / f"logprobs-{step}.json").write_text("[]")
            with (work / "progress.jsonl").open("a") as file:
                file.write(f"{step}\n")
            if not spec.keep_epochs and step > 1:
                shutil.rmtree(work / f"checkpoint-{step - 1}")
            saved(folder)
            if step == self._last:
                raise InterruptedError
        assert {path.name for path in work.glob("logprobs-*.json")} == {"logprobs-1.json", "logprobs-2.json"}
        (work / "epoch-2").mkdir()
        (work / "epoch-2" / "adapter_model.safetensors").write_text("final")
        ref = AdapterRef("d", str(work / "epoch-2"), 4, "")
        return TrainResult((ref,), (), 0, 0, 2, 2, 1, 0.0, ())


@pytest.mark.parametrize("keep_epochs", [False, True])
def test_another_node_goes_on_from_the_last_checkpoint(
    root: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_epochs: bool
) -> None:
    (root / "train.parquet").write_bytes(b"rows")
    spec, work = TrainSpec("model", "", keep_epochs=keep_epochs), root / "trainer"
    first, second = TwoEpochs(1), TwoEpochs(9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lost"))
    with pytest.raises(InterruptedError):
        train_by_url(cast(Finetuner, first), spec, root / "train.parquet", work)
    half = work / "checkpoint-2" / "adapter_model.safetensors"  # what a kill leaves of a checkpoint
    half.write_bytes(b"half")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    result = train_by_url(cast(Finetuner, second), spec, root / "train.parquet", work)
    assert (first.found, second.found) == ([], ["checkpoint-1"])
    assert [one.url for one in result.checkpoints] == [str(work / "epoch-2")]
    assert (work / "epoch-2" / "adapter_model.safetensors").read_text() == "final"
    assert (work / "progress.jsonl").read_text() == "1\n2\n"
    kept = {name.split("/")[0] for name in names(work) if name.startswith("checkpoint-")}
    assert kept == ({"checkpoint-1", "checkpoint-2"} if keep_epochs else {"checkpoint-2"})
    assert (work / "checkpoint-2" / "inner" / "optimizer.pt").read_text() == "2 inner/optimizer.pt"
    assert not list((tmp_path / "other" / "selfguide" / "trainers").iterdir())


# ---- whole runs

SLOW = {"engine.kind": "simulated", "engine.tokens_per_s": 20}
ROWS = {"synthesis.target_rows": None, "synthesis.num_candidates": 200}  # as the drill sets them


def stored_rows(folder: AnyPath) -> dict[tuple[str, str], list[dict[str, Any]]]:
    artifacts = RunStore(folder, create=False).task("sentiment").artifacts()
    return {(one.stage, one.path.name): one.rows() for one in artifacts}


async def test_a_run_in_a_store_killed_and_resumed_equals_a_local_one(
    open_simulated: OpenSimulated, random_student: Path, root: Url, tmp_path: Path
) -> None:
    settings = [f"{key}={value}" for key, value in SLOW.items()]
    driver = Driver(run_command(SENTIMENT, settings, str(random_student)), tmp_path / "log", str(root))
    while not (shards := [*root.glob("tasks/*/synthesis/*/work/rows-*")]):
        assert not driver.ended, driver.log.read_text()
    assert driver.kill("driver")
    driver.bury()
    committed = Stage("synthesis", shards[0].parents[1], {}, []).committed()
    assert 0 < len(committed) < 200
    async with open_simulated(**ROWS, **REAL_TRAINING) as session:
        task = load_task(SENTIMENT)
        await api.run(task, session.recipe, str(root), session=session)
        await api.run(task, session.recipe, tmp_path / "local", session=session)
    found, local = stored_rows(root), stored_rows(tmp_path / "local")
    assert {stage for stage, _ in found} >= {"synthesis", "curation", "finetuning", "evaluation", "comparison"}
    assert found == local
    [synthesis] = [rows for (stage, _), rows in found.items() if stage == "synthesis"]
    assert synthesis[: len(committed)] == committed
    assert not [name for name in names(root) if "/work/" in name]
    check_report(root, tmp_path / "local")


def check_report(root: Url, local: Path) -> None:
    said = CliRunner().invoke(app, ["report", str(root)])
    assert said.exit_code == 0, said.output
    assert (root / "report.md").read_text() in said.output
    documents = [json.loads((root / "report.json").read_bytes()), write_report(local)[0]]
    scores = [[line["methods"] for line in one["tasks"][0]["lines"]] for one in documents]
    assert scores[0] == json.loads(json.dumps(scores[1]))


@pytest.mark.parametrize(
    ("place", "level", "said"),
    [
        ("s3://runs/doctor?{options}", "ok", "can be listed, written, read and removed from"),
        ("s3://absent/doctor?{options}", "error", "there is no such bucket"),
    ],
)
def test_the_doctor_tries_the_store(root: Url, options: str, place: str, level: str, said: str) -> None:
    out = locate(place.format(options=options))
    case = Case(load_recipe("smoke"), out)
    [finding] = [one for one in check_disk(case) if one.check == "storage"]
    assert (finding.level, bool(finding.remedy)) == (level, level == "error")
    assert said in finding.found
    assert "probe-" not in finding.found
    assert level == "error" or not names(cast(Url, out))


async def test_a_sweep_in_a_store_is_read_not_made_again(open_simulated: OpenSimulated, root: Url) -> None:
    """Runners, workers of Ray Data and trainers write to it from processes of their own."""
    async with open_simulated() as session:
        planned = plan_sweep([str(SENTIMENT)], session.recipe)
        outcomes = await run_jobs(planned.jobs, root, session=session)
        assert [one.state for one in outcomes] == ["done"], outcomes[0].reason
        assert await run_jobs(planned.jobs, root, session=session) == outcomes
    assert {stage for stage, _ in stored_rows(root)} >= {"synthesis", "curation", "finetuning", "evaluation"}
    assert (root / "sweep" / "outcomes.jsonl").is_dir()
