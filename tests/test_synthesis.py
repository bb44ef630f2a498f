"""Synthesis on simulated engines and a real Ray: the same rows whatever dies, stops, or answers first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import selfguide
from engines.types import Faults
from selfguide.api import Session
from selfguide.curation import CurationJob, judge_file
from selfguide.errors import TaskFailed, UserError
from selfguide.filters.chain import InputJudge
from selfguide.recipefile import load_recipe
from selfguide.records import Ledger
from selfguide.store import SHARD_ROWS, Artifact, RunStore
from selfguide.synthesis import synthesis_stage, synthesize
from selfguide.taskrun import Progress, TaskRun
from selfguide.tasks import Task, load_task

EXAMPLES = Path(selfguide.__file__).parent / "examples"
GENERATION, CLASSIFICATION = (load_task(EXAMPLES / f"{name}.json") for name in ("time_first", "sentiment"))

INPUTS = [{"name": "finished"}, {"name": "noise", "extra": ["letter"]}, {"name": "duplicate"}]
"""A quarter of the simulated engines' inputs holds "letter", some are cut: every kind of end occurs."""
BASE = {
    "engine.kind": "simulated", "synthesis.num_candidates": 200, "synthesis.target_rows": None, "synthesis.lag": 16,
    "filters.inputs": INPUTS,
}  # fmt: skip

Open = Callable[..., AbstractAsyncContextManager[Session]]


@pytest_asyncio.fixture(scope="module")
async def one_engine(open_simulated: Open) -> AsyncIterator[Session]:
    """An engine that answers at once, in the order in which it was asked."""
    async with open_simulated() as session:
        yield session


@pytest_asyncio.fixture(scope="module")
async def slow_engines(open_simulated: Open) -> AsyncIterator[Session]:
    """Three engines that take their time, long answers more of it, a few at once."""
    changes = {"cluster.num_engines": 3, "engine.tokens_per_s": 3000.0, "engine.max_num_seqs": 20}
    async with open_simulated(**changes) as session:
        yield session


@pytest_asyncio.fixture(scope="module")
async def refusing_engine(open_simulated: Open) -> AsyncIterator[Session]:
    """An engine that refuses a tenth of all prompts."""
    async with open_simulated(**{"engine.faults": {"refuse_share": 0.1}}) as session:
        yield session


def make_run(
    session: Session, out: Path, task: Task = GENERATION, progress: Progress = lambda *_: None, **changes: Any
) -> TaskRun:
    """A run under `smoke`, BASE and `changes`, whose keys have __ for a dot."""
    recipe = load_recipe("smoke", BASE | {key.replace("__", "."): value for key, value in changes.items()})
    return replace(session, recipe=recipe).task_run(task, RunStore(out), progress)


def ends(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["filter"] or row["state"] for row in rows)


# ---- nothing depends on timing


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (GENERATION, {}),
        (GENERATION, {"synthesis__lag": 1, "synthesis__num_candidates": 70}),
        (GENERATION, {"synthesis__pool": "rounds"}),
        (GENERATION, {"synthesis__target_rows": 60, "synthesis__lag": 200}),
        (GENERATION, {"annotation__num_samples": 6, "annotation__keep_best": 3}),
        (CLASSIFICATION, {"synthesis__target_rows": 60, "filters__classification__pairs": [{"name": "agreement"}]}),
    ],
    ids=["lag", "lag of one", "rounds", "target", "best samples", "classification"],
)
async def test_rows_do_not_depend_on_who_answers_and_when(
    one_engine: Session, slow_engines: Session, tmp_path: Path, task: Task, changes: dict[str, Any]
) -> None:
    calm = await synthesize(make_run(one_engine, tmp_path / "calm", task, **changes))
    busy = await synthesize(make_run(slow_engines, tmp_path / "busy", task, **changes))
    assert busy.rows() == calm.rows()
    assert busy.digest == calm.digest


async def test_another_seed_gives_other_rows(one_engine: Session, tmp_path: Path) -> None:
    first, second = [
        await synthesize(make_run(one_engine, tmp_path, seed=seed, synthesis__num_candidates=64)) for seed in (0, 1)
    ]
    assert not {row["input"] for row in first.rows()} & {row["input"] for row in second.rows()}


# ---- what a row may be shown


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"synthesis__lag": 1}, lambda row: row),
        ({"synthesis__lag": 7}, lambda row: max(0, row - 6)),
        ({"synthesis__lag": 500}, lambda row: 0),
        ({"synthesis__pool": "rounds"}, lambda row: 10 * (row // 10)),
        ({"synthesis__pool": "rounds", "synthesis__round_size": 3}, lambda row: 3 * (row // 3)),
    ],
    ids=["lag 1", "lag 7", "lag beyond the end", "rounds of 10", "rounds of 3"],
)
async def test_rows_are_shown_accepted_inputs_below_their_bound(
    one_engine: Session, tmp_path: Path, changes: dict[str, Any], bound: Callable[[int], int]
) -> None:
    changes = {"synthesis__num_candidates": 90, "synthesis__max_demonstrations": 5} | changes
    rows = (await synthesize(make_run(one_engine, tmp_path, **changes))).rows()
    newest = 0
    for row in rows:
        visible = [other["row"] for other in rows[: bound(row["row"])] if other["state"] == "accepted"]
        shown = row["demonstrations"]
        assert set(shown) <= set(visible)
        assert shown == sorted(set(shown))
        assert min(1, len(visible)) <= len(shown) <= 5
        newest += bool(visible) and visible[-1] in shown
    assert bool(newest) == (bound(89) > 0), "the newest visible row is shown now and then"


async def test_prompts_that_lose_demonstrations_say_so(one_engine: Session, tmp_path: Path) -> None:
    run = make_run(one_engine, tmp_path, synthesis__lag=1, synthesis__num_candidates=40)
    tight = len(run.prompts.new_input(0, [("x" * 40, None)], None, 48).ids) + 48
    run = replace(run, student=replace(run.student, max_model_len=tight))
    rows = (await synthesize(run)).rows()
    assert {len(row["demonstrations"]) for row in rows} == {0, 1}
    assert all(len(rows[shown]["input"]) <= 40 for row in rows for shown in row["demonstrations"])


# ---- every row has one end


async def test_every_row_has_one_end_and_keeps_its_text(refusing_engine: Session, tmp_path: Path) -> None:
    run = make_run(refusing_engine, tmp_path, synthesis__max_failed_share=1)
    done = await synthesize(run)
    rows = done.rows()
    Ledger.of(rows).reconcile(200)
    assert done.marker["ledger"] == Ledger.of(rows).as_dict()
    assert [row["row"] for row in rows] == list(range(200))
    assert len({row["id"] for row in rows}) == 200
    assert set(ends(rows)) == {"accepted", "finished", "noise", "refused"}
    for row in rows:
        accepted, failed = row["state"] == "accepted", row["state"] == "failed"
        assert (row["filter"] is None) == (row["reason"] is None) == accepted
        assert failed or row["input"]
        assert (row["samples"] is not None) == accepted
        assert not failed or row["reason"] == "refused as ordered"
    assert all(len(row["samples"]) == 4 for row in rows if row["state"] == "accepted")
    assert any(row["input"] for row in rows if row["state"] == "failed"), "some fail in annotation"


async def test_a_row_that_does_not_fit_fails_alone(one_engine: Session, tmp_path: Path) -> None:
    run = make_run(one_engine, tmp_path, synthesis__max_failed_share=1)
    tight = len(run.prompts.new_input(0, [], None, 48).ids) + 48 - sum(len(e.input) + 8 for e in run.task.examples)
    run = replace(run, student=replace(run.student, max_model_len=tight))
    rows = (await synthesize(run)).rows()
    Ledger.of(rows).reconcile(200)
    too_long = [row for row in rows if row["filter"] == "prompt_too_long"]
    assert 10 < len(too_long) < 190
    assert min(len(row["input"]) for row in too_long) > max(
        len(row["input"]) for row in rows if row["state"] == "accepted"
    )
    assert all(f"context {tight}" in row["reason"] for row in too_long)


async def test_conditional_rows_carry_the_label_that_they_were_written_for(one_engine: Session, tmp_path: Path) -> None:
    rows = (await synthesize(make_run(one_engine, tmp_path, CLASSIFICATION))).rows()
    labels = Counter(row["label"] for row in rows)
    assert set(labels) == {"positive", "negative"}
    assert min(labels.values()) > 70  # of 200, drawn uniformly
    answers = {sample["text"] for row in rows for sample in row["samples"] or []}
    assert answers == {"positive", "negative"}  # constrained
    never = make_run(one_engine, tmp_path, CLASSIFICATION, synthesis__conditional="never")
    assert {row["label"] for row in (await synthesize(never)).rows()} == {None}


async def test_of_many_samples_the_likeliest_are_kept(one_engine: Session, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"annotation__num_samples": 6, "synthesis__num_candidates": 20}
    whole = (await synthesize(make_run(one_engine, tmp_path, annotation__keep_best=6, **changes))).rows()
    best = (await synthesize(make_run(one_engine, tmp_path, annotation__keep_best=2, **changes))).rows()
    for all_samples, kept in zip(whole, best, strict=True):
        if kept["samples"] is not None:
            assert kept["samples"] == all_samples["samples"][:2]
            logprobs = [sample["logprob"] for sample in all_samples["samples"]]
            assert logprobs == sorted(logprobs, reverse=True)


async def test_samples_stop_where_the_vote_is_decided(one_engine: Session, tmp_path: Path) -> None:
    """The first of them are those of a full draw; decided rows elect, and keep, what their full draw does."""
    changes: dict[str, Any] = {
        "annotation__constrain_labels": True,
        "filters__vote__min_share": 0.5,
        "annotation__num_samples": 10,
    }
    early = make_run(one_engine, tmp_path / "early", CLASSIFICATION, annotation__stop_when_decided=True, **changes)
    whole = make_run(one_engine, tmp_path / "whole", CLASSIFICATION, **changes)
    pairs = list(zip((await synthesize(early)).rows(), (await synthesize(whole)).rows(), strict=True))
    counts = Counter(len(short["samples"]) for short, _ in pairs if short["samples"])
    assert set(counts) == {6, 10}, counts
    for short, full in pairs:
        if short["samples"]:
            assert short["samples"][:6] == full["samples"][:6]
            texts = {sample["text"] for sample in short["samples"][:6]}
            assert (len(short["samples"]) == 6) == (len(texts) == 1 and texts <= set(CLASSIFICATION.labels))
    decided = {short["row"] for short, _ in pairs if short["samples"] and len(short["samples"]) == 6}
    kept = [set(kept_by_curation(run, await synthesize(run), tmp_path)) for run in (early, whole)]
    assert kept[0] & decided == kept[1] & decided


async def test_stopping_early_wants_a_vote_that_it_cannot_turn(one_engine: Session, tmp_path: Path) -> None:
    for change in ({"filters__vote__min_share": 0.6}, {"annotation__orders": 2}, {"annotation__keep_best": 2}):
        with pytest.raises(UserError, match="stop_when_decided needs"):
            make_run(one_engine, tmp_path, CLASSIFICATION, annotation__stop_when_decided=True, **change)


# ---- the candidate budget


def kept_by_curation(run: TaskRun, candidates: Artifact, folder: Path) -> list[int]:
    """Rows that curation's row filters keep."""
    kept = folder / "kept.parquet"
    filters = run.filters.model_copy(update={"sets": ()})
    judge_file(CurationJob(candidates.rows_path, kept, filters, run.context("output")))
    judged = Artifact("curation", folder, "", {}).rows() if kept.replace(folder / "rows.parquet") else []
    return [row["row"] for row in judged if row["state"] == "accepted"]


async def test_synthesis_stops_at_the_row_that_makes_it_enough(slow_engines: Session, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "synthesis__target_rows": 30,
        "filters__vote__min_share": 0.5,
        "annotation__constrain_labels": True,
    }
    run = make_run(slow_engines, tmp_path / "run", CLASSIFICATION, **changes)
    done = await synthesize(run)
    kept = kept_by_curation(run, done, tmp_path)
    assert len(kept) == 30
    assert kept[-1] == done.rows()[-1]["row"] < 199
    assert done.marker["enough"] is True
    assert done.marker["ledger"]["candidates"] == len(done.rows()) == kept[-1] + 1


async def test_synthesis_stops_when_the_candidates_are_spent(one_engine: Session, tmp_path: Path) -> None:
    strict: dict[str, Any] = {"filters__vote__min_share": 1, "synthesis__num_candidates": 70}
    for target in (None, 5):
        run = make_run(one_engine, tmp_path / "run", synthesis__target_rows=target, **strict)
        done = await synthesize(run)
        assert len(done.rows()) == 70
        assert done.marker["enough"] is False
        assert done.marker["surplus"] == 0
        assert kept_by_curation(run, done, tmp_path) == []


# ---- stops and resumes


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_at(num_rows: int) -> Progress:
    def hear(task: str, stage: str, counts: dict[str, Any]) -> None:
        if counts["rows"] >= num_rows:
            raise Stopped

    return hear


def shards(run: TaskRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(synthesis_stage(run).work.glob("rows-*.parquet"))}


@pytest.mark.parametrize(
    "changes", [{}, {"synthesis__pool": "rounds"}, {"synthesis__target_rows": 110}], ids=["lag", "rounds", "target"]
)
async def test_a_stopped_run_goes_on_to_the_same_rows(
    refusing_engine: Session, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A tenth of the prompts is refused: rows that failed after they were shown are shown again."""
    changes = {"synthesis__max_failed_share": 1, "synthesis__max_demonstrations": 8} | changes
    undisturbed = await synthesize(make_run(refusing_engine, tmp_path / "calm", **changes))
    seen: dict[str, bytes] = {}
    for num_rows in (1, SHARD_ROWS, 2 * SHARD_ROWS):
        run = make_run(refusing_engine, tmp_path / "cut", progress=stop_at(num_rows), **changes)
        with pytest.raises(Stopped):
            await synthesize(run)
        assert len(shards(run)) >= num_rows // SHARD_ROWS
        assert shards(run).items() >= seen.items(), "committed rows are final"
        seen = shards(run)
    resumed = await synthesize(make_run(refusing_engine, tmp_path / "cut", **changes))
    assert resumed.rows() == undisturbed.rows()
    assert resumed.digest == undisturbed.digest
    assert {path.name for path in resumed.path.iterdir()} == {"rows.parquet", "events.jsonl", "done.json"}
    assert ends(resumed.rows())["refused"] > 10


async def test_a_cancelled_run_goes_on_to_the_same_rows(slow_engines: Session, tmp_path: Path) -> None:
    undisturbed = await synthesize(make_run(slow_engines, tmp_path / "calm"))
    under_way = asyncio.Event()

    def hear(task: str, stage: str, counts: dict[str, Any]) -> None:
        if counts["rows"] >= SHARD_ROWS:
            under_way.set()

    coroutine = asyncio.ensure_future(synthesize(make_run(slow_engines, tmp_path / "cut", progress=hear)))
    await under_way.wait()
    coroutine.cancel()
    with pytest.raises(asyncio.CancelledError):
        await coroutine
    run = make_run(slow_engines, tmp_path / "cut")
    assert not synthesis_stage(run).done
    committed = synthesis_stage(run).committed()
    assert committed == undisturbed.rows()[: len(committed)]
    assert len(committed) >= SHARD_ROWS
    assert (await synthesize(run)).rows() == undisturbed.rows()


async def test_a_stage_that_two_methods_want_is_made_once(one_engine: Session, tmp_path: Path) -> None:
    run = make_run(one_engine, tmp_path, synthesis__num_candidates=70)
    first, second = await asyncio.gather(synthesize(run), synthesize(run))
    assert first == second
    assert [event["event"] for event in synthesis_stage(run).events()].count("begin") == 1
    before = one_engine.pool.counts.dispatched
    assert await synthesize(make_run(one_engine, tmp_path, synthesis__num_candidates=70)) == first
    assert one_engine.pool.counts.dispatched == before


# ---- failures


async def test_too_many_failed_rows_end_the_task_and_the_remedy_goes_on_from_there(
    refusing_engine: Session, tmp_path: Path
) -> None:
    run = make_run(refusing_engine, tmp_path, synthesis__max_failed_share=0.06)
    with pytest.raises(TaskFailed, match=r"time_first: 13 rows failed .* raise synthesis.max_failed_share") as error:
        await synthesize(run)
    assert len(str(error.value).splitlines()) == 1
    committed = synthesis_stage(run).committed()
    assert committed
    mended = await synthesize(make_run(refusing_engine, tmp_path, synthesis__max_failed_share=1))
    assert mended.rows()[: len(committed)] == committed
    assert mended.path == synthesis_stage(run).path


async def test_a_row_that_kills_engines_is_quarantined_alone(
    one_engine: Session, open_simulated: Open, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "synthesis__max_demonstrations": 0,
        "synthesis__num_candidates": 24,
    }  # its text is in its prompt alone
    expected = (await synthesize(make_run(one_engine, tmp_path / "calm", **changes))).rows()
    poisoned = next(row for row in expected if row["row"] > 8 and row["state"] == "accepted")
    poison = tuple(one_engine.student.tokenizer.encode(poisoned["input"]))
    async with open_simulated(**{"engine.faults": Faults(poison=poison), "engine.max_num_seqs": 8}) as session:
        run = make_run(session, tmp_path / "poisoned", **changes)
        done = await synthesize(run)
        assert session.pool.counts.poisoned == 1
    row = done.rows()[poisoned["row"]]
    assert (row["state"], row["filter"], row["samples"]) == ("failed", "poison", None)
    assert "alone in flight" in row["reason"]
    assert row["input"] == poisoned["input"]
    expected[poisoned["row"]] = row
    assert done.rows() == expected
    deaths = [event for event in synthesis_stage(run).events() if event["event"] == "engine_died"]
    assert [f"{row['id']}/output"] in [event["rows"] for event in deaths if event["alone"]], "it was written down"


@pytest.mark.parametrize(
    ("num_engines", "max_num_seqs", "die_after", "deaths"),
    [(1, 8, 100, 2), (2, 64, 200, 1)],
    ids=["an engine that restarts", "another engine takes over"],
)
async def test_engines_that_die_give_the_rows_of_engines_that_live(
    one_engine: Session, open_simulated: Open, tmp_path: Path,
    num_engines: int, max_num_seqs: int, die_after: int, deaths: int,
) -> None:  # fmt: skip
    """No engine answers `die_after` rows again while the suspects of a death run alone, so none of them is blamed."""
    undisturbed = await synthesize(make_run(one_engine, tmp_path / "calm"))
    (tmp_path / "deaths").mkdir()
    faults = {"die_after": die_after, "deaths": deaths, "marker": str(tmp_path / "deaths")}
    changes = {"cluster.num_engines": num_engines, "engine.max_num_seqs": max_num_seqs, "engine.faults": faults}
    async with open_simulated(**changes) as session:
        done = await synthesize(make_run(session, tmp_path / "deadly"))
        assert session.pool.counts.deaths == len(list((tmp_path / "deaths").iterdir())) == deaths
    assert done.rows() == undisturbed.rows()
    assert done.digest == undisturbed.digest


# ---- what makes a synthesis


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"name": "other"}, True),
        ({"cluster__num_engines": 5}, True),
        ({"engine__max_num_seqs": 3}, True),
        ({"engine__tokens_per_s": 9.0}, True),
        ({"finetuning__epochs": 9}, True),
        ({"evaluation__num_instances": 9}, True),
        ({"filters__vote__min_share": 0.9}, True),  # without a target, pairs decide nothing here
        ({"filters__sets": [{"name": "near_duplicate"}]}, True),
        ({"synthesis__max_failed_share": 0.9}, True),
        ({"seed": 1}, False),
        ({"synthesis__lag": 17}, False),
        ({"synthesis__sampling__temperature": 0.5}, False),
        ({"annotation__num_samples": 5}, False),
        ({"filters__inputs": []}, False),
    ],
    ids=str,
)
def test_a_synthesis_is_known_by_what_decides_its_rows(
    one_engine: Session, tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    stages = [synthesis_stage(make_run(one_engine, tmp_path, **some)) for some in ({}, changes)]
    assert (stages[0].fingerprint == stages[1].fingerprint) is same


def test_with_a_target_the_pair_filters_are_part_of_a_synthesis(one_engine: Session, tmp_path: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return synthesis_stage(make_run(one_engine, tmp_path, synthesis__target_rows=9, **changes)).fingerprint

    assert fingerprint() != fingerprint(filters__vote__min_share=0.9)
    assert fingerprint() != fingerprint(filters__samples=[])
    assert fingerprint() == fingerprint(filters__sets=[{"name": "near_duplicate"}])


def test_student_and_task_are_part_of_a_synthesis(one_engine: Session, tmp_path: Path) -> None:
    run = make_run(one_engine, tmp_path)
    other_student = replace(run, student=replace(run.student, digest="other"))
    moved = replace(run, task=replace(run.task, source="elsewhere.json"))
    edited = replace(run, task=replace(run.task, digest="other"))
    fingerprints = [synthesis_stage(one).fingerprint for one in (run, other_student, edited)]
    assert len(set(fingerprints)) == 3
    assert synthesis_stage(moved).fingerprint == fingerprints[0]


async def test_stored_verdicts_are_those_of_the_filters(one_engine: Session, tmp_path: Path) -> None:
    run = make_run(one_engine, tmp_path)
    rows = (await synthesize(run)).rows()
    columns = ([row[key] for row in rows] for key in ("input", "tokens", "finish_reason"))
    verdicts = InputJudge(run.filters, run.context("input")).judge(*columns)
    assert [(row["filter"], row["reason"]) for row in rows] == [verdict or (None, None) for verdict in verdicts]
