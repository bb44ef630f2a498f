"""A report of a real run, made by the pipeline with simulated engines."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from selfguide import load_recipe, load_task
from selfguide.api import open_session, run
from selfguide.environment import PACKAGES, environment
from selfguide.methods import Comparison
from selfguide.records import ACCEPTED
from selfguide.report import read_report, write_report
from selfguide.store import RunStore

EXAMPLE = Path(__file__).parent.parent / "selfguide" / "examples" / "sentiment.json"


@pytest_asyncio.fixture(scope="module")
async def real_run(
    ray_cluster: dict[str, float], random_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Comparison]:
    """The example task with a recipe whose few_shot_icl asks exactly what base asks."""
    folder = tmp_path_factory.mktemp("real") / "run"
    settings: dict[str, Any] = {"model.path": str(random_student), "engine.kind": "simulated"}
    settings |= {"evaluation.demonstrations": "all", "synthesis.target_rows": 8, "synthesis.lag": 8}
    settings |= {"finetuning.simulated_tokens_per_s": 1e6}
    async with open_session(load_recipe("smoke", settings)) as session:
        return folder, await run(load_task(EXAMPLE), session.recipe, folder, session=session)


def test_a_report_agrees_with_the_artifacts(real_run: tuple[Path, Comparison]) -> None:
    folder, compared = real_run
    [task] = read_report(folder)["tasks"]
    [line] = task["lines"]
    rows = {
        stage: [row["state"] for row in one.rows()]
        for one in RunStore(folder).task("sentiment").artifacts()
        if (stage := one.stage) in ("synthesis", "curation", "finetuning")
    }
    accepted = [rows[stage].count(ACCEPTED) for stage in ("synthesis", "curation", "finetuning")]
    assert [step["rows"] for step in line["funnel"]] == [len(rows["synthesis"]), *accepted]
    assert line["finetuning"]["rows"] == accepted[-1] > 0
    assert [one["method"] for one in line["methods"]] == ["base", "few_shot_icl", "filtered_decoding", "self_guide"]
    for one in line["methods"]:
        marker = compared.evaluations[one["method"]].marker
        scores = {metric: estimate for metric, estimate in one["scores"].items() if estimate}
        assert list(scores) == ["exact_match", "rouge_l"]  # the authors' are not computed under the official protocol
        for metric, estimate in scores.items():
            assert estimate["mean"] == pytest.approx(marker["scores"][metric], abs=0.006)
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
            assert estimate["n"] == marker["scores"]["n"] == 32
    for method, by_metric in compared.differences.items():
        [found] = [one for one in line["methods"] if one["method"] == method]
        expected = {metric: vars(difference) for metric, difference in by_metric.items()}
        assert {metric: one for metric, one in found["differences"].items() if one} == expected


def test_methods_that_ask_alike_keep_their_names(real_run: tuple[Path, Comparison]) -> None:
    _, markdown = write_report(real_run[0])
    [line] = read_report(real_run[0])["tasks"][0]["lines"]
    base, icl = line["methods"][:2]
    assert base["evaluation"] == icl["evaluation"]
    assert base["differences"] == icl["differences"]
    assert "they share one evaluation" in markdown


def test_reading_changes_nothing_and_needs_nothing_but_the_folder(
    real_run: tuple[Path, Comparison], tmp_path: Path
) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    moved = tmp_path / "moved"
    shutil.copytree(real_run[0], moved)
    for path in moved.glob("report.*"):
        path.unlink()
    before = contents(moved)
    document, markdown = write_report(moved)
    after = contents(moved)
    assert json.loads(after.pop("report.json")) == document == read_report(real_run[0])
    assert after.pop("report.md").decode() == markdown
    assert after == before


def test_a_report_names_no_place(real_run: tuple[Path, Comparison], random_student: Path) -> None:
    document, markdown = write_report(real_run[0])
    [recipe] = document["recipes"]
    assert "address" not in recipe["settings"]["cluster"]
    for text in (json.dumps(document), markdown):
        assert socket.gethostname() not in text
        assert str(random_student.parent) not in text
        assert str(Path.home()) + "/" not in text


def test_the_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    environment.cache_clear()
    found = environment()
    others = {"selfguide", "git_commit", "python", "platform", "num_cpus", "gpus"}
    assert set(found) == others | {name.replace("-", "_") for name in PACKAGES}
    assert found["torch"] is not None
    assert "hunter2" not in json.dumps(found)
