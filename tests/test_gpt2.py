"""ROUGE-L of tasks in other languages, by GPT-2's kind of tokenizer that the recipe names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from selfguide.api import Session, check_run
from selfguide.cli_options import recipe_settings
from selfguide.errors import UserError
from selfguide.evaluation import evaluation_stage, rouge_of
from selfguide.gpt2 import load_gpt2
from selfguide.methods import base, untuned_protocols
from selfguide.store import RunStore
from selfguide.tasks import load_task

EXAMPLES = Path(__file__).parent.parent / "selfguide" / "examples"
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["der Hund lief nach Hause und schlief"] * 20, vocab_size=300, min_frequency=2)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


async def test_a_named_tokenizer_scores_other_languages(
    open_simulated: OpenSimulated, gpt2_folder: Path, tmp_path: Path
) -> None:
    """English tasks neither need it nor depend on it."""
    english = load_task(EXAMPLES / "time_first.json")
    german = replace(english, name="german", output_language="German")
    gpt2 = load_gpt2(str(gpt2_folder))
    async with open_simulated(**{"evaluation.gpt2": str(gpt2_folder)}) as session:
        runs = [session.task_run(task, RunStore(tmp_path), lambda *_: None) for task in (german, english)]
        rows = [artifact.rows() for run in runs if (artifact := await base(run))]
    for row in rows[0]:
        assert row["rouge_l"] == gpt2.rouge_l(row["prediction"], row["references"])
    assert any(row["rouge_l"] for row in rows[0])
    for run, depends in zip(runs, (True, False), strict=True):
        changed = run.recipe.evaluation.model_copy(update={"gpt2": ""})
        without = replace(run, recipe=run.recipe.model_copy(update={"evaluation": changed}))
        protocol = untuned_protocols(run)["base"]
        same = evaluation_stage(run, protocol).fingerprint == evaluation_stage(without, protocol).fingerprint
        assert same is not depends
        assert (rouge_of(without) is None) is depends


async def test_a_tokenizer_that_is_not_there_is_known_before_engines_start(
    open_simulated: OpenSimulated, tmp_path: Path
) -> None:
    task = replace(load_task(EXAMPLES / "time_first.json"), output_language="German")
    async with open_simulated(**{"evaluation.gpt2": str(tmp_path / "absent")}) as session:
        run = session.task_run(task, RunStore(tmp_path / "run"), lambda *_: None)
        with pytest.raises(UserError, match=r"absent: no tokenizer is there: name a folder with GPT-2's"):
            check_run(run)


def test_a_hub_name_is_tried(monkeypatch: pytest.MonkeyPatch, gpt2_folder: Path) -> None:
    asked = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(gpt2_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_gpt2("some-org/gpt2").digest == load_gpt2(str(gpt2_folder)).digest
    assert asked == [("some-org/gpt2", ["tokenizer.json", "vocab.json", "merges.txt"])]
    assert recipe_settings(["evaluation.gpt2=some-org/gpt2"], "") == {"evaluation.gpt2": "some-org/gpt2"}
