"""The whole spine on real vLLM: from an instruction to a finetuned adapter and a comparison."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from engines.types import AdapterRef
from selfguide import api
from selfguide.api import Session
from selfguide.config import Recipe
from selfguide.curation import curate
from selfguide.errors import TaskFailed
from selfguide.evaluation import evaluate, evaluation_stage
from selfguide.finetuning import Adapter
from selfguide.methods import Comparison, tuned_protocol
from selfguide.recipefile import load_recipe
from selfguide.records import ACCEPTED, FAILED, REJECTED
from selfguide.store import Artifact, RunStore
from selfguide.synthesis import synthesize
from selfguide.taskrun import TaskRun
from selfguide.tasks import load_task

EXAMPLES = Path(__file__).parent.parent / "selfguide" / "examples"
SENTIMENT, TIME_FIRST, OWN_TASK = EXAMPLES / "sentiment.json", EXAMPLES / "time_first.json", EXAMPLES / "own_task.yaml"
METHODS = {"base", "few_shot_icl", "filtered_decoding", "self_guide"}
INSTANCES = 32  # of the smoke recipe
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spine") / "run"


async def run(session: Session, file: Path, folder: Path) -> Comparison:
    return await api.run(load_task(file), session.recipe, folder, session=session)


@pytest_asyncio.fixture(scope="module")
async def comparisons(vllm_session: Session, folder: Path) -> AsyncIterator[dict[Path, Comparison]]:
    """The three examples, side by side in one session."""
    files = (SENTIMENT, TIME_FIRST, OWN_TASK)
    yield dict(zip(files, await asyncio.gather(*(run(vllm_session, file, folder) for file in files)), strict=True))


def task_run(session: Session, file: Path, folder: Path) -> TaskRun:
    return session.task_run(load_task(file), RunStore(folder), lambda task, stage, counts: None)


def stages(folder: Path, file: Path) -> dict[str, list[Artifact]]:
    by_name: dict[str, list[Artifact]] = {}
    for artifact in RunStore(folder).task(load_task(file).name).artifacts():
        by_name.setdefault(artifact.stage, []).append(artifact)
    return by_name


def check_ledger(artifact: Artifact) -> dict[str, Any]:
    """Each row of the file has one end, and the ledger counts them."""
    ledger: dict[str, Any] = artifact.marker["ledger"]
    rows = artifact.rows()
    states = [row["state"] for row in rows]
    assert [row["row"] for row in rows] == list(range(len(rows))) or artifact.stage in ("curation", "finetuning")
    assert len({row["row"] for row in rows}) == len(rows) == ledger["candidates"]
    assert states.count(ACCEPTED) == ledger["accepted"]
    assert states.count(REJECTED) == sum(ledger["rejected"].values())
    assert states.count(FAILED) == sum(ledger["failed"].values())
    assert all(row["filter"] and row["reason"] for row in rows if row["state"] != ACCEPTED)
    return ledger


@pytest.mark.parametrize("file", [SENTIMENT, TIME_FIRST, OWN_TASK], ids=lambda file: file.stem)
async def test_every_row_is_accounted_for(comparisons: dict[Path, Comparison], folder: Path, file: Path) -> None:
    done = stages(folder, file)
    [synthesis], [curation], [finetuning] = (done[name] for name in ("synthesis", "curation", "finetuning"))
    ledgers = [check_ledger(one) for one in (synthesis, curation, finetuning)]
    assert ledgers[1]["candidates"] == ledgers[0]["accepted"]
    assert ledgers[2]["candidates"] == ledgers[1]["accepted"]
    assert finetuning.marker["train"]["rows"] == ledgers[2]["accepted"] >= 40
    assert all(row["input"] is not None for row in synthesis.rows() if row["state"] == REJECTED)
    for artifact in done.get("evaluation", []):
        assert check_ledger(artifact)["candidates"] == INSTANCES


async def test_the_untuned_student_is_evaluated_while_the_trainer_works(
    comparisons: dict[Path, Comparison], folder: Path
) -> None:
    done = stages(folder, SENTIMENT)
    events = [(one.path / "events.jsonl").read_text(encoding="utf-8") for one in done["evaluation"]]
    first = min(json.loads(text.splitlines()[0])["time"] for text in events)
    assert done["curation"][0].marker["finished"] <= first < done["finetuning"][0].marker["finished"]


async def test_a_stage_is_three_files(comparisons: dict[Path, Comparison], folder: Path) -> None:
    for marker in folder.glob("tasks/*/*/*/done.json"):
        names = {path.name for path in marker.parent.iterdir()}
        extra = {"weights"} if marker.parent.parent.name == "finetuning" else set()
        assert names == {"rows.parquet", "events.jsonl", "done.json"} | extra


@pytest.mark.parametrize("file", [SENTIMENT, TIME_FIRST], ids=lambda file: file.stem)
async def test_all_methods_are_compared_on_the_same_rows(comparisons: dict[Path, Comparison], file: Path) -> None:
    comparison = comparisons[file]
    assert comparison.evaluations.keys() == METHODS
    assert comparison.differences.keys() == METHODS - {"self_guide"}
    rows = {name: artifact.rows() for name, artifact in comparison.evaluations.items()}
    asked = [(instance.id, list(instance.references)) for instance in load_task(file).instances[:INSTANCES]]
    for method in METHODS:
        assert [(row["id"], row["references"]) for row in rows[method]] == asked
    # The tuned student sees the very prompts of the base.
    assert [row["prompt_tokens"] for row in rows["base"]] == [row["prompt_tokens"] for row in rows["self_guide"]]
    if file == TIME_FIRST:  # random labels hardly move
        assert [row["prediction"] for row in rows["base"]] != [row["prediction"] for row in rows["self_guide"]]


@pytest.mark.parametrize("file", [SENTIMENT, TIME_FIRST], ids=lambda file: file.stem)
async def test_the_adapter_is_proven_before_it_is_scored(comparisons: dict[Path, Comparison], file: Path) -> None:
    evaluations = comparisons[file].evaluations
    proof = evaluations["self_guide"].marker["proof"]
    assert proof["status"] == "proven"
    assert proof["adapter"] == comparisons[file].adapter.ref.digest
    assert proof["engine_difference"] < 0.01 * proof["training_difference"]
    assert evaluations["base"].marker["proof"] is None


async def test_training_rows_are_the_prompt_the_answer_and_the_end(
    comparisons: dict[Path, Comparison], folder: Path, vllm_session: Session
) -> None:
    tokenizer = vllm_session.student.tokenizer
    done = stages(folder, SENTIMENT)
    outputs = {row["row"]: row["output"] for row in done["curation"][0].rows()}
    definition = load_task(SENTIMENT).instruction
    for row in done["finetuning"][0].rows():
        prompt, completion = row["input_ids"][: row["prompt_tokens"]], row["input_ids"][row["prompt_tokens"] :]
        assert completion[-1] == tokenizer.eos_id
        assert tokenizer.decode(completion[:-1]).strip() == outputs[row["row"]]
        assert definition in tokenizer.decode(prompt)


async def test_a_second_run_repeats_nothing(
    comparisons: dict[Path, Comparison], vllm_session: Session, folder: Path
) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}

    before, dispatched = files(), vllm_session.pool.counts.dispatched
    again = await run(vllm_session, SENTIMENT, folder)
    assert files() == before
    assert vllm_session.pool.counts.dispatched == dispatched
    first = comparisons[SENTIMENT]
    assert again.adapter == first.adapter
    assert again.evaluations == first.evaluations
    assert again.differences == first.differences


async def test_a_task_without_instances_ends_with_an_adapter(comparisons: dict[Path, Comparison], folder: Path) -> None:
    comparison = comparisons[OWN_TASK]
    assert (comparison.evaluations, comparison.differences) == ({}, {})
    assert "evaluation" not in stages(folder, OWN_TASK)
    assert (Path(comparison.adapter.ref.url) / "adapter_model.safetensors").is_file()
    assert comparison.adapter.canaries


# ---- an engine that serves something else


def zeroed(adapter: Adapter, folder: Path) -> AdapterRef:
    """The adapter without effect: what an engine that ignores it would serve."""
    source = Path(adapter.ref.url)
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    weights = load_file(source / "adapter_model.safetensors")
    kept = {name: tensor * 0 if ".lora_B." in name else tensor for name, tensor in weights.items()}
    save_file(kept, folder / "adapter_model.safetensors")
    return replace(adapter.ref, digest=f"{0:064}", url=str(folder))


@pytest.mark.parametrize("served", ["nothing", "another adapter"])
async def test_an_adapter_that_the_engine_does_not_serve_is_caught(
    comparisons: dict[Path, Comparison], vllm_session: Session, folder: Path, tmp_path: Path, served: str
) -> None:
    ours, other = comparisons[SENTIMENT].adapter, comparisons[TIME_FIRST].adapter
    wrong = zeroed(ours, tmp_path / "zeroed")
    if served == "another adapter":
        wrong = replace(ours.ref, digest=f"{1:064}", url=other.ref.url)
    now = task_run(vllm_session, SENTIMENT, folder)
    protocol = tuned_protocol(now, replace(ours, ref=wrong))
    with pytest.raises(TaskFailed, match="the engine does not serve the trained adapter"):
        await evaluate(now, protocol)
    assert not evaluation_stage(now, protocol).path.exists()


async def test_training_without_effect_is_reported(
    comparisons: dict[Path, Comparison], vllm_session: Session, folder: Path, tmp_path: Path
) -> None:
    ours = comparisons[SENTIMENT].adapter
    canaries = tuple(replace(canary, tuned_logprobs=canary.base_logprobs) for canary in ours.canaries)
    idle = replace(ours, canaries=canaries, ref=replace(zeroed(ours, tmp_path / "zeroed"), digest=f"{2:064}"))
    now = task_run(vllm_session, SENTIMENT, folder)
    artifact = await evaluate(now, tuned_protocol(now, idle))
    assert artifact is not None
    assert artifact.marker["proof"]["status"] == "indistinguishable from base"
    base = comparisons[SENTIMENT].evaluations["base"]
    assert [row["prediction"] for row in artifact.rows()] == [row["prediction"] for row in base.rows()]


async def test_an_adapter_that_cannot_be_served_ends_the_task(
    comparisons: dict[Path, Comparison], vllm_session: Session, folder: Path, tmp_path: Path
) -> None:
    ours = comparisons[SENTIMENT].adapter
    gone = replace(ours, ref=replace(ours.ref, digest=f"{3:064}", url=str(tmp_path / "gone")))
    now = task_run(vllm_session, SENTIMENT, folder)
    with pytest.raises(TaskFailed, match=r"the adapter cannot be served: .*gone"):
        await evaluate(now, tuned_protocol(now, gone))


# ---- stages are addressed by what made them


async def test_a_changed_threshold_reruns_curation_alone(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    """As long as filters do not decide how many candidates are tried."""
    changes = {"synthesis.target_rows": None, "synthesis.num_candidates": 40}
    made = []
    async with open_simulated(**changes) as session:
        before = session.pool.counts.dispatched
        for share in (0.25, 0.75):
            recipe = Recipe.model_validate(session.recipe.model_dump() | _filters(session.recipe, min_share=share))
            now = task_run(replace(session, recipe=recipe), SENTIMENT, tmp_path / "run")
            candidates = await synthesize(now)
            made.append((candidates, await curate(now, candidates)))
        dispatched = session.pool.counts.dispatched - before
    [(first, many), (second, few)] = made
    assert first == second
    assert dispatched <= 80
    assert many.path != few.path
    assert many.marker["ledger"]["accepted"] > few.marker["ledger"]["accepted"]


def _filters(recipe: Recipe, min_share: float) -> dict[str, Any]:
    filters = recipe.filters.model_dump()
    return {"filters": filters | {"vote": filters["vote"] | {"min_share": min_share}}}


# ---- all weights


async def test_full_weights_from_start_to_end(
    ray_cluster: dict[str, float], random_student: Path, tmp_path: Path
) -> None:
    """One engine serves the untuned and the finetuned weights in turn."""
    changes = {
        "model.path": str(random_student), "finetuning.method": "full", "finetuning.learning_rate": 1e-3,
        "synthesis.target_rows": 12,
    }  # fmt: skip
    recipe = load_recipe("smoke", changes)
    async with api.open_session(recipe) as session:
        comparison = await run(session, SENTIMENT, tmp_path / "run")
        assert session.pool.counts.deaths == 0
    assert comparison.adapter.ref.kind == "full"
    assert comparison.evaluations.keys() == METHODS
    proof = comparison.evaluations["self_guide"].marker["proof"]
    assert proof["status"] == "proven"
    assert proof["noise"] < 1e-3 < proof["training_difference"]
    weights = Path(comparison.adapter.ref.url)
    assert {path.name for path in weights.iterdir()} == {"model.safetensors", "config.json"}
