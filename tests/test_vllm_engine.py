"""The real vLLM engine, through the pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engines.types import AdapterRef, Completion, Outcome, Request, RequestFailed, Sampling, Score, ScoreRequest, Work
from selfguide.api import Session

A_BLOCK = 128  # tokens in a block of the prefix cache on CPUs
LETTERS = [ord(letter) - ord("!") for letter in "etaoinshrdlu"]  # ids of the byte-level tokenizer


def text_ids(seed: int, length: int) -> list[int]:
    return [LETTERS[(seed * 7 + i * i + i // 5) % len(LETTERS)] for i in range(length)]


@pytest.fixture(scope="module")
def adapter(write_lora: Callable[..., AdapterRef], tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    return write_lora(tmp_path_factory.mktemp("lora") / "a", seed=1)


@pytest.fixture(scope="module")
def other_adapter(write_lora: Callable[..., AdapterRef], tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    return write_lora(tmp_path_factory.mktemp("lora") / "b", seed=2)


def reference_logprobs(base: Path, adapter: AdapterRef | None, prefix: list[int], completion: list[int]) -> list[float]:
    """Log-probabilities of the completion's tokens by transformers, the adapter added to the weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        weights = load_file(Path(adapter.url) / "adapter_model.safetensors")
        scale = json.loads((Path(adapter.url) / "adapter_config.json").read_text())["lora_alpha"] / adapter.rank
        for name in [name for name in weights if ".lora_A." in name]:
            module = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            module.weight.data += scale * weights[name.replace(".lora_A.", ".lora_B.")] @ weights[name]
    ids = torch.tensor([[*prefix, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prefix) - 1 : -1]
    picked = torch.log_softmax(logits, -1).gather(1, ids[0, len(prefix) :, None])
    return [float(value) for value in picked[:, 0]]


async def ask(session: Session, rows: Sequence[Work]) -> dict[str, Outcome]:
    """Answers by id; no engine may die of what is asked here."""
    deaths = session.pool.counts.deaths
    answers = {outcome.id: outcome async for outcome in session.pool.generate(rows)}
    assert answers.keys() == {row.id for row in rows}
    assert session.pool.counts.deaths == deaths
    return answers


async def sample(session: Session, *requests: Request) -> list[Completion]:
    answers = await ask(session, requests)
    completions = [answers[request.id] for request in requests]
    assert all(isinstance(one, Completion) for one in completions), completions
    return completions  # type: ignore[return-value]


async def score(session: Session, *requests: ScoreRequest) -> list[tuple[float, ...]]:
    answers = await ask(session, requests)
    return [one.token_logprobs for one in (answers[r.id] for r in requests) if isinstance(one, Score)]


def close_to(values: Sequence[float]) -> object:
    return pytest.approx(values, abs=1e-3)


async def test_seeds_reproduce(vllm_session: Session) -> None:
    def requests(name: str) -> list[Request]:
        return [Request(f"{name}-{i}", text_ids(i, 40), Sampling(max_tokens=24, seed=i // 2)) for i in range(16)]

    first = await sample(vllm_session, *requests("first"))
    second = await sample(vllm_session, *requests("second"))
    assert [one.samples for one in first] == [one.samples for one in second]
    same_prompt = [Request(f"s{seed}", text_ids(0, 40), Sampling(max_tokens=24, seed=seed)) for seed in range(4)]
    assert len({one.samples[0].text for one in await sample(vllm_session, *same_prompt)}) == 4


async def test_n_samples_are_those_of_neighbouring_seeds(vllm_session: Session) -> None:
    """Why rows' seeds are hashed: seed s + 1 would share samples with seed s."""
    ids = text_ids(3, 40)
    many = Request("many", ids, Sampling(n=4, max_tokens=16, seed=50))
    single = [Request(f"one-{k}", ids, Sampling(max_tokens=16, seed=50 + k)) for k in range(4)]
    [completion, *others] = await sample(vllm_session, many, *single)
    assert len({one.text for one in completion.samples}) == 4
    assert completion.samples == tuple(one.samples[0] for one in others)


async def test_choices_constrain_the_answer(vllm_session: Session) -> None:
    choices = ("positive", "negative", "neither")
    sampling = [Sampling(n=8, max_tokens=12, seed=i, choices=choices) for i in range(4)]
    completions = await sample(vllm_session, *(Request(f"c{i}", text_ids(i, 30), s) for i, s in enumerate(sampling)))
    samples = [one for completion in completions for one in completion.samples]
    assert {one.text for one in samples} == set(choices)
    assert {one.finish_reason for one in samples} == {"stop"}


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(vllm_session: Session) -> None:
    requests = [Request(f"r{i}", text_ids(i, 30), Sampling(max_tokens=60, seed=i, stop=("e",))) for i in range(8)]
    samples = [one.samples[0] for one in await sample(vllm_session, *requests)]
    assert any(one.finish_reason == "stop" for one in samples)
    assert not any("e" in one.text for one in samples)


@pytest.mark.parametrize("bad_ids", [[65] * 9000, [10**6], [-1], []], ids=["too long", "unknown", "negative", "empty"])
async def test_a_bad_prompt_fails_alone(vllm_session: Session, bad_ids: list[int]) -> None:
    rows: list[Work] = [Request(f"r{i}", text_ids(i, 30), Sampling(max_tokens=8, seed=i)) for i in range(8)]
    rows.insert(4, Request("bad", bad_ids, Sampling(max_tokens=8)))
    rows.append(ScoreRequest("bad-score", bad_ids, [65]))
    answers = await ask(vllm_session, rows)
    failed = {name: one for name, one in answers.items() if isinstance(one, RequestFailed)}
    assert failed.keys() == {"bad", "bad-score"}
    assert {one.error for one in failed.values()} == {"refused"}
    assert all(one.message for one in failed.values())


async def test_nothing_to_score_is_refused(vllm_session: Session) -> None:
    answers = await ask(vllm_session, [ScoreRequest("a", [65], []), ScoreRequest("b", [65], [66])])
    assert isinstance(answers["a"], RequestFailed)
    assert isinstance(answers["b"], Score)


async def test_scores_are_those_of_transformers(vllm_session: Session, random_student: Path) -> None:
    """Also where the cache holds the whole row: then its log-probabilities are leftovers, and it is scored anew."""
    prefix, completion = text_ids(1, 2 * A_BLOCK + 40), text_ids(2, 2 * A_BLOCK)
    expected = reference_logprobs(random_student, None, prefix, completion)
    first, short = await score(
        vllm_session, ScoreRequest("r", prefix, completion), ScoreRequest("s", prefix, completion[:3])
    )
    [again] = await score(vllm_session, ScoreRequest("again", prefix, completion))
    assert first == close_to(expected)
    assert short == close_to(expected[:3])
    assert again == close_to(expected)


async def test_scores_of_an_adapter_are_those_of_transformers(
    vllm_session: Session, random_student: Path, adapter: AdapterRef
) -> None:
    prefix, completion = text_ids(4, 50), text_ids(5, 20)
    tuned, base = await score(
        vllm_session, ScoreRequest("t", prefix, completion, adapter), ScoreRequest("b", prefix, completion)
    )
    assert tuned == close_to(reference_logprobs(random_student, adapter, prefix, completion))
    assert base == close_to(reference_logprobs(random_student, None, prefix, completion))
    assert tuned != close_to(base)


async def test_a_samples_logprob_is_the_sum_over_its_tokens(vllm_session: Session) -> None:
    prompt = text_ids(6, 40)
    [completion] = await sample(vllm_session, Request("r", prompt, Sampling(n=3, max_tokens=12, seed=5, logprobs=True)))
    rows = [ScoreRequest(f"s{k}", prompt, one.token_ids) for k, one in enumerate(completion.samples)]
    sums = [sum(logprobs) for logprobs in await score(vllm_session, *rows)]
    assert [one.logprob for one in completion.samples] == close_to(sums)


async def test_a_shared_prefix_is_read_from_the_cache(vllm_session: Session) -> None:
    prefix = text_ids(9, 3 * A_BLOCK)
    sampling = Sampling(max_tokens=4, seed=0)
    [first] = await sample(vllm_session, Request("first", [*prefix, *text_ids(1, 10)], sampling))
    [second] = await sample(vllm_session, Request("second", [*prefix, *text_ids(2, 10)], sampling))
    assert first.cached_tokens < A_BLOCK
    assert second.cached_tokens == 3 * A_BLOCK


async def test_adapters_and_base_share_a_batch(
    vllm_session: Session, adapter: AdapterRef, other_adapter: AdapterRef
) -> None:
    refs = [None, adapter, other_adapter]
    sampling = Sampling(temperature=0.0, max_tokens=16)
    rows = [Request(f"{n}-{i}", text_ids(i, 40), sampling, ref) for i in range(8) for n, ref in enumerate(refs)]
    mixed = await sample(vllm_session, *rows)
    apart = {one.id: one for ref in refs for one in await sample(vllm_session, *(r for r in rows if r.adapter == ref))}
    assert [one.samples for one in mixed] == [apart[row.id].samples for row in rows]
    for i in range(8):
        assert len({apart[f"{n}-{i}"].samples[0].text for n in range(3)}) == 3


async def test_scoring_an_adapter_beside_sampling_does_not_kill_the_engine(
    vllm_session: Session, adapter: AdapterRef
) -> None:
    """It did: prompt log-probabilities of several rows in one step, with a LoRA wrapper around the output head."""
    rows: list[Work] = [ScoreRequest(f"s{i}", text_ids(i, 30 + i), text_ids(i + 1, 8), adapter) for i in range(40)]
    rows += [Request(f"r{i}", text_ids(i, 30), Sampling(n=2, max_tokens=32, seed=i), adapter) for i in range(40)]
    answers = await ask(vllm_session, [row for pair in zip(rows[:40], rows[40:], strict=True) for row in pair])
    assert not [one for one in answers.values() if isinstance(one, RequestFailed)]


async def test_seeded_sampling_of_long_prompts_does_not_kill_the_engine(vllm_session: Session) -> None:
    """It did on CPUs, where a prompt was cut into chunks: their generators have no offset."""
    rows = [Request(f"r{i}", text_ids(i, 3000 + 17 * i), Sampling(max_tokens=8, seed=i)) for i in range(6)]
    assert len(await sample(vllm_session, *rows)) == 6


async def test_leaving_a_channel_stops_what_it_was_waiting_for(vllm_session: Session) -> None:
    pool, most = vllm_session.pool, 8000
    before = (await pool.stats())[0].output_tokens
    async with pool.channel() as channel:
        channel.send([Request(f"long-{i}", text_ids(i, 30), Sampling(max_tokens=most, seed=i)) for i in range(4)])
        while (await pool.stats())[0].in_flight < 4:
            await asyncio.sleep(0.01)
    while (await pool.stats())[0].in_flight:
        await asyncio.sleep(0.05)
    assert (await pool.stats())[0].output_tokens - before < 2 * most


async def test_an_actor_names_its_processes(vllm_session: Session) -> None:
    """Its own first, and the core's, wherever in the process it was started."""
    actor, *others = await vllm_session.pool._lanes[0].host.actor.pids.remote()
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in (actor, *others)}
    assert commands[actor].startswith("ray::EngineActor")
    assert [one for pid, one in commands.items() if pid != actor and one.startswith("VLLM::EngineCore")], commands


async def test_adapters_come_while_others_are_at_work(
    vllm_session: Session, write_lora: Callable[..., AdapterRef], tmp_path: Path
) -> None:
    """More of them than the engine has slots, each with the first of its rows, while others decode."""
    refs = [None, *(write_lora(tmp_path / str(seed), seed=300 + seed) for seed in range(12))]
    sampling = Sampling(temperature=0.0, max_tokens=48, logprobs=True)
    rows = [[Request(f"{n}-{i}", text_ids(i, 40), sampling, ref) for i in range(6)] for n, ref in enumerate(refs)]

    async def ask_one(number: int) -> list[float | None]:
        return [one.samples[0].logprob for one in await sample(vllm_session, *rows[number])]

    async def come(number: int) -> list[float | None]:
        await asyncio.sleep(0.15 * number)
        return await ask_one(number)

    async def untuned(beside: asyncio.Future[list[list[float | None]]]) -> list[list[float | None]]:
        answers = []
        while not beside.done():
            answers.append(await ask_one(0))
        return answers

    tuned = asyncio.gather(*map(come, range(1, len(refs))))
    base, together = await asyncio.gather(untuned(tuned), tuned)
    base_alone, *alone = [await ask_one(number) for number in range(len(refs))]
    assert len({round(one[0] or 0.0, 1) for one in (base_alone, *alone)}) > len(alone) // 2, (
        "too much alike to be told apart"
    )
    assert together == [pytest.approx(some, abs=1e-2) for some in alone]
    assert base == [pytest.approx(base_alone, abs=1e-2)] * len(base)
