"""Labels by one pass: their log-probabilities, calibration over a set, and the controls that go with them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from engines.random_model import make_random_model
from engines.tokenizer import Tokenizer
from engines.types import (
    AdapterRef,
    ChoiceRequest,
    ChoiceScores,
    Completion,
    Request,
    Sampling,
    Score,
    ScoreRequest,
    Work,
)
from selfguide import api
from selfguide.api import Session
from selfguide.calibration import calibrate, likeliest, standardise
from selfguide.curation import curate
from selfguide.errors import UserError
from selfguide.evaluation import evaluate, evaluation_stage
from selfguide.filters import Context, Margin
from selfguide.finetuning import gold_finetuning_stage
from selfguide.methods import Comparison, untuned_protocols, wanted_controls
from selfguide.preview import preview_in, show_preview
from selfguide.prompts import Prompts
from selfguide.recipefile import load_recipe
from selfguide.records import ACCEPTED, FAILED, REJECTED, Ledger
from selfguide.report import read_report
from selfguide.store import SHARD_ROWS, RunStore
from selfguide.synthesis import synthesis_stage, synthesize
from selfguide.taskrun import Progress, TaskRun
from selfguide.tasks import Task, load_task

EXAMPLES = Path(api.__file__).parent / "examples"
SENTIMENT, TIME_FIRST = (load_task(EXAMPLES / f"{name}.json") for name in ("sentiment", "time_first"))
CALIBRATED: dict[str, Any] = {
    "engine.kind": "simulated", "annotation.mode": "calibrated", "synthesis.num_candidates": 150, "synthesis.lag": 16,
    "filters.inputs": [{"name": "finished"}, {"name": "duplicate"}],
}  # fmt: skip
ALL_CONTROLS = ["few_shot_icl", "filtered_decoding", "constrained_labels", "calibrated_labels", "few_shot_sft"]
Open = Callable[..., AbstractAsyncContextManager[Session]]


# ---- what an engine says


def reference_logprobs(model: Any, prefix: list[int]) -> np.ndarray[Any, Any]:
    """All next-token log-probabilities by transformers."""
    import torch

    with torch.no_grad():
        found: np.ndarray[Any, Any] = torch.log_softmax(
            model(input_ids=torch.tensor([prefix])).logits[0, -1], -1
        ).numpy()
    return found


async def ask(session: Session, work: Sequence[Work]) -> dict[str, Any]:
    return {outcome.id: outcome async for outcome in session.pool.generate(work)}


async def test_one_pass_gives_what_scoring_and_transformers_give(vllm_session: Session, random_student: Path) -> None:
    """In steps shared with sampled and scored rows, and with rows that ask for other numbers of tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    encode = vllm_session.student.tokenizer.encode
    prompts = [encode(f"{'A review of some length. ' * (n % 9)}Row {n}\nOutput:") for n in range(24)]
    labels = [encode(text) for text in ("positive", "negative", "so-so", "A", "b", "Z")]
    work: list[Work] = []
    for n, ids in enumerate(prompts):
        choices = labels[: 2 + n % 5]
        work.append(ChoiceRequest(f"c{n}", ids, choices))
        work += [ScoreRequest(f"s{n}-{k}", ids, choice[:1]) for k, choice in enumerate(choices)]
        work.append(Request(f"r{n}", ids, Sampling(n=2, max_tokens=6, seed=n, logprobs=n % 2 == 0)))
    answers = await ask(vllm_session, work)
    model = AutoModelForCausalLM.from_pretrained(random_student, dtype=torch.float32)
    for n, ids in enumerate(prompts):
        found = answers[f"c{n}"]
        assert isinstance(found, ChoiceScores)
        scored = [answers[f"s{n}-{k}"].token_logprobs[0] for k in range(2 + n % 5)]
        assert found.logprobs == pytest.approx(scored, abs=1e-4)
        expected = reference_logprobs(model, ids)[[label[0] for label in labels[: 2 + n % 5]]]
        assert found.logprobs == pytest.approx(list(expected), abs=1e-4)
        assert isinstance(answers[f"r{n}"], Completion)
        assert (answers[f"r{n}"].samples[0].logprob is not None) == (n % 2 == 0)


async def test_labels_that_begin_alike_are_scored_whole(vllm_session: Session) -> None:
    encode = vllm_session.student.tokenizer.encode
    prefix, choices = encode("A review.\nOutput:"), [encode(text) for text in (" good", " great", " bad")]
    request = ChoiceRequest("c", prefix, choices)
    assert not request.one_pass
    answers = await ask(vllm_session, [request, *(ScoreRequest(f"s{k}", prefix, ids) for k, ids in enumerate(choices))])
    scores = [answers[f"s{k}"] for k in range(3)]
    assert all(isinstance(one, Score) for one in scores)
    assert answers["c"].logprobs == pytest.approx([sum(one.token_logprobs) for one in scores], abs=1e-4)


async def test_an_adapter_weighs_in(
    vllm_session: Session, write_lora: Callable[..., AdapterRef], tmp_path: Path
) -> None:
    adapter, ids = write_lora(tmp_path / "lora", seed=5), vllm_session.student.tokenizer.encode("A review.")
    work = [ChoiceRequest(f"c{n}", ids, [[65], [66, 67]], adapter if n % 2 else None) for n in range(8)]
    work += [ScoreRequest("s", ids, [65], adapter)]  # type: ignore[list-item]
    answers = await ask(vllm_session, work)
    assert answers["c1"].logprobs[0] == pytest.approx(answers["s"].token_logprobs[0], abs=1e-4)
    assert abs(answers["c0"].logprobs[0] - answers["c1"].logprobs[0]) > 1e-3


async def test_nothing_to_weigh_fails_alone(vllm_session: Session) -> None:
    work = [
        ChoiceRequest("a", [], [[65]]),
        ChoiceRequest("b", [65], [[65], []]),
        ChoiceRequest("c", [65], [[65], [66]]),
    ]
    answers = await ask(vllm_session, work)
    assert [type(answers[name]).__name__ for name in "abc"] == ["RequestFailed", "RequestFailed", "ChoiceScores"]


# ---- the tokens of a label


@pytest.mark.parametrize("chat", [False, True])
def test_label_tokens_are_those_of_a_training_row(random_student: Path, tmp_path: Path, chat: bool) -> None:
    tokenizer = Tokenizer(str(make_random_model(tmp_path / "chat", chat=True) if chat else random_student))
    prompts = Prompts(SENTIMENT, tokenizer, 8192, chat=chat)
    for label, ids in zip(SENTIMENT.labels, prompts.label_ids, strict=True):
        row, cut = prompts.training("Some input.", label, 8192, None)
        assert list(row[cut : cut + len(ids)]) == ids
        assert tokenizer.decode(row[cut + len(ids) :], specials=True) == tokenizer.eos_text
        assert row[:cut] == prompts.answer("Some input.", 100).ids
    assert prompts.label_room == 1 + max(map(len, prompts.label_ids))


def test_a_label_that_begins_another_is_weighed_with_its_end(random_student: Path) -> None:
    tokenizer = Tokenizer(str(random_student))
    prompts = Prompts(replace(SENTIMENT, labels=("likely", "likely not")), tokenizer, 8192, chat=False)
    assert [ids[-1] for ids in prompts.label_ids] == [tokenizer.eos_id] * 2


# ---- calibration


def biased(rows: int = 400, bias: float = 3.0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Log-probabilities of three labels that tell the truth, but for a love of the first."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, rows)
    evidence = draw.normal(0, 0.3, (rows, 3)) + 1.5 * np.eye(3)[truth]
    return evidence + np.array([bias, 0.0, 0.0]), truth


def test_a_biased_student_is_corrected() -> None:
    logprobs, truth = biased()
    labels = ("a", "b", "c")
    raw = [likeliest(row, labels) for row in logprobs.tolist()]
    elected = calibrate(logprobs.tolist(), labels)
    assert set(raw) == {"a"}
    right = np.mean([labels.index(one.label) == number for one, number in zip(elected, truth, strict=True)])
    assert right > 0.93
    wrong = [one.margin for one, number in zip(elected, truth, strict=True) if labels.index(one.label) != number]
    assert np.mean(wrong or [0.0]) < np.mean([one.margin for one in elected])


def test_scores_are_standard_and_blind_to_bias_and_scale_of_rows() -> None:
    logprobs, _ = biased(bias=0.0)
    scores = standardise(logprobs)
    assert scores.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-9)
    assert scores.std(axis=0) == pytest.approx(np.ones(3))
    shifted = logprobs + np.arange(len(logprobs))[:, None]  # what is common to a row says nothing about its label
    assert standardise(shifted) == pytest.approx(scores)


def test_no_spread_no_rows_and_no_probability() -> None:
    labels = ("a", "b")
    assert calibrate([], labels) == []
    assert [one.margin for one in calibrate([[-1.0, -3.0]] * 5, labels)] == [0.0] * 5
    assert {one.label for one in calibrate([[-1.0, -3.0]] * 5, labels)} == {"a"}
    lost = calibrate([[-1.0, float("-inf")], [-1.0, -1.2], [-1.0, -0.8], [-2.0, -0.5]], labels)
    assert [one.label for one in lost] == ["a", "b", "b", "b"]
    assert all(np.isfinite(one.margin) for one in lost)


@given(st.permutations(range(40)))
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    logprobs, _ = biased(rows=40)
    labels = ("a", "b", "c")
    straight, mixed = calibrate(logprobs.tolist(), labels), calibrate(logprobs[order].tolist(), labels)
    assert [mixed[order.index(n)].label for n in range(40)] == [one.label for one in straight]
    assert [mixed[order.index(n)].margin for n in range(40)] == pytest.approx([one.margin for one in straight])


# ---- the margin filter


def margins(one: Margin, texts: str, values: Sequence[float | None]) -> list[str | None]:
    context = Context((), (), (), (), ("a", "b"), 0)
    table = pl.DataFrame({"row": range(len(texts)), "text": list(texts), "margin": pl.Series(values, dtype=pl.Float64)})
    return one.reasons(table, context).to_list()


def test_margin_keeps_a_share_of_each_label() -> None:
    found = margins(Margin(keep=0.5), "aabbbaa", [0.1, 0.9, 0.2, 3.0, 2.0, 0.9, 0.5])
    assert [why is None for why in found] == [False, True, False, True, True, True, False]
    assert found[0] == "margin 0.1, below the highest 50% of a"
    assert margins(Margin(keep=1.0), "aab", [0.1, 0.2, 0.3]) == [None] * 3
    assert [why is None for why in margins(Margin(keep=0.01), "aab", [1.0, 1.0, 0.0])] == [True, False, True]
    assert margins(Margin(keep=0.1), "aaab", [None] * 4) == [None] * 4
    assert sum(why is None for why in margins(Margin(keep=0.1), "a" * 30, [float(n) for n in range(30)])) == 3


def test_margin_without_calibration_is_a_mistake() -> None:
    for chain in ("filters.sets", "filters.classification.sets"):
        with pytest.raises(UserError, match=r"margin filter needs annotation\.mode: calibrated"):
            load_recipe("smoke", {chain: [{"name": "margin"}]})
        load_recipe("smoke", {chain: [{"name": "margin"}], "annotation.mode": "calibrated"})


# ---- annotation


@pytest_asyncio.fixture(scope="module")
async def one_engine(open_simulated: Open) -> AsyncIterator[Session]:
    async with open_simulated() as session:
        yield session


@pytest_asyncio.fixture(scope="module")
async def slow_engines(open_simulated: Open) -> AsyncIterator[Session]:
    """Answers overtake each other; a tenth of the prompts is refused."""
    changes = {"cluster.num_engines": 3, "engine.tokens_per_s": 3000.0, "engine.max_num_seqs": 20}
    async with open_simulated(**changes) as session:
        yield session


def make_run(
    session: Session, out: Path, task: Task = SENTIMENT, progress: Progress = lambda *_: None, **changes: Any
) -> TaskRun:
    recipe = load_recipe("smoke", CALIBRATED | {key.replace("__", "."): value for key, value in changes.items()})
    return replace(session, recipe=recipe).task_run(task, RunStore(out), progress)


@pytest.mark.parametrize("orders", [1, 3])
async def test_calibrated_rows_do_not_depend_on_who_answers_and_when(
    one_engine: Session, slow_engines: Session, tmp_path: Path, orders: int
) -> None:
    calm, busy = [
        make_run(session, tmp_path / name, annotation__label_orders=orders)
        for name, session in (("calm", one_engine), ("busy", slow_engines))
    ]
    first, second = await synthesize(calm), await synthesize(busy)
    assert second.digest == first.digest
    assert (await curate(busy, second)).rows() == (await curate(calm, first)).rows()
    for row in first.rows():
        accepted = row["state"] == ACCEPTED
        assert row["samples"] is None
        assert (row["label_logprobs"] is not None) == accepted
        assert not accepted or len(row["label_logprobs"]) == 2


async def test_curation_elects_over_the_whole_set(one_engine: Session, tmp_path: Path) -> None:
    filters: dict[str, Any] = {
        "filters__classification__pairs": [{"name": "agreement"}],
        "filters__classification__sets": [{"name": "margin", "keep": 0.25}],
    }
    run = make_run(one_engine, tmp_path, synthesis__target_rows=10, **filters)
    candidates = await synthesize(run)
    assert len(candidates.rows()) == 150, "no target stops it"
    assert candidates.marker["enough"] is False
    accepted = [row for row in candidates.rows() if row["state"] == ACCEPTED]
    elected = calibrate([row["label_logprobs"] for row in accepted], SENTIMENT.labels)
    rows = (await curate(run, candidates)).rows()
    Ledger.of(rows).reconcile(len(accepted))
    assert [(row["row"], row["output"], row["margin"]) for row in rows] == [
        (row["row"], one.label, one.margin) for row, one in zip(accepted, elected, strict=True)
    ]
    agreed = [row for row in rows if row["output"] == row["label"]]
    assert {row["filter"] for row in rows if row["state"] == REJECTED} == {"agreement", "margin"}
    assert all((row["filter"] == "agreement") == (row["output"] != row["label"]) for row in rows)
    for label in SENTIMENT.labels:
        own = sorted((row["margin"] for row in agreed if row["output"] == label), reverse=True)
        stay = sorted(
            (row["margin"] for row in rows if row["state"] == ACCEPTED and row["output"] == label), reverse=True
        )
        assert stay == own[: -(-len(own) // 4)]


async def test_generation_tasks_are_sampled_in_either_mode(one_engine: Session, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"synthesis__num_candidates": 64, "synthesis__target_rows": 20}
    calibrated = await synthesize(make_run(one_engine, tmp_path / "a", TIME_FIRST, **changes))
    sampled = await synthesize(make_run(one_engine, tmp_path / "b", TIME_FIRST, annotation__mode="sample", **changes))
    assert [row["samples"] for row in calibrated.rows()] == [row["samples"] for row in sampled.rows()]
    assert calibrated.path.name != sampled.path.name
    assert {row["label_logprobs"] is None for row in calibrated.rows()} == {True}


async def test_a_preview_shows_what_was_elected(
    one_engine: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("smoke", CALIBRATED | {"annotation.label_orders": 2})
    document = await preview_in(replace(one_engine, recipe=recipe), SENTIMENT, 4)
    pairs = [row["pair"] for row in document["rows"] if row["pair"]]
    assert pairs
    assert all(pair["output"] in SENTIMENT.labels and pair["margin"] >= 0 for pair in pairs)
    show_preview(document)
    assert f"{pairs[0]['margin']:.2f} standard units ahead of the second label" in capsys.readouterr().out


class Stopped(Exception):
    """Somebody pulled the plug."""


async def test_a_stopped_calibrated_run_goes_on_to_the_same_rows(open_simulated: Open, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"synthesis__max_failed_share": 1, "annotation__label_orders": 2}

    def stop(task: str, stage: str, counts: dict[str, Any]) -> None:
        if counts["rows"] >= SHARD_ROWS:
            raise Stopped

    async with open_simulated(**{"engine.faults": {"refuse_share": 0.1}}) as session:
        calm = await synthesize(make_run(session, tmp_path / "calm", **changes))
        cut = make_run(session, tmp_path / "cut", progress=stop, **changes)
        with pytest.raises(Stopped):
            await synthesize(cut)
        assert len(synthesis_stage(cut).committed()) == SHARD_ROWS
        again = await synthesize(make_run(session, tmp_path / "cut", **changes))
    assert again.digest == calm.digest
    rows = again.rows()
    Ledger.of(rows).reconcile(150)
    ends = Counter(row["filter"] or row["state"] for row in rows)
    assert {"refused", "accepted"} <= ends.keys()
    assert any(row["state"] == FAILED and row["input"] for row in rows), "some fail in annotation"


async def test_samples_are_spread_over_orders(one_engine: Session, tmp_path: Path) -> None:
    asked: dict[int, Any] = {}
    for orders in (1, 3):
        run = make_run(one_engine, tmp_path, TIME_FIRST, annotation__orders=orders, synthesis__num_candidates=30)
        asked[orders] = (await synthesize(run)).rows()
    for one, spread in zip(asked[1], asked[3], strict=True):
        if one["samples"] is not None:
            assert len(one["samples"]) == len(spread["samples"]) == 4
            assert one["samples"][:2] == spread["samples"][:2], "the task's own order has two of the four"
            assert one["samples"][2:] != spread["samples"][2:]


def test_orders_are_different_and_fixed(random_student: Path) -> None:
    prompts = Prompts(SENTIMENT, Tokenizer(str(random_student)), 8192, chat=False)
    orders = prompts.answer_orders(5)
    assert orders[0] == (0, 1, 2)
    assert len(set(orders)) == 5
    assert orders == prompts.answer_orders(5)
    assert prompts.answer_orders(2) == orders[:2]
    assert len(set(prompts.answer_orders(24))) == 6, "three examples have six orders"
    texts = {prompts.answer("Some input.", 10, order=order).text for order in orders}
    assert len(texts) == 5
    assert prompts.answer("Some input.", 10, order=orders[0]) == prompts.answer("Some input.", 10)


# ---- the controls


@pytest_asyncio.fixture(scope="module")
async def compared(
    one_engine: Session, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Path, Comparison, TaskRun]]:
    """A whole run with every control; trainers are real."""
    folder = tmp_path_factory.mktemp("controls") / "run"
    settings = CALIBRATED | {"model.path": one_engine.student.folder, "evaluation.controls": ALL_CONTROLS}
    settings |= {"synthesis.num_candidates": 40, "finetuning.epochs": 1, "finetuning.min_steps": 3}
    session = replace(one_engine, recipe=load_recipe("smoke", settings))
    comparison = await api.run(SENTIMENT, session.recipe, folder, session=session)
    yield folder, comparison, session.task_run(SENTIMENT, RunStore(folder), lambda *_: None)


async def test_controls_are_in_the_report(compared: tuple[Path, Comparison, TaskRun]) -> None:
    folder, comparison, _ = compared
    [line] = read_report(folder)["tasks"][0]["lines"]
    assert [one["method"] for one in line["methods"]] == ["base", *ALL_CONTROLS, "self_guide"]
    assert comparison.differences.keys() == {"base", *ALL_CONTROLS}
    assert line["funnel"][0]["rows"] == 40, "the funnel is the student's own"


async def test_label_controls_answer_with_labels(compared: tuple[Path, Comparison, TaskRun]) -> None:
    _, comparison, _run = compared
    raw, calibrated = (comparison.evaluations[name].rows() for name in ("constrained_labels", "calibrated_labels"))
    base = comparison.evaluations["base"].rows()
    labels = SENTIMENT.labels
    assert [row["prompt_tokens"] for row in raw] == [row["prompt_tokens"] for row in base]
    assert [row["label_logprobs"] for row in raw] == [row["label_logprobs"] for row in calibrated]
    assert [row["prediction"] for row in raw] == [likeliest(row["label_logprobs"], labels) for row in raw]
    elected = calibrate([row["label_logprobs"] for row in calibrated], labels)
    assert [row["prediction"] for row in calibrated] == [one.label for one in elected]
    assert [row["prediction"] for row in raw] != [row["prediction"] for row in calibrated]
    for row in (*raw, *calibrated):
        assert row["exact_match"] == float(row["prediction"] in row["references"])


async def test_few_shot_sft_leaves_the_answer_out_of_the_prompt(compared: tuple[Path, Comparison, TaskRun]) -> None:
    _, comparison, run = compared
    done = gold_finetuning_stage(run).done
    assert done is not None
    assert done.marker["train"]["steps"] >= 3
    assert comparison.evaluations["few_shot_sft"].marker["proof"]["adapter"] != comparison.adapter.ref.digest
    decode = run.student.tokenizer.decode
    for row, example in zip(done.rows(), SENTIMENT.examples, strict=True):
        prompt, answer = (
            decode(row["input_ids"][: row["prompt_tokens"]]),
            decode(row["input_ids"][row["prompt_tokens"] :]),
        )
        assert answer == f" {example.output}"
        assert prompt.endswith(f"Input: {example.input}\nOutput:")
        assert prompt.count(example.input) == 1
        assert all(
            f"Input: {one.input}\nOutput: {one.output}" in prompt for one in SENTIMENT.examples if one != example
        )


async def test_label_controls_are_left_out_of_generation_tasks(one_engine: Session, tmp_path: Path) -> None:
    run = make_run(one_engine, tmp_path, TIME_FIRST, evaluation__controls=ALL_CONTROLS)
    assert wanted_controls(run) == ("few_shot_icl", "filtered_decoding", "few_shot_sft")
    bare = make_run(one_engine, tmp_path, replace(SENTIMENT, instances=()), evaluation__controls=ALL_CONTROLS)
    assert "few_shot_sft" not in wanted_controls(bare)


async def test_calibrated_labels_resume_and_miss_what_does_not_fit(one_engine: Session, tmp_path: Path) -> None:
    """Shards hold the log-probabilities, so that a resumed evaluation calibrates over all rows, not the new ones."""
    one = SENTIMENT.instances[0]
    instances = tuple(replace(one, id=f"i{n}", input=f"{n}. {one.input}") for n in range(SHARD_ROWS + 20))
    instances = (replace(one, id="long", input="word " * 9000), *instances)
    task = replace(SENTIMENT, instances=instances, digest="many")

    def stop(task: str, stage: str, counts: dict[str, Any]) -> None:
        raise Stopped

    def run(name: str, progress: Progress = lambda *_: None) -> TaskRun:
        return make_run(one_engine, tmp_path / name, task, progress, evaluation__num_instances=len(instances))

    protocol = untuned_protocols(run("cut"))["calibrated_labels"]
    with pytest.raises(Stopped):
        await evaluate(cut := run("cut", stop), protocol)
    assert len(evaluation_stage(cut, protocol).committed()) == SHARD_ROWS
    again, whole = await asyncio.gather(evaluate(run("cut"), protocol), evaluate(run("calm"), protocol))
    assert again is not None
    assert whole is not None
    assert again.rows() == whole.rows()
    assert whole.marker["ledger"]["failed"] == {"prompt_too_long": 1}
    assert whole.rows()[0]["prediction"] == ""
    answered = whole.rows()[1:]
    elected = calibrate([row["label_logprobs"] for row in answered], SENTIMENT.labels)
    assert [row["prediction"] for row in answered] == [one.label for one in elected]
