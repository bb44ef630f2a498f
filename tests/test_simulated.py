"""Simulated engines and trainers: answers depend on the request alone, time and faults on what was ordered."""

from __future__ import annotations

import asyncio
import math
import selectors
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.simulated import TICK_S, SimulatedEngine
from engines.simulated_sft import SimulatedFinetuner
from engines.types import (
    AdapterRef,
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    EngineSpec,
    Faults,
    Outcome,
    Request,
    RequestFailed,
    Sampling,
    Score,
    ScoreRequest,
    Simulation,
    TrainSpec,
    Work,
)
from selfguide.errors import UserError
from selfguide.recipefile import load_recipe
from tests.training import make_work, steps_of

LORA = AdapterRef("a", "", 8, "")
CANARY = ScoreRequest("canary", [1, 2], [3, 4, 5])
ALIKE = Simulation(answer_tokens=10, answer_spread=0)


class Clock(selectors.DefaultSelector):
    """Nothing is waited for: what would have been waited is added to the time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


def in_virtual_time(work: Callable[[], Awaitable[Any]], clock: Clock | None = None) -> Any:
    """Runs it in a loop whose clock jumps to the next timer."""
    clock = clock or Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work())
    finally:
        loop.close()


def engine(number: int = 0, life: int = 1, **spec: Any) -> SimulatedEngine:
    return SimulatedEngine(EngineSpec("none", kind="simulated", **spec), number, life)


def make_rows(count: int, **sampling: Any) -> list[Request]:
    return [Request(f"row-{i}", [i, 1, 2], Sampling(**{"seed": i, **sampling})) for i in range(count)]


def stream(one: SimulatedEngine, rows: Sequence[Any]) -> AsyncIterator[list[Outcome]]:
    return one.generate(rows) if isinstance(rows[0], Request) else one.score(rows)


async def answers(one: SimulatedEngine, rows: Sequence[Work]) -> dict[str, Outcome]:
    return {outcome.id: outcome async for outcomes in stream(one, rows) for outcome in outcomes}


async def arrivals(one: SimulatedEngine, rows: Sequence[Work]) -> dict[str, float]:
    """When each row was answered, in the loop's seconds."""
    time, began = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
    return {outcome.id: time() - began async for outcomes in stream(one, rows) for outcome in outcomes}


def text(outcome: Outcome) -> str:
    assert isinstance(outcome, Completion)
    return outcome.samples[0].text


# ---- answers


async def test_an_answer_depends_on_its_request_alone() -> None:
    rows: list[Work] = [*make_rows(40), *make_rows(40, n=3, temperature=0.3)]
    rows = [replace(row, id=f"{i}", adapter=LORA if i % 2 else None) for i, row in enumerate(rows)]
    calm = await answers(engine(), rows)
    slow = engine(
        7, 3, tokens_per_s=5000.0, max_num_seqs=3, seed=9, simulation=Simulation(prefill_tokens_per_s=1e5),
        faults=Faults(slow_share=1, slow_factor=2),
    )  # fmt: skip
    parts = await asyncio.gather(*(answers(slow, rows[start::5][::-1]) for start in range(5)))
    assert {name: outcome for part in parts for name, outcome in part.items()} == calm
    assert len(calm) == 80


async def test_what_an_answer_depends_on_changes_it() -> None:
    row = Request("row", [1, 2, 3], Sampling(seed=1))
    others = [
        replace(row, prompt_ids=[1, 2, 4]), replace(row, prompt_ids=[1, 2]), replace(row, adapter=LORA),
        replace(row, sampling=Sampling(seed=2)), replace(row, sampling=Sampling(temperature=0)),
    ]  # fmt: skip
    texts = [text((await answers(engine(), [one]))["row"]) for one in (row, *others)]
    assert len(set(texts)) == len(texts)


async def test_sample_k_is_that_of_the_seed_k_later_and_greedy_knows_no_seed() -> None:
    several = (await answers(engine(), [Request("row", [5], Sampling(n=4, seed=10))]))["row"]
    assert isinstance(several, Completion)
    for k, sample in enumerate(several.samples):
        alone = (await answers(engine(), [Request("row", [5], Sampling(seed=10 + k))]))["row"]
        assert alone == Completion("row", (sample,))
    greedy = [await answers(engine(), [Request("row", [5], Sampling(temperature=0, seed=s))]) for s in (0, 1)]
    assert greedy[0] == greedy[1]


async def test_the_colder_the_more_samples_agree() -> None:
    def agreement(outcomes: dict[str, Outcome]) -> float:
        texts = [[one.text for one in row.samples] for row in outcomes.values() if isinstance(row, Completion)]
        return fmean(max(map(some.count, some)) / len(some) for some in texts)

    hot, warm, cold = [agreement(await answers(engine(), make_rows(50, n=10, temperature=t))) for t in (1, 0.5, 0.2)]
    assert hot < 0.2 < 0.4 < warm < 0.7 < cold < 1


async def test_texts_are_distinct_and_their_tokens_are_counted() -> None:
    outcomes = await answers(engine(), make_rows(500, logprobs=True))
    samples = [one.samples[0] for one in outcomes.values() if isinstance(one, Completion)]
    assert len({sample.text for sample in samples}) > 490
    assert all(len(sample.token_ids) == len(sample.text.split()) for sample in samples)
    assert all(sample.logprob is not None and -10 <= sample.logprob <= 0 for sample in samples)
    assert 0 < sum(sample.finish_reason == "length" for sample in samples) < 50


async def test_choices_constrain_and_max_tokens_cuts() -> None:
    chosen = await answers(engine(), make_rows(50, choices=("yes", "no")))
    assert {text(one) for one in chosen.values()} == {"yes", "no"}
    cut = await answers(engine(simulation=Simulation(answer_tokens=200)), make_rows(50, max_tokens=60))
    for outcome in cut.values():
        assert isinstance(outcome, Completion)
        assert (len(outcome.samples[0].token_ids), outcome.samples[0].finish_reason) == (60, "length")


@pytest.mark.parametrize("spread", [0.0, 0.5])
async def test_lengths_have_the_mean_and_the_spread_that_were_ordered(spread: float) -> None:
    simulation = Simulation(answer_tokens=100, answer_spread=spread)
    outcomes = await answers(engine(simulation=simulation), make_rows(2000, max_tokens=5000))
    lengths = [len(one.samples[0].token_ids) for one in outcomes.values() if isinstance(one, Completion)]
    assert fmean(lengths) == pytest.approx(100, rel=0.05)
    logs = [math.log(length) for length in lengths]
    assert math.sqrt(fmean((log - fmean(logs)) ** 2 for log in logs)) == pytest.approx(spread, abs=0.03)


async def test_scores_are_of_prompt_completion_and_adapter() -> None:
    choices = ChoiceRequest("choice", [1, 2], [[3], [4], [3, 4]])
    turned = replace(choices, choices=choices.choices[::-1])
    first, other = [await answers(engine(number), [CANARY, choices]) for number in (0, 1)]
    assert first == other
    tuned = (await answers(engine(), [replace(CANARY, adapter=LORA)]))["canary"]
    assert isinstance(tuned, Score)
    assert isinstance(first["canary"], Score)
    assert len(tuned.token_logprobs) == 3
    assert not set(tuned.token_logprobs) & set(first["canary"].token_logprobs)
    scores = first["choice"], (await answers(engine(), [turned]))["choice"]
    assert isinstance(scores[0], ChoiceScores)
    assert isinstance(scores[1], ChoiceScores)
    assert scores[0].logprobs == scores[1].logprobs[::-1]


# ---- time


def test_slots_are_given_first_come_first_served() -> None:
    async def work() -> tuple[dict[str, float], dict[str, float]]:
        one = engine(tokens_per_s=10.0, max_num_seqs=2, simulation=ALIKE)
        first = asyncio.ensure_future(arrivals(one, make_rows(5)))
        await asyncio.sleep(0.5)
        late = await arrivals(one, make_rows(1))
        return await first, late

    first, late = in_virtual_time(work)
    assert first == pytest.approx({f"row-{i}": 1.0 + i // 2 for i in range(5)}, abs=TICK_S)
    assert late["row-0"] == pytest.approx(3.0 - 0.5, abs=TICK_S), "it takes the slot beside the fifth"


def test_each_sample_takes_a_slot_and_rows_that_end_together_come_together() -> None:
    async def work() -> list[int]:
        one = engine(tokens_per_s=10.0, max_num_seqs=8, simulation=ALIKE)
        return [len(outcomes) async for outcomes in one.generate(make_rows(4, n=4))]

    assert in_virtual_time(work) == [2, 2]


def test_an_engine_keeps_its_pace_while_its_process_is_late() -> None:
    """Slots pass on at the moment when a sequence ends, not when somebody looks."""
    clock = Clock()

    async def work() -> float:
        one = engine(tokens_per_s=1000.0, max_num_seqs=1, simulation=ALIKE)
        job = asyncio.ensure_future(arrivals(one, make_rows(400)))
        await asyncio.sleep(0.5)
        clock.now += 3  # something else held the process
        return (await job)["row-399"]

    assert in_virtual_time(work, clock) == pytest.approx(4.0, abs=2 * TICK_S)


def test_prompts_are_read_one_after_another_and_known_ones_are_not() -> None:
    async def work() -> tuple[dict[str, float], dict[str, Outcome], int]:
        simulation = Simulation(answer_tokens=1, answer_spread=0, prefill_tokens_per_s=1000, prefix_cache_tokens=1280)
        one = engine(simulation=simulation)
        shared, other = list(range(641)), list(range(7, 7 + 641))
        rows = [Request(f"{i}", ids, Sampling()) for i, ids in enumerate((shared, shared, other, other[:100]))]
        times = await arrivals(one, rows)
        pushed_out = [Request("new", [9] * 641, Sampling()), Request("again", shared, Sampling())]
        tuned = replace(rows[2], adapter=LORA, id="tuned")
        return times, await answers(one, [*pushed_out, tuned]), one.stats().cached_tokens

    times, later, cached = in_virtual_time(work)
    assert times == pytest.approx({"0": 0.641, "1": 0.642, "2": 1.283, "3": 1.283 + 0.036}, abs=TICK_S)
    assert [later[name].cached_tokens for name in ("new", "again", "tuned")] == [0, 0, 0]
    assert cached == 640 + 64


def test_a_slow_engine_is_slow_in_every_life_and_some_are() -> None:
    faults = Faults(slow_share=0.25, slow_factor=4)
    simulation = replace(ALIKE, start_s=1)
    starts = [engine(number, simulation=simulation, faults=faults).start_s for number in range(400)]
    assert set(starts) == {1.0, 4.0}
    assert 60 < starts.count(4.0) < 140
    slow = starts.index(4.0)

    async def work() -> float:
        one = engine(slow, life=2, tokens_per_s=10.0, simulation=simulation, faults=faults)
        return (await arrivals(one, make_rows(1)))["row-0"]

    assert in_virtual_time(work) == pytest.approx(4.0, abs=TICK_S)


def test_start_up_times_are_drawn_by_engine_and_life() -> None:
    simulation = Simulation(start_s=20, start_spread=0.5)

    def draw(number: int, life: int = 1, seed: int = 0) -> float:
        return engine(number, life, seed=seed, simulation=simulation).start_s

    starts = [draw(number) for number in range(1000)]
    assert fmean(starts) == pytest.approx(20, rel=0.1)
    assert draw(3) == starts[3]
    assert len({*starts, draw(3, life=2), draw(3, seed=1)}) == 1002
    assert engine(simulation=simulation).stats().start_s == starts[0]
    assert engine().start_s == 0


def test_adapters_take_their_time_to_load() -> None:
    async def work() -> float:
        one = engine(simulation=Simulation(adapter_load_s=3))
        assert not one.serves(LORA)
        await one.load_adapter(LORA)
        assert one.serves(LORA)
        full = replace(LORA, kind="full")
        await one.load_adapter(full)
        assert (one.serves(full), one.serves(LORA), one.serves(None)) == (True, False, False)
        return asyncio.get_running_loop().time()

    assert in_virtual_time(work) == pytest.approx(6)


def test_rows_of_callers_that_went_and_aborted_ones_give_their_slots_back() -> None:
    async def work() -> tuple[dict[str, Outcome], float, int]:
        one = engine(tokens_per_s=10.0, max_num_seqs=1, simulation=ALIKE)
        gone = asyncio.ensure_future(answers(one, make_rows(50)))
        aborted = asyncio.ensure_future(answers(one, [replace(make_rows(1)[0], id="aborted")]))
        last = asyncio.ensure_future(arrivals(one, [replace(make_rows(1)[0], id="last")]))
        await asyncio.sleep(0.5)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await one.abort(["aborted"])
        return await aborted, (await last)["last"], one.stats().in_flight

    aborted, last, in_flight = in_virtual_time(work)
    assert aborted == {"aborted": RequestFailed("aborted", "refused", "aborted")}
    assert last == pytest.approx(1.5, abs=TICK_S)
    assert in_flight == 0


def test_an_engine_with_work_has_a_pulse() -> None:
    async def work() -> tuple[int, int]:
        one = engine(tokens_per_s=0.1, simulation=ALIKE)
        job = asyncio.ensure_future(answers(one, make_rows(1)))
        await asyncio.sleep(5)
        before = one.stats()
        await asyncio.sleep(5)
        after = one.stats()
        job.cancel()
        assert before.requests == after.requests == 0
        return before.progress, after.progress

    before, after = in_virtual_time(work)
    assert after >= before + 4


# ---- faults


async def dead(work: Awaitable[Any]) -> bool:
    with pytest.raises(EngineDead):
        await work
    return True


def test_a_death_reaches_all_who_wait_and_all_who_come() -> None:
    async def work() -> list[bool]:
        simulation = replace(ALIKE, adapter_load_s=100)
        one = engine(tokens_per_s=10.0, max_num_seqs=4, simulation=simulation, faults=Faults(die_after=7))
        pending = [answers(one, make_rows(8)), answers(one, make_rows(8)), answers(one, [CANARY])]
        deaths = await asyncio.gather(*map(dead, pending), dead(one.load_adapter(LORA)))
        assert asyncio.get_running_loop().time() < 10
        assert one.stats().in_flight == 0
        return [*deaths, await dead(answers(one, [CANARY])), await dead(one.load_adapter(None))]

    assert in_virtual_time(work) == [True] * 6


async def test_deaths_are_counted_by_the_marker_or_by_the_life(tmp_path: Path) -> None:
    by_life = Faults(die_after=3, deaths=2)
    for life, mortal in ((1, True), (2, True), (3, False)):
        work = answers(engine(life=life, faults=by_life), make_rows(9))
        assert await dead(work) if mortal else len(await work) == 9
    marked = replace(by_life, marker=str(tmp_path))
    for mortal in (True, True, False):
        work = answers(engine(faults=marked), make_rows(9))
        assert await dead(work) if mortal else len(await work) == 9
    assert len(list(tmp_path.iterdir())) == 2


def test_lives_are_drawn_by_engine_and_life() -> None:
    """The engine dies on its own, idle or not, and is found dead."""
    faults = Faults(mean_life_s=100)

    async def life(number: int, life: int, *, busy: bool) -> float:
        time = asyncio.get_running_loop().time
        one, began = engine(number, life, tokens_per_s=1e-9 if busy else 0.0, faults=faults), time()
        if busy:
            await dead(answers(one, make_rows(1)))
            return time() - began
        while True:
            try:
                await answers(one, make_rows(1))
            except EngineDead:
                return time() - began
            await asyncio.sleep(0.1)

    async def work() -> tuple[list[float], float, float]:
        lives = [await life(number, 1, busy=True) for number in range(500)]
        return lives, await life(3, 1, busy=False), await life(3, 2, busy=True)

    lives, idle, second = in_virtual_time(work)
    assert fmean(lives) == pytest.approx(100, rel=0.15)
    assert idle == pytest.approx(lives[3], abs=0.11)
    assert second not in lives
    assert len(set(lives)) == 500


def test_a_hung_engine_answers_nothing_and_its_pulse_stops() -> None:
    async def work() -> None:
        one = engine(tokens_per_s=10.0, max_num_seqs=4, simulation=ALIKE, faults=Faults(hang_after=8))
        heard: list[str] = []

        async def hear() -> None:
            async for outcomes in one.generate(make_rows(20)):
                heard.extend(outcome.id for outcome in outcomes)

        job = asyncio.ensure_future(hear())
        await asyncio.sleep(60)
        progress = one.stats().progress
        late = asyncio.ensure_future(answers(one, [CANARY]))
        await asyncio.sleep(60)
        assert (len(heard), one.stats().in_flight, one.stats().progress) == (8, 13, progress)
        assert not job.done()
        assert not late.done()
        for one_job in (job, late):
            one_job.cancel()
        await asyncio.gather(job, late, return_exceptions=True)

    in_virtual_time(work)


async def test_nan_kills_the_engine_in_every_life() -> None:
    for life in (1, 2):
        one = engine(life=life, faults=Faults(nan_after=2))
        assert len(await answers(one, make_rows(2))) == 2
        with pytest.raises(EngineDead, match="NaN"):
            await answers(one, [CANARY])


async def test_a_canary_tells_a_wrong_engine_from_a_right_one() -> None:
    right, wrong = engine(), engine(faults=Faults(wrong_after=10))
    rows = [*make_rows(10), *make_rows(5, choices=("yes", "no", "perhaps"), n=9)]
    expected = await answers(right, [CANARY])
    assert await answers(wrong, [CANARY]) == expected
    await answers(wrong, make_rows(9))
    assert await answers(wrong, [CANARY]) != expected
    assert await answers(wrong, [CANARY]) == await answers(wrong, [CANARY]), "wrong, but not at random"
    spoilt, sound = await answers(wrong, rows), await answers(right, rows)
    assert not [name for name, outcome in spoilt.items() if outcome == sound[name]]
    assert await answers(engine(life=2, faults=Faults(wrong_after=10)), [CANARY]) == expected


@pytest.mark.parametrize(("ids", "dies"), [([1, 7, 8, 9], True), ([7, 8], False), ([0x700, 0x800], False)])
async def test_poison_kills(ids: list[int], dies: bool) -> None:
    for row in (Request("row", ids, Sampling()), ScoreRequest("row", ids[:2], ids[2:] or [1])):
        work = answers(engine(faults=Faults(poison=(7, 8, 9))), [row])
        assert await dead(work) if dies else len(await work) == 1


async def test_the_same_prompts_are_refused_by_every_engine() -> None:
    refused = [
        {name for name, one in outcomes.items() if isinstance(one, RequestFailed) and one.error == "refused"}
        for number in range(2)
        for outcomes in [await answers(engine(number, faults=Faults(refuse_share=0.3)), make_rows(200))]
    ]
    assert refused[0] == refused[1]
    assert 30 < len(refused[0]) < 90


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine.faults": {"refuse_share": 1.5}}, "engine.faults: Value error, refuse_share and slow_share are"),
        ({"engine.faults": {"mean_life_s": float("nan")}}, "mean_life_s: Input should be a finite number"),
        ({"engine.faults": {"slow_factor": 0.5}}, "slow_factor is 0.5"),
        ({"engine.simulation": {"start_s": -1}}, "start_s is -1"),
        ({"engine.simulation": {"answer_tokens": 0}}, "answer_tokens is 0"),
        ({"engine.kind": "vllm", "finetuning.simulated_tokens_per_s": 1}, "finetuning: Value error, simulated"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("simulated", changes)
    assert said in str(error.value)


# ---- trainers


@pytest.fixture
def job(tmp_path: Path) -> tuple[TrainSpec, Path]:
    """Twelve rows of ten tokens, three of them the completion; two steps an epoch, three epochs."""
    return TrainSpec("none", "base", batch_size=6, simulated_tokens_per_s=1e6), write_rows(tmp_path / "rows.parquet")


def write_rows(path: Path, last: int = 9) -> Path:
    rows = {"input_ids": [[i, *range(8), last] for i in range(12)], "prompt_tokens": [7] * 12}
    pq.write_table(pa.table(rows), path)
    return path


def test_equal_rows_give_equal_adapters_and_others_do_not(job: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    spec, rows = job
    same = [(spec, rows), (replace(spec, model="moved", canary_rows=1, simulated_tokens_per_s=2e6), rows)]
    same.append((replace(spec, keep_epochs=True, epochs=1, min_steps=5), write_rows(tmp_path / "copy.parquet")))
    others = [(spec, write_rows(tmp_path / "others.parquet", last=8)), (replace(spec, seed=1), rows)]
    others += [
        (replace(spec, lora_rank=4), rows),
        (replace(spec, method="full"), rows),
        (replace(spec, epochs=1), rows),
    ]
    results = [
        SimulatedFinetuner().train(one, file, make_work(tmp_path / f"{i}"))
        for i, (one, file) in enumerate([*same, *others])
    ]
    digests = [result.checkpoints[-1].digest for result in results]
    assert len(set(digests[:3])) == 1
    assert len(set(digests)) == 1 + len(others)
    assert [len(result.checkpoints) for result in results[:3]] == [1, 1, 3]


async def test_the_result_has_what_a_real_one_has(job: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    spec, rows = job
    result = SimulatedFinetuner().train(replace(spec, canary_rows=3), rows, work := make_work(tmp_path / "work"))
    facts = result.tokens, result.completion_tokens, result.steps, result.epochs, result.rows
    assert facts == (360, 108, 6, 3, 12)
    assert result.checkpoints[-1].url == str(work / "epoch-3")
    assert [step["step"] for step in result.loss_curve] == steps_of(work) == [1, 2, 3, 4, 5, 6]
    assert result.loss_curve[-1]["loss"] < result.loss_curve[0]["loss"]
    assert [canary.prefix_ids[0] for canary in result.canaries] == [0, 4, 8]
    for canary in result.canaries:
        assert (len(canary.prefix_ids), canary.completion_ids) == (7, (6, 7, 9))
        asked = ScoreRequest("canary", canary.prefix_ids, canary.completion_ids)
        base = await answers(engine(), [asked])
        tuned = await answers(engine(), [replace(asked, adapter=result.checkpoints[-1])])
        assert base == {"canary": Score("canary", canary.base_logprobs)}
        assert tuned == {"canary": Score("canary", canary.tuned_logprobs)}


class Killed(BaseException):
    """As a signal would end the process."""


def test_a_killed_job_goes_on_from_its_last_epoch(
    job: tuple[TrainSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, rows = job
    undisturbed = SimulatedFinetuner().train(spec, rows, make_work(tmp_path / "calm"))
    work, left = make_work(tmp_path / "killed"), iter(range(3))

    def sleep(seconds: float) -> None:
        if next(left, None) is None:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("engines.simulated_sft.time.sleep", sleep)
        with pytest.raises(Killed):
            SimulatedFinetuner().train(spec, rows, work)
    assert steps_of(work) == [1, 2, 3]
    (work / "half-2").mkdir()  # killed while it wrote the next one
    resumed = SimulatedFinetuner().train(spec, rows, work)
    assert steps_of(work) == [1, 2, 3, 3, 4, 5, 6]
    assert resumed.checkpoints[-1].digest == undisturbed.checkpoints[-1].digest
    assert (resumed.loss_curve, resumed.canaries) == (undisturbed.loss_curve, undisturbed.canaries)
    again = SimulatedFinetuner().train(spec, rows, work)
    assert again.checkpoints == resumed.checkpoints
    assert len(steps_of(work)) == 7, "nothing was left to do"


def test_a_job_takes_the_time_of_its_tokens(
    job: tuple[TrainSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, rows = job
    now = [0.0]
    monkeypatch.setattr("engines.simulated_sft.time.monotonic", lambda: now[0])
    monkeypatch.setattr("engines.simulated_sft.time.sleep", lambda seconds: now.append(now.pop() + seconds))
    slow = replace(spec, simulated_tokens_per_s=10)
    assert SimulatedFinetuner().train(slow, rows, make_work(tmp_path / "work")).train_s == pytest.approx(36)


def test_no_rows_are_refused(job: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    columns = {"input_ids": pa.array([], pa.list_(pa.int32())), "prompt_tokens": pa.array([], pa.int32())}
    pq.write_table(pa.table(columns), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no rows to train on"):
        SimulatedFinetuner().train(job[0], tmp_path / "empty.parquet", make_work(tmp_path / "work"))


def test_a_trainer_that_only_simulates_loads_no_heavy_library(job: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from cluster.trainers import TrainerActor
from engines.types import TrainSpec
spec = TrainSpec("none", "base", simulated_tokens_per_s=1e9)
print(TrainerActor().train(spec, sys.argv[1], sys.argv[2]).rows)
print(sorted({"torch", "trl", "peft", "transformers", "vllm"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code, str(job[1]), str(make_work(tmp_path / "work"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["12", "[]"]
