"""One-parameter-fits-all: grids, validation rows, all epochs of one training, the choice, and what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfguide import api, cli
from selfguide.api import Session
from selfguide.config import Recipe
from selfguide.curation import curate
from selfguide.errors import TaskFailed, UserError
from selfguide.evaluation import evaluation_stage
from selfguide.filters import Length
from selfguide.finetuning import finetune, finetuning_stage, read_epochs
from selfguide.grid import Grid, read_grid, shipped_grids
from selfguide.methods import untuned_protocols
from selfguide.recipefile import change_recipe, load_recipe
from selfguide.search import Search, choose, notices, plan_search, search_task, search_tasks
from selfguide.store import RunStore
from selfguide.synthesis import synthesize
from selfguide.taskrun import TaskRun
from selfguide.tasks import Task, load_task

OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]
EXAMPLES = Path(cli.__file__).parent / "examples"
SMALL = {
    "synthesis.target_rows": None, "synthesis.num_candidates": 12, "synthesis.lag": 8, "finetuning.batch_size": 8,
    "evaluation.num_instances": 20, "finetuning.simulated_tokens_per_s": 1e6,
}  # fmt: skip
NOTHING_LEFT = {"filters.samples.noise": {"words": ["a", "e", "i", "o", "u"], "exempt_gold": False}}


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """36 and 40 rows: 16 and 20 for validation."""
    return [load_task(EXAMPLES / name) for name in ("sentiment.json", "time_first.json")]


def task_run(session: Session, task: Task, folder: Path) -> TaskRun:
    return session.task_run(task, RunStore(folder), lambda task, stage, counts: None)


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("tasks/*/*/*/done.json")}


def stages(folder: Path, task: str) -> dict[str, int]:
    found = [path.parent.parent.name for path in written(folder) if path.parts[-4] == task]
    return {stage: found.count(stage) for stage in dict.fromkeys(found)}


# ---- grids


def test_the_authors_grids_have_the_points_that_they_searched() -> None:
    selector, full = read_grid("authors"), read_grid("authors-full")
    assert [selector[kind].num_points for kind in ("classification", "generation")] == [15, 15]
    assert [full[kind].num_points for kind in ("classification", "generation")] == [30, 60]
    assert list(full["generation"].changes[1].items()) == [
        ("synthesis.sampling.temperature", 0.6), ("filters.inputs.length", False),
        ("filters.samples.length", {"sigmas": 2.0}),
    ]  # fmt: skip


@pytest.mark.parametrize("grid", shipped_grids())
@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_every_shipped_grid_changes_what_it_says(grid: str, recipe: str) -> None:
    base = load_recipe(recipe)
    for one in read_grid(grid).values():
        recipes = one.recipes(base)
        assert len({found.model_dump_json() for found in recipes}) == len(one.changes)
        for found, changes in zip(recipes, one.changes, strict=True):
            assert found.synthesis.sampling.temperature == changes["synthesis.sampling.temperature"]
            assert found.synthesis.target_rows is None
            assert (found.finetuning.epochs, found.finetuning.keep_epochs) == (3, True)
            for chain in ("inputs", "samples"):
                wanted = changes.get(f"filters.{chain}.length", chain == "inputs")
                assert any(isinstance(name, Length) for name in getattr(found.filters, chain)) is bool(wanted)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: [1, 2]", "'seed': cannot be searched; choose keys of synthesis, annotation, filters, finetuning"),
        ("evaluation.demonstrations: [1, 2]", "cannot be searched"),
        ("finetuning.epochs: [1, 2]", "cannot be searched so: write epochs: [1, 2, 3]"),
        ("finetuning.method: [full]", "all points share their engines"),
        ("synthesis.lag: 3", "synthesis.lag: write the list of values to try"),
        ("synthesis.lag: []", "write the list of values to try"),
        ("synthesis.pool: lag", "write the list of values to try"),
        ("synthesis.lag: [3, 3]", "a value stands there twice"),
        ("epochs: [0]", "epochs: write whole numbers from 1 on"),
        ("epochs: [true]", "epochs: write whole numbers from 1 on"),
        ("generation: [1]", "generation: is no mapping"),
        ("- 1", "is no mapping"),
    ],
)
def test_a_grid_that_is_none_says_why(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_grid(str(path))
    assert str(error.value).startswith(f"grid {path}")
    assert said in str(error.value)


def test_an_unknown_grid_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="did you mean authors"):
        read_grid("author")


def test_an_empty_grid_is_the_recipe_alone(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").touch()
    grid = read_grid(str(tmp_path / "grid.yaml"))["generation"]
    paper = load_recipe("paper")
    assert (grid.num_points, grid.recipes(paper)) == (1, [paper])


def test_a_point_that_is_no_recipe_is_named(tasks: list[Task]) -> None:
    with pytest.raises(UserError, match=r"synthesis.lagg: no such key; did you mean lag"):
        Grid(({"synthesis.lagg": 3},), ()).recipes(Recipe())
    with pytest.raises(UserError, match=r"finetuning.min_steps is 30: .* --set finetuning.min_steps=0"):
        Grid(({},), (1, 2)).recipes(load_recipe("default"))


def test_points_that_cannot_share_are_said(tasks: list[Task]) -> None:
    full = read_grid("authors-full")
    assert notices(Search(tasks, load_recipe("paper"), "paper", full)) == []
    target = load_recipe("paper", {"synthesis.target_rows": 9})
    [notice] = notices(Search(tasks, target, "paper", full))
    assert "points that differ in filters.samples.length generate" in notice
    assert notices(Search(tasks, target, "paper", read_grid("authors"))) == []


# ---- one task


async def test_points_share_stages_and_epochs_are_of_one_training(
    open_simulated: OpenSimulated, tasks: list[Task], tmp_path: Path
) -> None:
    """Scores are those of validation rows; the same call again asks and trains nothing."""
    changes = [{"filters.vote.min_share": share} for share in (0.25, 0.75)]
    async with open_simulated(**SMALL) as session:
        run = task_run(session, tasks[0], tmp_path)
        found = await search_task(run, changes=changes, epochs=[1, 2])
        before, dispatched = written(tmp_path), session.pool.counts.dispatched
        assert await search_task(run, changes=changes, epochs=[1, 2]) == found
        assert (written(tmp_path), session.pool.counts.dispatched) == (before, dispatched)
    assert stages(tmp_path, "sentiment")["synthesis"] == 1
    assert json.loads(json.dumps(found)) == found
    validation = [row.id for row in tasks[0].instances[20:]]
    for entry in (found["base"], *found["points"]):
        artifact = next(one for one in run.store.artifacts() if entry["evaluation"].endswith(one.path.name))
        rows = artifact.rows()
        assert (tmp_path / entry["evaluation"]).samefile(artifact.path)
        assert [row["id"] for row in rows] == validation
        assert entry["score"] == pytest.approx(100 * sum(row["exact_match"] for row in rows) / 16)
        assert entry["n"] == 16
        assert artifact.marker["split"] == "validation"
    first, second, *_ = found["points"]
    trained = [one for one in run.store.artifacts() if one.stage == "finetuning"]
    by_epochs = {tuple(ref["digest"] for ref in one.marker["train"]["checkpoints"]): one for one in trained}
    assert len(by_epochs) == 2
    finetuning = by_epochs[first["adapter"], second["adapter"]]
    assert {path.name for path in finetuning.path.iterdir()} == {
        "rows.parquet", "events.jsonl", "done.json", "weights", "epochs",
    }  # fmt: skip
    assert [path.name for path in (finetuning.path / "epochs").iterdir()] == ["1"]


async def test_a_point_that_fails_leaves_the_others(
    open_simulated: OpenSimulated, tasks: list[Task], tmp_path: Path
) -> None:
    changes = [NOTHING_LEFT, {}]
    async with open_simulated(**SMALL) as session:
        found = await search_task(task_run(session, tasks[1], tmp_path), changes=changes)
    lost, scored = found["points"]
    assert "time_first: 0 of 12 candidates are left" in lost["failed"]
    assert scored["score"] >= 0
    assert scored["proof"] == "simulated"


async def test_a_test_row_in_a_search_is_a_bug_that_ends_it(
    open_simulated: OpenSimulated, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfguide import taskrun

    monkeypatch.setattr(taskrun, "validation_instances", lambda task, evaluation, seed: task.instances[10:])
    async with open_simulated(**SMALL) as session:
        with pytest.raises(AssertionError, match="other rows than those for validation"):
            await search_task(task_run(session, tasks[0], tmp_path), changes=[{}])


async def test_lost_engines_are_nobodys_points(
    open_simulated: OpenSimulated, tasks: list[Task], tmp_path: Path
) -> None:
    """They end the search, which goes on by the same command; no point is marked as failed."""
    faults = {"die_after": 20, "deaths": 100, "marker": str(tmp_path)}
    async with open_simulated(**SMALL, **{"engine.faults": faults, "cluster.limits.max_deaths": 0}) as session:
        search = Search(
            tasks, session.recipe, "smoke", {"classification": Grid(({},), ()), "generation": Grid(({},), ())}
        )
        with pytest.raises(TaskFailed, match="the same command goes on from here"):
            await search_tasks(search, tmp_path / "run", session=session)
    assert not (tmp_path / "run" / "search.json").exists()


async def test_every_epochs_student_is_proven_on_vllm(vllm_session: Session, tasks: list[Task], tmp_path: Path) -> None:
    """By the trainer's word on that epoch: by the final one's, the first would be another adapter."""
    small = {"synthesis.num_candidates": 24, "synthesis.target_rows": 12, "evaluation.num_instances": 30}
    recipe = change_recipe(vllm_session.recipe, small)
    run = task_run(replace(vllm_session, recipe=recipe), tasks[1], tmp_path)
    found = await search_task(run, changes=[{}], epochs=[1, 3])
    for entry in found["points"]:
        assert entry["proof"] == "proven"
        proof = json.loads((tmp_path / entry["evaluation"] / "done.json").read_text())["proof"]
        assert proof["engine_difference"] < 0.05 * proof["training_difference"]
    [finetuning] = [one for one in run.store.artifacts() if one.stage == "finetuning"]
    adapters = read_epochs(finetuning)
    assert list(adapters) == [1, 2, 3]
    assert [adapters[epoch].ref.digest for epoch in (1, 3)] == [entry["adapter"] for entry in found["points"]]


async def test_fingerprints_of_runs_know_nothing_of_searches(
    open_simulated: OpenSimulated, tasks: list[Task], tmp_path: Path
) -> None:
    """A test stage is the same whatever the validation rows are; kept epochs and validation rows have their own."""
    async with open_simulated(**SMALL) as session:
        run = task_run(session, tasks[0], tmp_path)
        kept = await curate(run, await synthesize(run))
        searching = replace(run, recipe=Grid(({},), (1, 2)).recipes(run.recipe)[0])
        assert finetuning_stage(run, kept).fingerprint != finetuning_stage(searching, kept).fingerprint
        adapters = [await finetune(one, kept) for one in (run, searching)]
    assert adapters[0].ref.digest == adapters[1].ref.digest
    assert [list(read_epochs(one.artifact)) for one in adapters] == [[2], [1, 2]]
    assert "keep_epochs" not in adapters[0].artifact.marker["made_by"]["finetuning"]
    test = untuned_protocols(run)["base"]
    other = replace(run, recipe=change_recipe(run.recipe, {"evaluation.num_validation": 5}))
    assert evaluation_stage(run, test).fingerprint == evaluation_stage(other, test).fingerprint
    validation = replace(test, split="validation")
    found = {evaluation_stage(one, protocol).fingerprint for one in (run, other) for protocol in (test, validation)}
    assert len(found) == 3


# ---- the choice


def result(base: float, *scores: float | None) -> dict[str, Any]:
    points = [{"failed": "nothing kept"} if score is None else {"score": score} for score in scores]
    return {"base": {"score": base}, "points": points}


@pytest.mark.parametrize(
    ("results", "winner", "worst"),
    [
        ({"a": result(10, 20, 15, 12), "b": result(10, 9, 13, 14)}, 1, 3),  # not the best mean, not the last
        ({"a": result(10, 12, 12, 11), "b": result(50, 60, 61, 90)}, 1, 2),  # a tie of the worst: the mean decides
        ({"a": result(10, 12, 12, 12), "b": result(50, 53, 53, 53)}, 0, 2),  # a tie of both: the first
        ({"a": result(10, 90, 11, 5), "b": result(10, None, 11, 11)}, 1, 1),  # a point that failed cannot win
        ({"a": result(10, 5, 7, 6)}, 1, -3),
        ({"a": result(10, None, 11, None), "b": result(10, 12, None, 12)}, None, None),
        ({"a": result(10, 11, 12, 13), "b": {"failed": "no base"}}, None, None),
    ],
)
def test_the_winner_has_the_best_worst_gain(
    results: Mapping[str, Mapping[str, Any]], winner: int | None, worst: float | None
) -> None:
    points, found = choose(Grid(tuple({"x": x} for x in (1, 2, 3)), ()), results)
    assert found == winner
    assert [point["changes"]["x"] for point in points] == [1, 2, 3]
    if winner is not None:
        assert points[winner]["worst"] == worst
        assert points[winner]["tasks"][points[winner]["worst_task"]]["gain"] == worst
    assert all((point["worst"] is None) == any("failed" in one for one in point["tasks"].values()) for point in points)


# ---- all tasks, and what is written


async def test_a_search_writes_its_table_and_recipes_that_run(
    open_simulated: OpenSimulated, tasks: list[Task], tmp_path: Path, random_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the generation task no point is whole at first; with another point it has a winner too. What is done, failed
    points too, is read again without any engine."""
    out, changes = tmp_path / "run", {**SMALL, "model.path": str(random_student), "engine.kind": "simulated"}
    recipe = load_recipe("smoke", changes)
    shares = tuple({"filters.vote.min_share": share} for share in (0.25, 0.3))
    lost = (NOTHING_LEFT,)
    async with open_simulated(**SMALL) as session:
        search = Search(tasks, recipe, "smoke", {"classification": Grid(shares, (1, 2)), "generation": Grid(lost, ())})
        document = await search_tasks(search, out, session=session, command=["search", "x"])
        before = written(out)
        again = replace(search, grids={**search.grids, "generation": Grid((*lost, {}), ())})
        both = await search_tasks(again, out, session=session)
    assert all(written(out)[path] == then for path, then in before.items())
    monkeypatch.setattr(api, "open_session", None)  # whoever opens one fails
    assert await search_tasks(again, out) == both
    with pytest.raises(TypeError):
        await search_tasks(again, out, retry_failed=True)
    classification, generation = document["kinds"]
    assert [len(kind["points"]) for kind in document["kinds"]] == [4, 1]
    assert (generation["winner"], generation["winner_recipe"]) == (None, None)
    assert both["kinds"][0] == classification
    assert both["kinds"][1]["winner"] == 1
    assert json.loads((out / "search.json").read_text()) == json.loads(json.dumps(both))
    point = classification["points"][classification["winner"]]
    won = load_recipe(out / "winner-classification.yaml")
    expected = {**changes, **point["changes"], "finetuning.epochs": point["epoch"], "name": "smoke-classification"}
    assert won == load_recipe("smoke", expected)
    assert load_recipe(out / "winner-generation.yaml") == load_recipe("smoke", {**changes, "name": "smoke-generation"})
    text = (out / "search.md").read_text()
    assert "Simulated engines answered, without a model: the figures mean nothing." in text
    assert "points 1: time_first: 0 of 12 candidates are left" in text.replace("\\", "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    bases = [f"{kind['tasks'][0]['score']:.1f}" for kind in (classification, generation)]
    assert [row[3] for row in rows if row[0] == "base"] == bases
    assert sum(row[0] == "winner" for row in rows) == 2
    assert [row[3:] for row in rows if row[0] == "1"][-1] == ["failed", "failed", ""]


def test_what_cannot_be_searched_on_is_said_before_anything_starts(
    random_student: Path, tasks: list[Task], tmp_path: Path
) -> None:
    def plan(tasks: list[Task], **changes: Any) -> dict[str, Any]:
        settings = {**SMALL, "model.path": str(random_student), "engine.kind": "simulated", **changes}
        recipe = load_recipe("smoke", settings)
        grid = Grid(({"filters.vote.min_share": 0.25}, {"filters.vote.min_share": 0.3}), (1, 2, 3))
        return plan_search(
            Search(tasks, recipe, "smoke", {"classification": grid, "generation": grid}), tmp_path / "out"
        )

    few = replace(tasks[0], instances=tasks[0].instances[:20])
    with pytest.raises(UserError, match=r"all 20 are test rows; lower evaluation.num_instances"):
        plan([few])
    tiny = replace(tasks[0], instances=tasks[0].instances[:9])
    with pytest.raises(UserError, match="no instance is left for validation: it has fewer than ten"):
        plan([tiny], **{"evaluation.protocol": "authors"})
    german = replace(tasks[1], output_language="German")
    with pytest.raises(UserError, match=r"ROUGE-L of German needs GPT-2's tokenizer: evaluation.gpt2"):
        plan([german])
    with pytest.raises(UserError, match="another task has this name"):
        plan([tasks[0], replace(tasks[0], source="elsewhere/sentiment.json")])
    lines = plan(tasks)["tasks"]
    assert [(one["n"], one["points"], one["syntheses"], one["trainings"]) for one in lines] == [
        (16, 6, 1, 2),
        (20, 6, 1, 2),
    ]
    assert [one["n"] for one in plan(tasks, **{"evaluation.num_validation": 7})["tasks"]] == [7, 7]
    assert [one["n"] for one in plan(tasks, **{"evaluation.protocol": "authors"})["tasks"]] == [3, 4]
    assert not (tmp_path / "out").exists()


# ---- the command line


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfguide", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_the_verb_plans_and_its_exit_code_tells(
    main: Callable[..., tuple[int, str, str]], random_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfguide import search

    argv = ["search", EXAMPLES / "sentiment.json", "--recipe", "smoke", "--model", random_student, "--out", tmp_path]
    argv += ["--set", "evaluation.num_instances=20"]
    code, out, err = main(*argv, "--dry-run", "--json", "--set", "synthesis.target_rows=9", "--grid", "authors-full")
    assert (code, err) == (0, "")
    assert [one["points"] for one in json.loads(out)["tasks"]] == [30]
    code, out, _ = main(*argv, "--dry-run")
    assert code == 0
    assert "sentiment  classification    16      15          5     0          5           16" in out
    assert main(*argv, "--grid", "none")[0] == 2

    async def find_nothing(wanted: Search, out: Path, **_: Any) -> dict[str, Any]:
        (out / "search.md").write_text("nothing")
        return {"kinds": [{"kind": "classification", "winner": None}, {"kind": "generation", "winner": 2}]}

    monkeypatch.setattr(search, "search_tasks", find_nothing)
    code, out, err = main(*argv)
    assert (code, out) == (1, "nothing\n")
    assert err.endswith(
        f"no grid point came to an end on all classification tasks; {tmp_path / 'search.md'} says why\n"
    )
