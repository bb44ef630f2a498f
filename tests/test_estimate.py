"""A dry run says what is done and what is left, from real prompts and what the folder tells; it writes nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfguide import api, cli
from selfguide.api import Session, idle_run, load_student
from selfguide.config import Recipe
from selfguide.errors import UserError
from selfguide.estimate import Assumptions, Estimate, Plan, document, parse_assumptions, plan_run, show_plans
from selfguide.estimate.assumed import size_by_name, size_of
from selfguide.estimate.shown import needed_bytes, readable_seconds
from selfguide.evaluation import evaluate, evaluation_stage
from selfguide.methods import untuned_protocols
from selfguide.recipefile import load_recipe
from selfguide.sizes import checkpoint_bytes, read_size, readable_bytes, saved_bytes, training_bytes
from selfguide.store import RunStore
from selfguide.synthesis import SCHEMA, synthesis_stage, synthesize
from selfguide.tasks import Task, load_task
from tests.conftest import REAL_TRAINING

EXAMPLES = Path(cli.__file__).parent / "examples"
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]
STAGES = ["synthesis", "curation", "finetuning"]
EVALUATIONS = [f"evaluation: {name}" for name in ("base", "few_shot_icl", "filtered_decoding", "self_guide")]


@pytest.fixture
def task() -> Task:
    found = load_task(EXAMPLES / "sentiment.json")
    return replace(found, instances=found.instances[:12])


@pytest.fixture
def recipe(random_student: Path) -> Callable[..., Recipe]:
    def load(**changes: Any) -> Recipe:
        return load_recipe("smoke", {"model.path": str(random_student), "engine.kind": "simulated", **changes})

    return load


def _by_stage(estimate: Estimate) -> dict[str, Plan]:
    return {plan.stage: plan for plan in estimate.plans}


def _tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# ---- before anything is there


def test_bounds_of_a_run_that_has_not_begun(task: Task, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = _by_stage(plan_run(task, recipe(), tmp_path / "out"))
    assert list(found) == STAGES + EVALUATIONS
    assert {plan.status for plan in found.values()} == {"to do"}
    assert found["synthesis"].most_rows == 160
    assert found["synthesis"].most_tokens_out == 160 * (48 + 4 * 48)
    assert found["synthesis"].rows is found["synthesis"].seconds is found["synthesis"].tokens_out is None
    assert "unknown until measured" in found["synthesis"].notes[0]
    assert found["synthesis"].fingerprint is not None
    assert found["curation"].fingerprint is found["finetuning"].fingerprint is None
    assert "follows from the rows of synthesis" in found["curation"].notes[0]
    assert found["finetuning"].most_rows == 40
    assert found["evaluation: base"].rows == found["evaluation: self_guide"].rows == 12
    assert "follows from the adapter" in found["evaluation: self_guide"].notes[0]
    assert not (tmp_path / "out").exists()


def test_without_a_target_all_candidates_are_tried(task: Task, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = _by_stage(plan_run(task, recipe(**{"synthesis.target_rows": None}), tmp_path))
    assert found["synthesis"].rows == found["synthesis"].most_rows == found["finetuning"].most_rows == 160
    assert found["synthesis"].notes == ()


def test_tiny_sets_train_longer_and_long_rows_are_named(
    task: Task, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """40 rows in batches of 4 are 10 steps; 35 steps need 4 epochs."""
    two = _by_stage(plan_run(task, recipe(), tmp_path))["finetuning"]
    four = _by_stage(plan_run(task, recipe(**{"finetuning.min_steps": 35}), tmp_path))["finetuning"]
    assert four.most_tokens_in == pytest.approx(2 * two.most_tokens_in, abs=1)
    short = _by_stage(plan_run(task, recipe(**{"finetuning.max_length": 100}), tmp_path))["finetuning"]
    assert any("3 of 3 gold examples do not fit finetuning.max_length 100" in note for note in short.notes)


def test_a_task_without_held_out_rows_has_no_evaluation(
    task: Task, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    assert list(_by_stage(plan_run(replace(task, instances=()), recipe(), tmp_path))) == STAGES


# ---- against what then happens


async def test_a_plan_and_the_run_agree(
    open_simulated: OpenSimulated, task: Task, recipe: Callable[..., Recipe], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One whole run: what was planned, what was done, and what it tells of the next one."""
    before = _by_stage(plan_run(task, recipe(), tmp_path / "out"))
    async with open_simulated(**REAL_TRAINING) as session:
        await api.run(task, recipe(), tmp_path / "out", session=session)
    tree = _tree(tmp_path)
    finished = plan_run(task, recipe(), tmp_path / "out")
    done = _by_stage(finished)
    assert finished.left == []
    assert done["finetuning"].rows == before["finetuning"].most_rows == 40
    for name in EVALUATIONS:  # all twelve prompts were rendered: their mean is exact
        assert before[name].tokens_in == done[name].tokens_in
        assert 0 < (done[name].tokens_out or 0) <= before[name].most_tokens_out
    assert done["synthesis"].fingerprint == before["synthesis"].fingerprint
    adapter = next((tmp_path / "out").glob("tasks/*/finetuning/*/weights/adapter_model.safetensors"))
    header = int.from_bytes(adapter.read_bytes()[:8], "little")
    assert before["finetuning"].disk_bytes - (8 << 10) == adapter.stat().st_size - header - 8

    other = plan_run(task, recipe(seed=1), tmp_path / "out")  # another seed: all to do, and now it can be told
    again = _by_stage(other)
    assert {plan.status for plan in other.plans} == {"to do"}
    share = 40 / done["synthesis"].rows_done
    assert again["synthesis"].rows == math.ceil(40 / share)
    assert again["synthesis"].tokens_out == done["synthesis"].tokens_out
    seconds = done["synthesis"].seconds
    assert seconds is not None
    assert again["synthesis"].seconds == pytest.approx(seconds, rel=0.1, abs=0.1)
    assert all(plan.seconds is not None for plan in other.plans)
    total = sum(plan.seconds or 0 for plan in other.plans)
    assert document(other, tmp_path)["left"]["seconds"] == pytest.approx(total, abs=0.1)
    _check_forced(plan_run(task, recipe(), tmp_path / "out", ["finetuning"]))
    assert _tree(tmp_path) == tree
    _check_half_trained(task, recipe(**{"finetuning.lora_rank": 8}), tmp_path / "out")
    show_plans(finished, tmp_path / "out")
    assert "Nothing is left to do" in capsys.readouterr().out


def _check_forced(estimate: Estimate) -> None:
    """What comes before the forced stage is done; what is made from it cannot be known."""
    status = {plan.stage: plan.status for plan in estimate.plans}
    assert [status[name] for name in STAGES] == ["done", "done", "to do"]
    assert status["evaluation: base"] == "done"
    assert status["evaluation: self_guide"] == "to do"
    assert _by_stage(estimate)["finetuning"].rows == 40
    assert needed_bytes(estimate.plans) > 0


def _check_half_trained(task: Task, recipe: Recipe, out: Path) -> None:
    """A training goes on behind its last whole checkpoint, here the tenth of twenty steps."""
    fresh = _by_stage(plan_run(task, recipe, out))["finetuning"]
    assert (fresh.status, fresh.rows) == ("to do", 40)
    trainer = out / f"tasks/sentiment/finetuning/{fresh.fingerprint}/work/trainer"
    (trainer / "checkpoint-10").mkdir(parents=True)
    (trainer / "checkpoint-10" / "trainer_state.json").write_text("{}")
    (trainer / "progress.jsonl").write_text('{"step": 13, "steps": 20, "loss": 1.0}\n')
    half = _by_stage(plan_run(task, recipe, out))["finetuning"]
    assert half.status == "unfinished"
    assert half.tokens_in == pytest.approx((fresh.tokens_in or 0) / 2, abs=1)


async def test_an_unfinished_stage_tells_of_itself(
    open_simulated: OpenSimulated, task: Task, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The rows of one shard, committed by a process that then stopped."""
    changed = recipe(**{"synthesis.num_candidates": 100, "synthesis.target_rows": 90})
    async with open_simulated(**{"synthesis.num_candidates": 100, "synthesis.target_rows": 90}) as session:
        whole = await synthesize(session.task_run(task, RunStore(tmp_path / "whole"), lambda *_: None))
    student = load_student(changed)
    run = idle_run(task, changed, student, RunStore(tmp_path / "part"))
    stage = synthesis_stage(run)
    with stage.writing():
        stage.commit(whole.rows()[:64], SCHEMA)
        stage.log({"event": "shard", "rows": 64, "prompt_tokens": 6400, "output_tokens": 640, "cached_tokens": 0})
    plan = _by_stage(plan_run(task, changed, tmp_path / "part"))["synthesis"]
    assert (plan.status, plan.rows_done, plan.most_rows) == ("unfinished", 64, 36)
    kept = int(plan.notes[0].rpartition(" were")[0].rpartition(", ")[2].rstrip("%")) / 100
    assert plan.rows == min(36, math.ceil(90 / (round(kept * 64) / 64)) - 64)
    assert plan.tokens_in == (plan.rows or 0) * 100
    assert plan.tokens_out == (plan.rows or 0) * 10
    assert "of its first rows" in plan.notes[0]


async def test_another_students_pace_is_not_taken(
    open_simulated: OpenSimulated, task: Task, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    async with open_simulated() as session:
        run = session.task_run(task, RunStore(tmp_path), lambda *_: None)
        await evaluate(run, untuned_protocols(run)["base"])
    known = _by_stage(plan_run(task, recipe(seed=1), tmp_path))["evaluation: base"]
    assert known.tokens_out is not None
    real = recipe(seed=1, **{"engine.kind": "vllm"})
    assert _by_stage(plan_run(task, real, tmp_path))["evaluation: base"].tokens_out is None
    marker = evaluation_stage(run, untuned_protocols(run)["base"]).path / "done.json"
    content = json.loads(marker.read_text())
    content["made_by"]["model"] = "another"
    marker.write_text(json.dumps(content))
    assert _by_stage(plan_run(task, recipe(seed=1), tmp_path))["evaluation: base"].tokens_out is None


# ---- what is assumed


def test_what_is_not_measured_is_reckoned_by_what_is_assumed(
    task: Task, recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates of one a second make seconds of tokens."""
    rates = ["prompt_tokens_per_s=1", "output_tokens_per_s=1", "train_tokens_per_s=1", "answer_length=2"]
    several = recipe(**{"synthesis.target_rows": None, "cluster.num_engines": 4})
    estimate = plan_run(task, several, tmp_path / "out", assumed=parse_assumptions(rates))
    found = _by_stage(estimate)
    base, training = found["evaluation: base"], found["finetuning"]
    assert training.rows == 80
    assert training.tokens_in == pytest.approx(training.most_tokens_in / 2, abs=1)
    assert training.seconds == training.gpu_seconds == training.tokens_in
    assert base.gpu_seconds == (base.tokens_in or 0) + (base.tokens_out or 0)
    assert base.seconds == pytest.approx(base.gpu_seconds / 4, abs=0.1)
    tokenizer = load_student(several).tokenizer
    lengths = [len(tokenizer.encode(example.output)) + 1 for example in task.examples]
    assert base.tokens_out == round(12 * 2 * sum(lengths) / len(lengths))
    sums = document(estimate, tmp_path)["left"]
    assert sums["gpu_hours"] == pytest.approx(sum(p.gpu_seconds or 0 for p in found.values()) / 3600, abs=0.001)
    show_plans(estimate, tmp_path)
    said = capsys.readouterr().out
    assert "writes 1 (output_tokens_per_s)" in said
    assert "GPU hours" in said


def test_what_is_measured_is_not_assumed(task: Task, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean kept_share"):
        parse_assumptions(["kept_shares=0.5"])
    for text in ("params", "params=many", "params=0", "params=inf", "params=nan"):
        with pytest.raises(UserError, match="a number above 0"):
            parse_assumptions([text])
    assert parse_assumptions([]) is None
    assert parse_assumptions(["defaults"]) == Assumptions()
    assert plan_run(task, recipe(), tmp_path).assumed is None


def test_a_student_that_is_not_here_is_planned_by_its_size(
    task: Task, recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(model: str, assumed: Assumptions | None = None) -> Estimate:
        return plan_run(task, recipe(**{"model.path": model, "finetuning.method": "full"}), tmp_path, (), assumed)

    named, told = plan("nobody/nothing-7b"), plan("nobody/nothing", Assumptions(params=7e9))
    assert named.plans == told.plans
    assert named.absent == "nobody/nothing-7b"
    training = _by_stage(named)["finetuning"]
    assert training.disk_bytes - (8 << 10) == 4 * 7_000_000_000
    assert training.peak_bytes == 24 * 7_000_000_000
    assert all(plan.seconds is not None for plan in named.plans)
    prompts = [
        _by_stage(plan("nobody/x-7b", Assumptions(chars_per_token=count)))["evaluation: base"] for count in (2, 4)
    ]
    assert prompts[0].tokens_in == pytest.approx(2 * (prompts[1].tokens_in or 0), rel=0.05)
    show_plans(named, tmp_path)
    said = capsys.readouterr().out
    assert "nobody/nothing-7b of 7 billion parameters (params); it is not on this machine" in said


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("org/vicuna-7b-v1.5", 7e9), ("org/Q2.5-0.5B-Instruct", 5e8), ("org/Mix-8x7B-v0.1", 56e9),
        ("org/Small2-135M", 135e6), ("70b/name", None), ("org/phi-4", None), ("org/7Beta", None),
    ],
)  # fmt: skip
def test_names_that_say_a_size(name: str, params: float | None) -> None:
    assert size_by_name(name) == params


def test_shapes_of_an_assumed_size_are_those_of_a_llama() -> None:
    """Llama 2 of 7 billion: 32 layers of width 4,096; a LoRA of rank 16 on all seven matrices has 40 million."""
    size, lora = size_of(6.74e9), load_recipe("default").finetuning
    assert (size.num_layers, size.num_heads * size.head_dim) == (32, 4096)
    assert saved_bytes(size, lora) / 4 == pytest.approx(40e6, rel=0.02)
    assert sum(math.prod(shape) for shape in size.shapes.values()) == pytest.approx(6.74e9, rel=0.01)


def test_methods_that_ask_alike_are_planned_once(task: Task, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = _by_stage(plan_run(task, recipe(**{"evaluation.demonstrations": "all"}), tmp_path))
    shared = found["evaluation: few_shot_icl"]
    assert (shared.most_rows, shared.most_tokens_in, shared.seconds) == (0, 0, 0.0)
    assert shared.notes == ("asks what base asks: they share one evaluation",)
    assert found["evaluation: filtered_decoding"].rows == 12


def test_controls_that_train_or_read_labels(task: Task, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    controls = ["constrained_labels", "calibrated_labels", "few_shot_sft"]
    found = _by_stage(plan_run(task, recipe(**{"evaluation.controls": controls}), tmp_path))
    assert [name for name in found if name.startswith("evaluation")] == [
        f"evaluation: {name}" for name in ("base", *controls, "self_guide")
    ]
    assert found["evaluation: constrained_labels"].most_tokens_out == 12
    gold = found["finetuning: few_shot_sft"]
    assert gold.rows == len(task.examples)
    assert gold.tokens_in == gold.most_tokens_in > 0


# ---- what is refused, and what is printed


def test_a_dry_run_fetches_nothing_and_refuses_what_a_run_would(
    task: Task, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="a dry run fetches nothing"):
        plan_run(task, recipe(**{"model.path": "nobody/nothing-at-all"}), tmp_path)
    with pytest.raises(UserError, match="no student"):
        plan_run(task, recipe(**{"model.path": ""}), tmp_path)
    with pytest.raises(UserError, match="does not fit the student's context"):
        plan_run(replace(task, instruction="word " * 9000), recipe(), tmp_path)
    with pytest.raises(UserError, match="--force training: no such stage"):
        plan_run(task, recipe(), tmp_path, ["training"])
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="no run folder"):
        plan_run(task, recipe(), tmp_path)


def test_sizes_are_those_of_real_adapters(random_student: Path) -> None:
    """PEFT's own count: rank x (inputs + outputs) of the seven matrices of each layer."""
    size, lora = read_size(random_student), load_recipe("default").finetuning
    per_layer = 4 * (64 + 64) + 2 * (64 + 128) + (128 + 64)
    assert saved_bytes(size, lora) == 2 * 16 * per_layer * 4
    chosen = lora.model_copy(update={"target_modules": ("q_proj", "v_proj"), "lora_rank": 4})
    assert saved_bytes(size, chosen) == 2 * 4 * 2 * (64 + 64) * 4
    pattern = lora.model_copy(update={"target_modules": r".*layers\.0\..*q_proj", "lora_rank": 1})
    assert saved_bytes(size, pattern) == (64 + 64) * 4
    full = lora.model_copy(update={"method": "full"})
    assert training_bytes(size, full, on_gpu=True) == 16 * size.num_params
    assert checkpoint_bytes(size, full) == 24 * size.num_params
    assert [readable_bytes(one) for one in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_seconds_as_people_say_them() -> None:
    found = [readable_seconds(one) for one in (0.2, 1, 89, 90, 5000, 5400, 12_000)]
    assert found == ["under 1 s", "1 s", "89 s", "2 min", "83 min", "1 h 30 min", "3 h 20 min"]


def test_the_command_line(
    tmp_path: Path, random_student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(*more: str) -> str:
        argv = ["selfguide", "run", str(EXAMPLES / "sentiment.json"), "--dry-run", "--recipe", "smoke", *more]
        monkeypatch.setattr(sys, "argv", [*argv, "--model", str(random_student), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    content = json.loads(main("--json"))
    assert [one["stage"] for one in content["stages"]] == STAGES + EVALUATIONS
    assert content["left"]["seconds"] is None
    lines = main().splitlines()
    assert lines[0].split() == ["stage", "status", "rows", "tokens", "in", "tokens", "out", "disk", "time"]
    assert lines[1].startswith("synthesis")
    assert lines[1].endswith("unknown until measured")
    assert "Left to do: time unknown until measured; disk " in lines[-1]
    assert not (tmp_path / "out").exists()
