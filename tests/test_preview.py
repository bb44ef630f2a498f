"""A preview shows the first rows of the run that would follow, obeys no text, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.random_model import make_random_model
from engines.tokenizer import load_tokenizer
from selfguide import cli
from selfguide.api import Session
from selfguide.preview import preview_in, show_preview
from selfguide.preview.shown import quote
from selfguide.prompts import Prompts
from selfguide.store import RunStore
from selfguide.synthesis import synthesize
from selfguide.tasks import Example, Task, load_task

EXAMPLES = Path(cli.__file__).parent / "examples"
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]
HOSTILE = "a\x1b[2Jb [bold]c[/bold]\r‮d <|end|> ⏎\x07"


@pytest.fixture
def task() -> Task:
    return load_task(EXAMPLES / "sentiment.json")


async def test_rows_are_the_first_of_the_run_that_would_follow(
    open_simulated: OpenSimulated, task: Task, tmp_path: Path
) -> None:
    async with open_simulated(**{"synthesis.num_candidates": 12, "synthesis.target_rows": None}) as session:
        document = await preview_in(session, task, 4)
        run = session.task_run(task, RunStore(tmp_path), lambda *_: None)
        rows = (await synthesize(run)).rows()[:4]
    shown = document["rows"]
    assert [one["label"] for one in shown] == [row["label"] for row in rows]
    assert [one["input"] for one in shown] == [row["input"] for row in rows]
    assert [[s["raw"].strip() for s in one["samples"]] for one in shown] == [
        [sample["text"] for sample in row["samples"] or []] for row in rows
    ]


async def test_prompts_are_cut_where_they_begin_to_vary(open_simulated: OpenSimulated, task: Task) -> None:
    async with open_simulated() as session:
        document = await preview_in(session, task, 3)
        tokenizer = session.student.tokenizer
    first, _, third = document["rows"]
    assert first["input_prompt"]["fixed"] == third["input_prompt"]["fixed"]  # smoke has two orders of gold examples
    assert first["input_prompt"]["varying"] == f"Output: {first['label']}\nInput:"
    assert first["output_prompt"]["varying"] == f" {first['input']}\nOutput:"
    assert first["output_prompt"]["fixed"].startswith(task.instruction)
    for prompt in (first["input_prompt"], first["output_prompt"], document["evaluation"]["prompt"]):
        assert len(tokenizer.encode(prompt["fixed"])) == prompt["fixed_tokens"]
        assert len(tokenizer.encode(prompt["varying"])) == prompt["varying_tokens"]
    later = document["later_prompt"]
    assert later["demonstrations"] == sum(bool(one["samples"]) for one in document["rows"])
    assert f"Input: {first['input']}\n\n" in later["varying"]


def test_of_fixed_parts_that_begin_alike_the_longest_counts(task: Task, random_student: Path) -> None:
    """A prompt with fewer demonstrations begins as one with more of them does."""
    tokenizer = load_tokenizer(str(random_student))
    prompts = Prompts(task, tokenizer, 8192, chat=False)
    shown = [prompts.answer("x", 8, count) for count in (0, 1, 3)]
    assert [len(one.ids) - prompts.num_fixed(one.ids) for one in shown] == [len(tokenizer.encode(" x\nOutput:"))] * 3
    assert prompts.num_fixed(tokenizer.encode("something else")) == 0


async def test_the_training_row_marks_what_bears_loss(open_simulated: OpenSimulated, task: Task) -> None:
    async with open_simulated() as session:
        document = await preview_in(session, task, 3)
    training = document["training"]
    kept = next(one for one in document["rows"] if one["pair"] and one["pair"]["state"] == "accepted")
    assert training["source"] == f"row {kept['row']}"
    assert training["loss"] == f" {kept['pair']['output']}<|end|>"
    assert training["prompt"].endswith(f"Input: {kept['input']}\nOutput:")
    assert training["loss_tokens"] == len(training["loss"].removesuffix("<|end|>")) + 1  # a byte is a token


async def test_verdicts_name_filter_and_reason(open_simulated: OpenSimulated, task: Task) -> None:
    """All answers are too short: nothing is elected, and a gold example stands in for the training row."""
    filters = {"filters.samples": [{"name": "noise", "words": ["positive", "negative"], "exempt_gold": False}]}
    async with open_simulated(**filters) as session:
        document = await preview_in(session, task, 2)
    row = document["rows"][0]
    assert {one["filter"] for one in row["samples"]} == {"noise"}
    assert row["pair"]["state"] == "rejected"
    assert row["pair"]["reason"].startswith("no sample left: holds ")
    assert document["training"]["source"] == "gold example 0, since no row was kept"


async def test_inputs_that_are_all_rejected(open_simulated: OpenSimulated, task: Task, capsys: Any) -> None:
    filters = {"filters.inputs": [{"name": "length", "sigmas": 0.001, "floor": 0}]}
    async with open_simulated(**filters) as session:
        document = await preview_in(session, task, 3)
    assert {one["verdict"]["filter"] for one in document["rows"]} == {"length"}
    assert document["later_prompt"] is None
    show_preview(document)
    out = capsys.readouterr().out
    assert re.search(r"input rejected by length: \d+ characters, \d+ to \d+ allowed", out)
    assert "no input was accepted" in out


async def test_rows_that_an_engine_refuses_are_failed(open_simulated: OpenSimulated, task: Task, capsys: Any) -> None:
    async with open_simulated(**{"engine.faults": {"refuse_share": 1.0}}) as session:
        document = await preview_in(session, task, 2)
    assert document["rows"][0]["verdict"] == {"state": "failed", "filter": "refused", "reason": "refused as ordered"}
    show_preview(document)
    assert "row failed with refused: refused as ordered" in capsys.readouterr().out


async def test_only_the_best_samples_where_the_recipe_keeps_them(open_simulated: OpenSimulated, task: Task) -> None:
    async with open_simulated(**{"annotation.keep_best": 2, "annotation.num_samples": 4}) as session:
        document = await preview_in(session, task, 2)
    samples = document["rows"][0]["samples"]
    assert len(samples) == 2
    assert samples[0]["logprob"] >= samples[1]["logprob"]


async def test_a_task_without_held_out_rows_and_a_row_too_long_to_train_on(
    open_simulated: OpenSimulated, task: Task, capsys: Any
) -> None:
    bare = replace(task, instances=(), digest="bare")
    async with open_simulated(**{"finetuning.max_length": 16}) as session:
        document = await preview_in(session, bare, 1)
    assert document["evaluation"] is None
    assert document["training"]["left_out"].startswith("finetuning.max_length 16")
    show_preview(document)
    assert "the task has no held-out rows" in capsys.readouterr().out


async def test_hostile_text_is_shown_and_not_obeyed(
    open_simulated: OpenSimulated, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = (Example(HOSTILE, "positive"), Example("plain", "negative"))
    hostile = replace(task, instruction=f"Judge. {HOSTILE}", examples=examples, digest="hostile")
    async with open_simulated() as session:
        document = await preview_in(session, hostile, 2)
    assert HOSTILE.replace("<|end|>", "< |end|>") in document["rows"][0]["input_prompt"]["fixed"]
    assert json.loads(json.dumps(document)) == document
    show_preview(document)
    out = capsys.readouterr().out
    assert all(char.isprintable() for line in out.split("\n") for char in line)
    assert r"a\x1b[2Jb [bold]c[/bold]\r\u202ed < |end|> ⏎\x07" in out


def test_line_ends_are_visible_and_so_is_their_absence() -> None:
    assert [one.plain for one in quote("a\n\nb")] == ["  │ a⏎", "  │ ⏎", "  │ b"]
    assert [one.plain for one in quote("a\n")] == ["  │ a⏎"]
    assert [one.plain for one in quote("")] == ["  │ "]


async def test_nothing_is_left_behind(
    open_simulated: OpenSimulated, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    async with open_simulated() as session:
        await preview_in(session, task, 1)
    assert list((tmp_path / "here").iterdir()) == list((tmp_path / "temporary").iterdir()) == []


async def test_a_chat_student_is_shown_its_template(open_simulated: OpenSimulated, task: Task, tmp_path: Path) -> None:
    """Special tokens of the template are part of what is sent, and shown."""
    folder = make_random_model(tmp_path / "chat", chat=True)
    async with open_simulated(**{"model.path": str(folder)}) as session:
        document = await preview_in(session, task, 1)
    prompt = document["rows"][0]["input_prompt"]
    assert document["chat"] is True
    assert prompt["fixed"].startswith("<|im_start|>user\n")
    assert prompt["varying"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert document["training"]["loss"].endswith("<|im_end|>")
