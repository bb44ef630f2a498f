"""The authors' experiment again: which tasks, what it would take, and their figures beside what was measured."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from selfguide import cli
from selfguide.api import Session, run
from selfguide.errors import TaskFailed, UserError
from selfguide.intervals import bootstrap
from selfguide.published import Figure, figures_of, published, published_tasks
from selfguide.recipefile import load_recipe
from selfguide.replication import MARKER, choose_tasks, replicate, settings
from selfguide.report import read_report, write_report
from selfguide.report.replication import FIGURES, MEASURED
from selfguide.store import RunStore

OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]
RATHER = {
    "evaluation.protocol": "authors", "synthesis.target_rows": 8, "synthesis.lag": 8, "finetuning.epochs": 1,
    "finetuning.batch_size": 8, "evaluation.bootstrap_samples": 200,
}  # fmt: skip


def _ni_task(kind: str) -> dict[str, Any]:
    """A small task in NI-V2's form."""
    labels = ["positive", "negative"]
    outputs = [labels[i % 2] if kind == "classification" else f"the answer to number {i}" for i in range(23)]
    rows = [{"input": f"text number {i}", "output": output} for i, output in enumerate(outputs)]
    held = [{"id": f"x{i}", "input": row["input"], "output": [row["output"]]} for i, row in enumerate(rows[3:])]
    definition = 'Say whether the text is "positive" or "negative".' if kind == "classification" else "Answer the text."
    return {
        "Definition": [definition], "Positive Examples": [{**row, "explanation": ""} for row in rows[:3]],
        "Negative Examples": [], "Input_language": ["English"], "Output_language": ["English"], "Categories": ["Odd"],
        "Instances": held,
    }  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Three of the authors' tasks, as a clone of NI-V2 would hold them, beside one that is not theirs."""
    folder = tmp_path / "clone"
    (folder / "tasks").mkdir(parents=True)
    kinds = {"task1516_nli": "classification", "task121_zest": "generation", "task1562_zest": "generation"}
    for name, kind in {**kinds, "task002_other": "generation", "task12_other": "generation"}.items():
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(_ni_task(kind)))
    return folder


# ---- what was published


def test_the_authors_lists_and_figures_are_whole() -> None:
    """The means that their logs give follow from the figures."""
    tasks = published_tasks()
    assert len({one.name for one in tasks}) == len(tasks) == 22
    groups: dict[tuple[str, str], list[dict[str, Figure]]] = {}
    for one in tasks:
        groups.setdefault((one.set, one.kind), []).append(figures_of(one))
    assert [len(group) for group in groups.values()] == [7, 4, 7, 4]
    assert all({"base", "gain"} <= set(figures) for group in groups.values() for figures in group)
    classification, generation = groups["held-out", "classification"], groups["held-out", "generation"]

    def mean(group: list[dict[str, Figure]], what: str) -> float:
        return fmean(one[what].points for one in group)

    logged = {"base": (33.2, 38.5), "filtered_decoding": (47.6, 51.1), "gain": (23.0, 20.7)}
    for what, (first, second) in logged.items():
        assert mean(classification, what) == pytest.approx(first, abs=0.06)
        assert mean(generation, what) == pytest.approx(second, abs=0.06)
    settings_known = [
        one["best_validation"].settings for group in groups.values() for one in group if "best_validation" in one
    ]
    assert len(settings_known) == 8
    assert settings_known[0] == "temperature 0.9, filters the length of inputs no, filters the length of outputs yes"


def test_every_figure_says_what_it_is() -> None:
    for task in published_tasks():
        for figure in figures_of(task).values():
            assert figure.source in published()["sources"]
            assert figure.unit in ("fraction", "points")
            assert figure.unit == "points" or 0 <= figure.value <= 1
            assert figure.metric
            assert figure.differs


# ---- which tasks, by which recipe


def test_tasks_are_found_and_the_absent_are_named(clone: Path) -> None:
    chosen = choose_tasks(clone)
    assert {name: task.name for name, task in chosen.tasks.items()} == {
        "task121": "task121_zest", "task1516": "task1516_nli", "task1562": "task1562_zest",
    }  # fmt: skip
    assert len(chosen.absent) == 19
    assert "task284" in chosen.absent
    assert [task.kind for task in chosen.tasks.values()] == ["generation", "classification", "generation"]
    some = choose_tasks(clone / "tasks", ["1516", "task284"])
    assert (list(some.tasks), some.absent) == (["task1516"], ("task284",))


def test_what_cannot_be_chosen_says_the_remedy(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only 7: is none of the authors' tasks; choose from 190, "):
        choose_tasks(clone, ["7"])
    with pytest.raises(UserError, match="selfguide data ni-v2"):
        choose_tasks(tmp_path / "none")
    with pytest.raises(UserError, match="holds none of the authors' tasks"):
        choose_tasks(clone, ["284"])


def test_the_recipe_is_the_papers_with_the_authors_split_and_student() -> None:
    recipe = load_recipe("paper", settings({}))
    assert recipe.model.path == published()["student"]["model"]
    assert re.fullmatch("[0-9a-f]{40}", recipe.model.revision or "")
    assert recipe.evaluation.protocol == "authors"
    plain = load_recipe("paper").model_dump()
    assert recipe.model_dump() == {
        **plain, "model": recipe.model.model_dump(), "evaluation": {**plain["evaluation"], "protocol": "authors"},
    }  # fmt: skip
    own = load_recipe("paper", settings({"model.path": "org/own", "evaluation.protocol": "official"}))
    assert (own.model.path, own.model.revision, own.evaluation.protocol) == ("org/own", None, "official")


def test_the_dry_run_of_all_tasks_counts_tokens_hours_and_bytes(
    ni_v2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the real data, without any student: as the command line has it."""

    def main(*more: str) -> tuple[str, str]:
        argv = ["selfguide", "replicate", str(ni_v2_dir), "--dry-run", "--out", str(tmp_path / "out"), *more]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        read = capsys.readouterr()
        return read.out, read.err

    out, err = main("--json")
    document = json.loads(out)
    assert document["absent"] == ["task284"]
    assert "left out: task284" in err
    assert len(document["tasks"]) == 21
    left = document["left"]
    for key in ("prompt_tokens", "output_tokens", "trained_tokens", "gpu_hours"):
        assert left[key] == pytest.approx(sum(one["left"][key] for one in document["tasks"]), rel=0.02)
    weights = 21 * 4 * 7e9
    assert weights < left["disk_bytes"] < weights + 24 * 7e9 + (1 << 30)
    assert document["assumed"]["params"] == 7e9
    twice = json.loads(main("--json", "--assume", "output_tokens_per_s=1000")[0])["left"]["gpu_hours"]
    assert twice - left["gpu_hours"] == pytest.approx(left["output_tokens"] / 2000 / 3600, rel=0.01)
    shown, _ = main()
    assert "21 tasks" in shown
    assert "GPU hours; disk" in shown
    assert not (tmp_path / "out").exists()


# ---- a run, and its report


async def test_a_replication_stands_beside_the_published_figures(
    open_simulated: OpenSimulated, clone: Path, tmp_path: Path
) -> None:
    """Two kinds of task through every stage; one fails on the first call, and not on the second."""
    veto = {"name": "noise", "words": ["a", "e", "i", "o", "u"], "exempt_gold": False}
    chosen, out, said = choose_tasks(clone, ["121", "1516", "284"]), tmp_path / "run", list[str]()
    async with open_simulated(**RATHER, **{"filters.classification.samples": [veto]}) as session:
        failed = await replicate(chosen, session.recipe, out, session=session, say=said.append)
    assert list(failed) == ["task1516"]
    assert len(said) == 2
    document = read_report(out)
    assert _states(document) == {"task121": "compared", "task1516": "failed", "task284": "absent"}
    markdown = write_report(out)[1]
    assert "Absent from the task files, and not run: task284." in markdown
    assert f"Failed; the same command tries again:\n\n- {failed['task1516'].split(':')[0]}" in markdown.replace(
        "\\", ""
    )

    async with open_simulated(**RATHER) as session:
        again = choose_tasks(clone, ["1516"])
        assert not await replicate(again, session.recipe, out, session=session)
        compared = await run(again.tasks["task1516"], session.recipe, out, session=session)
    for differences in compared.differences.values():
        assert list(differences) == ["exact_match", "rouge_l", "authors_em"]
        assert differences["authors_em"].n == 18
    document, markdown = write_report(out)
    assert set(_states(document).values()) == {"compared", "absent"}
    _check_cells(document)
    assert "Simulated engines answered, without a model: the measured columns mean nothing." in markdown
    _check_table(document, markdown)


def _states(document: dict[str, Any]) -> dict[str, str]:
    rows = document["replication"]["tasks"]
    return {row["name"]: row["state"] for row in rows if row["state"] != "not asked for"}


def _check_cells(document: dict[str, Any]) -> None:
    """Measured cells are the lines' own, by the authors' metrics; the published ones do not depend on them."""
    lines = {line["id"]: line for task in document["tasks"] for line in task["lines"]}
    published_of = {one.name: figures_of(one) for one in published_tasks()}
    for row in document["replication"]["tasks"]:
        for what in FIGURES:
            figure = published_of[row["name"]].get(what)
            assert (row["published"][what] or {}).get("value") == (figure.value if figure else None)
        if row["state"] != "compared":
            assert set(row["measured"].values()) == {None}
            continue
        by_method = {one["method"]: one for one in lines[row["line"]]["methods"]}
        for name in MEASURED:
            assert row["measured"][name] == by_method[name]["scores"][row["metric"]]
            assert row["measured"][name]["low"] <= row["measured"][name]["high"]
        assert row["measured"]["gain"] == by_method["base"]["differences"][row["metric"]]
        assert row["measured"]["base"]["n"] == 18


def _check_table(document: dict[str, Any], markdown: str) -> None:
    """Blank where nothing was measured or published; one line for each of the authors' tasks."""
    cells = {one[0]: one[1:] for one in _cells(markdown)}
    assert cells["task284"][:6] == ["90.1", "", "91.4", "", "", "+0.4"]
    assert cells["task284"][6:] == ["", "", "absent"]
    assert cells["task190"] == ["27.0", "", "", "", "", "+39.7", "", "", "not asked for"]
    measured = cells["task1516"]
    assert (measured[0], measured[2], measured[5], measured[7:]) == ("17.7", "33.6", "+35.6", ["18", "compared"])
    assert all(re.fullmatch(r"\d+\.\d \(\d+\.\d to \d+\.\d\)", measured[column]) for column in (1, 3, 4))
    assert len([name for name in cells if re.fullmatch(r"task\d+", name)]) == 22


def _cells(markdown: str) -> list[list[str]]:
    """Rows of the tables with ten columns."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == 10]


async def test_lost_engines_end_the_replication(open_simulated: OpenSimulated, clone: Path, tmp_path: Path) -> None:
    """No task is to blame for them, so none is marked as failed."""
    faults = {"die_after": 1, "deaths": 100, "marker": str(tmp_path)}
    async with open_simulated(**RATHER, **{"engine.faults": faults, "cluster.limits.max_deaths": 0}) as session:
        with pytest.raises(TaskFailed, match="the same command goes on from here"):
            await replicate(choose_tasks(clone), session.recipe, tmp_path / "run", session=session)
    document = read_report(tmp_path / "run")
    assert "failed" not in _states(document).values()


def test_a_report_without_any_stage_has_blank_cells(clone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunStore(out)
    (out / MARKER).write_text(json.dumps({"tasks": {"task1516": "task1516_nli"}, "absent": [], "failed": {}}))
    document, markdown = write_report(out)
    assert _states(document) == {"task1516": "to do"}
    assert {cell for row in _cells(markdown) for cell in (row[2], row[4], row[5], row[7], row[8])} <= {
        "", "base", "filtered decoding", "SELF-GUIDE", "gain", "n", *re.findall("-+:", markdown),
    }  # fmt: skip
    (out / MARKER).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_report(out)


def test_means_weigh_tasks_alike_and_their_intervals_add_up() -> None:
    from selfguide.report.replication import _measured_mean

    cells = [{"mean": 10.0, "low": 7.0, "high": 13.0, "n": 5}, {"mean": 30.0, "low": 26.0, "high": 34.0, "n": 500}]
    rows = [{"measured": {"base": cell}} for cell in cells]
    assert _measured_mean(rows, "base") == {"mean": 20.0, "low": 17.5, "high": 22.5, "n": 505}
    assert _measured_mean([*rows, {"measured": {"base": None}}], "base") is None


# ---- intervals of tasks as large as the authors'


@pytest.mark.parametrize(("num_rows", "resamples"), [(7, 250), (5_850, 1_000)])
def test_resamples_drawn_in_parts_are_those_of_one_draw(num_rows: int, resamples: int) -> None:
    values = [random.Random(number).random() for number in range(num_rows)]
    array = np.asarray(values)
    means = array[np.random.default_rng(3).integers(0, num_rows, (resamples, num_rows))].mean(axis=1)
    found = bootstrap(values, resamples, seed=3)
    assert (found.low, found.high) == tuple(round(100 * float(one), 2) for one in np.percentile(means, [2.5, 97.5]))
