"""The embedded student: its files, its tasks, two engines that agree on it, and the demonstration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.nano import tasks as made
from engines.models import tensor_shapes
from engines.tokenizer import load_tokenizer
from selfguide import nano
from selfguide.api import load_student
from selfguide.nano import demo
from selfguide.prompts import Prompts
from selfguide.protocols import test_instances as held_out_rows
from selfguide.recipefile import load_recipe
from selfguide.tasks import load_task

NUM_PROMPTS = 200
MAX_TOKENS = 8
SMALL = {
    "engine.kind": "simulated", "synthesis.num_candidates": 60, "finetuning.simulated_tokens_per_s": 1e6,
    "finetuning.min_steps": 0, "finetuning.min_rows": 1, "filters.vote": {"min_share": 0.0},
    "evaluation.num_instances": 20, "filters.pairs": [],
    "filters.classification": {"samples": [], "pairs": [], "sets": []}, "evaluation.bootstrap_samples": 100,
}  # fmt: skip

BY_VLLM = """
import asyncio, json, sys
from engines.types import EngineSpec, Request, Sampling
from engines.vllm_engine import VllmEngine

async def answer(folder, prompts, max_tokens):
    engine = VllmEngine(EngineSpec(model=folder, max_model_len=1024, max_num_seqs=64, max_loras=0))
    rows = [Request(str(i), ids, Sampling(temperature=0.0, max_tokens=max_tokens)) for i, ids in enumerate(prompts)]
    found = {}
    async for outcomes in engine.generate(rows):
        found |= {one.id: list(one.samples[0].token_ids) for one in outcomes}
    engine.close()
    return [found[str(i)] for i in range(len(rows))]

if __name__ == "__main__":
    print(json.dumps(asyncio.run(answer(*json.load(sys.stdin)))))
"""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """As evaluation asks, of held-in tasks of both kinds."""
    student = load_student(load_recipe("nano"))
    found = []
    names = sorted(made.HELD_IN)
    for name in names:
        task = load_task(nano.TASKS / f"{name}.json")
        asking = Prompts(task, student.tokenizer, student.max_model_len, chat=False)
        instances = task.instances[: -(-NUM_PROMPTS // len(names))]
        found += [list(asking.answer(one.input, MAX_TOKENS, None).ids) for one in instances]
    return found[:NUM_PROMPTS]


def test_it_is_as_small_as_its_card_says() -> None:
    shapes = tensor_shapes(nano.STUDENT)
    parameters = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    assert 2.3e6 < parameters < 2.5e6
    assert (nano.STUDENT / "model.safetensors").stat().st_size < 5e6
    assert not list(nano.STUDENT.glob("*.bin")) + list(nano.STUDENT.glob("*.py"))
    text = "the driver ate a frozen mango, Grüße 42"
    tokenizer = load_tokenizer(str(nano.STUDENT))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_tasks_are_those_that_the_code_makes() -> None:
    names = sorted(made.HELD_IN | made.HELD_OUT)
    assert sorted(path.stem for path in nano.TASKS.glob("*.json")) == names
    for name in names:
        assert json.loads((nano.TASKS / f"{name}.json").read_text()) == made.build(name)
    assert set(nano.DEMO_TASKS) <= set(made.HELD_OUT)


def test_transformers_and_vllm_agree_on_its_greedy_answers(prompts: list[list[int]], tmp_path: Path) -> None:
    script = tmp_path / "answer.py"
    script.write_text(BY_VLLM)
    said = json.dumps([str(nano.STUDENT), prompts, MAX_TOKENS])
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, check=True, cwd=Path(made.__file__).parents[2]
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(theirs) == NUM_PROMPTS
    check_greedy(prompts, theirs)


def check_greedy(prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Each token is the likeliest after all before it, by plain transformers; only the last one ends the text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nano.STUDENT, dtype=torch.float32)
    ends, threads = model.config.eos_token_id, torch.get_num_threads()
    torch.set_num_threads(1)  # for layers this small they mostly wait for each other
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
        assert answer == logits.argmax(-1).tolist()
        assert ends not in answer[:-1]
        assert answer[-1] == ends or len(answer) == MAX_TOKENS
    torch.set_num_threads(threads)


async def test_the_demonstration_measures_all_its_tasks_and_goes_on(
    ray_cluster: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparisons = await demo.run_demo(tmp_path, lambda *_: None, SMALL)
    found = demo.document(comparisons)
    assert [line["task"] for line in found["tasks"]] == list(nano.DEMO_TASKS)
    for line, one in zip(found["tasks"], comparisons, strict=True):
        task = load_task(nano.TASKS / f"{line['task']}.json")
        assert line["n"] == len(held_out_rows(task, load_recipe("nano", SMALL).evaluation, 0)) == 20
        ours = [row["exact_match"] for row in one.evaluations["self_guide"].rows()]
        bar = line["exact_match"].get(line["bar"], 100 / max(1, len(task.labels)))
        assert line["gain"] == pytest.approx(100 * sum(ours) / 20 - bar, abs=0.06)
        assert bar >= max(line["exact_match"].get(name, 0) for name in ("filtered_decoding", "constrained_labels"))
    assert found["gain"]["low"] <= found["gain"]["mean"] <= found["gain"]["high"]
    again = await demo.run_demo(tmp_path, lambda *_: None, SMALL)
    assert [one.adapter.ref for one in again] == [one.adapter.ref for one in comparisons]
    demo.show(found, tmp_path / "report.md")
    shown = capsys.readouterr().out
    assert all(name in shown for name in nano.DEMO_TASKS)
    assert str(tmp_path / "report.md") in shown


@pytest.mark.parametrize(
    ("low", "high", "word"), [(2.0, 6.0, " more "), (-6.0, -2.0, " fewer "), (-1.0, 5.0, "neither surely")]
)
def test_the_sentence_says_what_the_interval_allows(low: float, high: float, word: str) -> None:
    said = demo.sentence({"gain": {"mean": (low + high) / 2, "low": low, "high": high, "n": 1200}})
    assert word in said
    assert "1200 questions" in said
