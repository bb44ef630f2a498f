"""`selfguide evaluate`: an adapter is checked before anything starts, measured in the engine, set beside the base."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from engines.models import tensor_shapes
from engines.types import AdapterRef
from selfguide import cli, scorecard
from selfguide.adapterfile import LEAST_CHANGE, check_adapter_file, read_adapter_file
from selfguide.api import Session, idle_run, load_student
from selfguide.config import Recipe
from selfguide.errors import UserError
from selfguide.evaluation import evaluation_stage
from selfguide.intervals import bootstrap, bootstrap_tasks
from selfguide.methods import untuned_protocols
from selfguide.recipefile import load_recipe
from selfguide.report import read_report
from selfguide.scorecard import evaluate_tasks, show_scorecard
from selfguide.store import RunStore
from selfguide.tasks import Task, load_task

EXAMPLES = Path(cli.__file__).parent / "examples"
WriteLora = Callable[..., AdapterRef]
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]


@pytest.fixture
def tasks() -> list[Task]:
    """One of each kind, a dozen rows each."""
    found = [load_task(EXAMPLES / name) for name in ("sentiment.json", "time_first.json")]
    return [replace(task, instances=task.instances[:12]) for task in found]


@pytest.fixture
def simulated_recipe(random_student: Path) -> Recipe:
    return load_recipe("smoke", {"model.path": str(random_student), "engine.kind": "simulated"})


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts engines fails."""

    @asynccontextmanager
    async def refuse(*_: Any) -> Any:
        raise AssertionError("engines were started")
        yield

    monkeypatch.setattr(scorecard, "open_session", refuse)


# ---- on a real engine


async def test_an_adapter_on_vllm_and_one_that_changes_nothing(
    vllm_session: Session, smoke_recipe: Recipe, tasks: list[Task], tmp_path: Path, write_lora: WriteLora,
    no_engines: None, random_student: Path,
) -> None:  # fmt: skip
    """Scores are those of the rows on disk; an adapter that does next to nothing is the base, and is said to be."""
    import torch

    loud = write_lora(tmp_path / "loud")
    # Not zero: what rounding makes of it is more than nothing, and still no change.
    faint = {name: torch.full(shape, 1e-6) for name, shape in _shapes(tmp_path / "loud").items() if ".lora_B." in name}
    write_lora(tmp_path / "mute", tensors=faint)
    document = await evaluate_tasks(tasks, smoke_recipe, tmp_path / "out", tmp_path / "loud", session=vllm_session)
    assert document["adapter"] == {"folder": "loud", "rank": 4, "digest": loud.digest}
    for line, task in zip(document["tasks"], tasks, strict=True):
        assert line["proof"]["status"] == "differs from base"
        assert line["proof"]["training_difference"] > 100 * LEAST_CHANGE
        stored = _rows_of(tmp_path / "out", task, smoke_recipe)
        assert line["scores"]["base"]["exact_match"]["mean"] == round(100 * fmean(r["exact_match"] for r in stored), 2)
        assert line["n"] == len(stored) == line["difference"]["rouge_l"]["n"] == 12
    mute = await evaluate_tasks(tasks[:1], smoke_recipe, tmp_path / "out", tmp_path / "mute", session=vllm_session)
    assert mute["tasks"][0]["proof"]["status"] == "indistinguishable from base"
    assert 0 < mute["tasks"][0]["proof"]["training_difference"] < LEAST_CHANGE
    assert mute["tasks"][0]["difference"]["exact_match"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 12}
    # The same command again needs no engine, and says the same.
    again = await evaluate_tasks(tasks, smoke_recipe, tmp_path / "out", tmp_path / "loud")
    assert again == document
    assert [task["name"] for task in read_report(tmp_path / "out")["tasks"]] == ["sentiment", "time_first"]


def _shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    return tensor_shapes(folder)


def _rows_of(out: Path, task: Task, recipe: Recipe) -> list[dict[str, Any]]:
    run = idle_run(task, recipe, load_student(recipe), RunStore(out))
    done = evaluation_stage(run, untuned_protocols(run)["base"]).done
    assert done is not None
    return done.rows()


# ---- with simulated engines


async def test_base_alone_shares_the_stage_of_a_run_and_goes_on(
    open_simulated: OpenSimulated, simulated_recipe: Recipe, tasks: list[Task], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    async with open_simulated() as session:
        first = await evaluate_tasks(tasks[:1], simulated_recipe, tmp_path, session=session)
        rows = list(tmp_path.glob("tasks/*/evaluation/*/rows.parquet"))
        written = {path: path.stat().st_mtime_ns for path in rows}
        both = await evaluate_tasks(tasks, simulated_recipe, tmp_path, session=session)
    assert both["tasks"][0] == first["tasks"][0]
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    assert both["adapter"] is None
    assert "difference" not in both["tasks"][0]
    show_scorecard(both)
    out = capsys.readouterr().out
    assert "sentiment   exact match  12" in out
    assert "time_first  ROUGE-L      12" in out


async def test_differences_are_the_adapters_gain(
    open_simulated: OpenSimulated, simulated_recipe: Recipe, tasks: list[Task], tmp_path: Path, write_lora: WriteLora
) -> None:
    """Simulated answers depend on the adapter's digest, so the two sides differ."""
    write_lora(tmp_path / "lora")
    labels = simulated_recipe.evaluation.model_copy(update={"constrain_labels": True})
    recipe = simulated_recipe.model_copy(update={"evaluation": labels})
    async with open_simulated(**{"evaluation.constrain_labels": True}) as session:
        document = await evaluate_tasks(tasks, recipe, tmp_path / "out", tmp_path / "lora", session=session)
    line, mean = document["tasks"][0], document["overall"][0]
    gain = line["scores"]["adapter"]["exact_match"]["mean"] - line["scores"]["base"]["exact_match"]["mean"]
    difference = line["difference"]["exact_match"]
    assert difference["low"] < difference["high"]  # some rows differ
    assert difference["mean"] == pytest.approx(gain, abs=0.011)
    assert mean["difference"]["mean"] == pytest.approx(gain, abs=0.011)
    assert line["proof"]["status"] == "simulated"


async def test_tasks_without_rows_with_failed_rows_and_with_leaking_labels_are_said(
    open_simulated: OpenSimulated, simulated_recipe: Recipe, tasks: list[Task], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    long = replace(tasks[0].instances[0], input="word " * 9000)
    broken = replace(tasks[0], instances=(long, *tasks[0].instances[1:]), digest="broken", labels_from="instances")
    empty = replace(tasks[1], name="bare", instances=(), digest="bare")
    async with open_simulated() as session:
        document = await evaluate_tasks([broken, empty], simulated_recipe, tmp_path, session=session)
    assert [one["failed"] for one in document["tasks"]] == [{"base": 1}, {}]
    assert document["overall"][0]["scores"]["base"]["n"] == 12
    show_scorecard(document)
    out = capsys.readouterr().out
    assert "bare       no held-out rows   0" in out
    assert "1 rows failed, and count as misses" in out
    assert "taken from the test answers in: sentiment" in out


# ---- means over tasks


def test_a_task_counts_as_a_task_however_many_rows_it_has() -> None:
    mean = bootstrap_tasks([[1.0] * 90, [0.0] * 10], 200, 0)
    assert (mean.mean, mean.low, mean.high, mean.n) == (50.0, 50.0, 50.0, 100)


def test_one_task_is_its_own_mean_and_intervals_shrink_with_tasks() -> None:
    values = np.random.default_rng(1).integers(0, 2, 50).astype(float).tolist()
    one, same = bootstrap_tasks([values], 2000, 0), bootstrap(values, 2000, 0)
    assert one == same
    many = bootstrap_tasks([values] * 16, 2000, 0)
    assert many.mean == one.mean
    # Sixteen independent draws: a quarter of the width, within what 2,000 resamples tell.
    assert (many.high - many.low) / (one.high - one.low) == pytest.approx(0.25, abs=0.04)


# ---- what is refused before anything starts


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 600}, r"adapter_config\.json: r is 600; ranks from 1 to 512 are served"),
        ({"r": "16"}, r"r is 16; ranks from 1"),
        ({"rank_pattern": {"q_proj": 0}}, r"r is 4; ranks from 1"),
        ({"use_dora": True}, r"use_dora is not served by vLLM.*; the model it was trained on: some/model"),
        ({"peft_type": "IA3"}, r"'IA3' is not LORA"),
    ],
)
async def test_an_adapter_that_cannot_be_served_is_one_line(
    tasks: list[Task], simulated_recipe: Recipe, tmp_path: Path, write_lora: WriteLora, no_engines: None,
    config: dict[str, Any], message: str,
) -> None:  # fmt: skip
    write_lora(tmp_path / "bad", config={"base_model_name_or_path": "some/model", **config})
    with pytest.raises(UserError, match=message) as error:
        await evaluate_tasks(tasks, simulated_recipe, tmp_path / "out", tmp_path / "bad")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1]", "{", '{"peft_type": "LORA"}', '{"r": 4, "rank_pattern": 7}'])
def test_a_config_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match="no configuration of a LoRA"):
        read_adapter_file(tmp_path)


def test_an_adapter_of_another_model(tmp_path: Path, write_lora: WriteLora, simulated_recipe: Recipe) -> None:
    import torch

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_lora(tmp_path / "other", tensors={name: torch.zeros(4, 63)})
    with pytest.raises(UserError, match=r"shape \(4, 63\)"):
        check_adapter_file(read_adapter_file(tmp_path / "other"), load_student(simulated_recipe))


async def test_rank_pattern_decides_the_room_that_engines_make(tmp_path: Path, write_lora: WriteLora) -> None:
    write_lora(tmp_path / "wide", config={"rank_pattern": {"q_proj": 48}})
    file = read_adapter_file(tmp_path / "wide")
    assert file.rank == 48
    assert scorecard._serving(load_recipe("paper", {"model.path": "x"}), file).finetuning.lora_rank == 48
    assert scorecard._serving(load_recipe("default", {"model.path": "x"}), None).finetuning.method == "full"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The console script: exit code, standard output, standard error."""

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfguide", *map(str, argv)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_mistakes_on_the_command_line(
    main: Callable[..., tuple[int, str, str]], tmp_path: Path, write_lora: WriteLora, no_engines: None
) -> None:
    task, own = EXAMPLES / "sentiment.json", EXAMPLES / "own_task.yaml"
    write_lora(tmp_path / "lora", config={"base_model_name_or_path": "org/base"})
    wrong = {
        (task, "--adapter", tmp_path / "lora"): "name the adapter's own with --model (it says org/base)",
        (task, "--adapter", tmp_path, "--model", "random"): "no adapter_config.json; name the folder",
        (tmp_path / "none.json", "--model", "random"): "matches no file",
        (own, "--model", "random"): "no task has instances",
        (task, "--model", "random", "--out", tmp_path / "lora"): "no run folder",
    }
    for argv, message in wrong.items():
        code, out, err = main("evaluate", *argv)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err


async def test_the_command_line_prints_what_is_there_already(
    main: Callable[..., tuple[int, str, str]], open_simulated: OpenSimulated, tmp_path: Path, random_student: Path
) -> None:
    """The document of a first call, from the second one's standard output; it starts nothing."""
    settings = {"model.path": str(random_student), "engine.kind": "simulated"}
    recipe, task = load_recipe("smoke", settings), load_task(EXAMPLES / "sentiment.json")
    async with open_simulated() as session:
        document = await evaluate_tasks([task], recipe, tmp_path / "out", session=session)
    shutil.copy(EXAMPLES / "sentiment.json", tmp_path)
    import asyncio

    argv = ("evaluate", tmp_path / "sentiment.json", "--recipe", "smoke", "--model", random_student)
    more = ("--set", "engine.kind=simulated", "--out", tmp_path / "out", "--json")
    code, out, _ = await asyncio.to_thread(main, *argv, *more)
    assert code == 0
    assert json.loads(out) == document
