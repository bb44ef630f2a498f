from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfguide import protocols
from selfguide.api import Session
from selfguide.config import Evaluation, Recipe
from selfguide.evaluation import Protocol, evaluation_stage
from selfguide.methods import base
from selfguide.recipefile import load_recipe
from selfguide.store import RunStore
from selfguide.taskrun import Student, TaskRun
from selfguide.tasks import Example, Instance, Task, find_tasks, load_task

OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]
OFFICIAL, AUTHORS = Evaluation(), Evaluation(protocol="authors")


def make_task(references: Sequence[tuple[str, ...]], name: str = "task1", labels: tuple[str, ...] = ()) -> Task:
    instances = tuple(Instance(f"{name}-{index}", f"input {index}", texts) for index, texts in enumerate(references))
    return Task(
        name=name, instruction="Answer.", examples=(Example("a", "b"),), instances=instances,
        kind="classification" if labels else "generation", labels=labels, labels_from="task" if labels else None,
        category="", input_language="English", output_language="English", source="", digest=f"{name} {labels}",
        remarks=(),
    )  # fmt: skip


def ids(rows: tuple[Instance, ...]) -> list[str]:
    return [row.id for row in rows]


def test_official_test_rows_are_the_first_with_all_references() -> None:
    task = make_task([("x", "y"), ("z",)] * 60)
    assert protocols.test_instances(task, OFFICIAL, 0) == task.instances[:100]
    assert protocols.validation_instances(task, OFFICIAL, 0) == task.instances[100:]
    capped = protocols.validation_instances(task, Evaluation(num_instances=7, num_validation=5), 0)
    assert capped == task.instances[7:12]
    few = Evaluation(num_instances=7)
    assert protocols.test_instances(task, few, 1) == task.instances[:7]
    assert protocols.validation_instances(make_task([("x",)] * 7), few, 1) == ()


# Validation and test of the authors' tasks, as they report them.
SIZES = [
    (6500, 650), (990, 99), (709, 70), (5060, 506), (1800, 180), (1797, 179), (127, 12), (142, 14), (1475, 147),
    (1995, 199),
]  # fmt: skip


@pytest.mark.parametrize(("total", "validation"), SIZES)
@pytest.mark.parametrize("labels", [(), ("a", "b", "c")])
def test_authors_sizes(total: int, validation: int, labels: tuple[str, ...]) -> None:
    task = make_task([(labels[index % 7 % 3],) if labels else ("x",) for index in range(total)], labels=labels)
    assert len(protocols.validation_instances(task, AUTHORS, 0)) == validation
    assert len(protocols.test_instances(task, AUTHORS, 0)) == total - validation


@given(st.lists(st.sampled_from("aaabc"), max_size=80), st.integers(0, 3), st.booleans())
def test_authors_rows_are_a_partition_in_file_order(answers: list[str], seed: int, classification: bool) -> None:
    task = make_task([(one, "other") for one in answers], labels=("a", "b", "c") if classification else ())
    test, held = (get(task, AUTHORS, seed) for get in (protocols.test_instances, protocols.validation_instances))
    order = {row.id: index for index, row in enumerate(task.instances)}
    for rows in (test, held):
        assert ids(rows) == sorted(ids(rows), key=lambda one: order[one])
    assert sorted(ids(test) + ids(held)) == sorted(order)
    assert [row.references for row in test] == [(answers[order[row.id]],) for row in test]
    assert len(held) == len(answers) // 10
    if classification:
        shares, drawn = Counter(answers), Counter(row.references[0] for row in held)
        assert all(abs(drawn[label] - len(held) * shares[label] / len(answers)) < 1 for label in shares)


def test_authors_rows_follow_from_seed_and_name_alone() -> None:
    answers = [("x",)] * 200
    held = ids(protocols.validation_instances(make_task(answers), AUTHORS, 0))
    assert held == ids(protocols.validation_instances(make_task(answers), AUTHORS, 0))
    # The labels may come from elsewhere: the split of a task with one stratum is still the same.
    assert held == ids(protocols.validation_instances(make_task(answers, labels=("x", "y")), AUTHORS, 0))
    assert held != ids(protocols.validation_instances(make_task(answers), AUTHORS, 1))
    other = protocols.validation_instances(make_task(answers, name="task2"), AUTHORS, 0)
    assert [one.split("-")[1] for one in held] != [row.id.split("-")[1] for row in other]
    assert ids(protocols.validation_instances(make_task(answers), Evaluation(num_instances=5), 0)) != held


def test_real_tasks_are_split_as_the_authors_split_them(ni_v2_dir: Path) -> None:
    [path] = find_tasks([str(ni_v2_dir / "tasks" / "task1516_*.json")])
    task = load_task(path)
    held = protocols.validation_instances(task, AUTHORS, 0)
    test = protocols.test_instances(task, AUTHORS, 0)
    assert (len(held), len(test)) == (70, 639)
    shares = Counter(row.references[0] for row in task.instances)
    assert len(shares) == 3
    for label, count in Counter(row.references[0] for row in held).items():
        assert abs(count - 70 * shares[label] / 709) < 1


def test_the_recipes_name_their_protocols() -> None:
    named = {name: load_recipe(name).evaluation.protocol for name in ("default", "paper", "authors", "smoke")}
    assert named == {"default": "official", "paper": "official", "authors": "authors", "smoke": "official"}


def fingerprint(folder: Path, task: Task, recipe: Recipe) -> str:
    nobody = cast(Any, None)
    student = Student("", "digest", nobody, False, 512)
    run = TaskRun(task, recipe, student, nobody, nobody, RunStore(folder).task(task.name))
    return evaluation_stage(run, Protocol("base", recipe.evaluation.sampling, None)).fingerprint


def test_the_protocol_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    task = make_task([("x",)] * 20)

    def of(**evaluation: Any) -> str:
        return fingerprint(tmp_path, task, Recipe(evaluation=Evaluation(**evaluation)))

    assert of() == of(protocol="official")
    assert of(protocol="authors") == of(protocol="authors", num_instances=5)
    assert len({of(), of(num_instances=5), of(protocol="authors")}) == 3


def test_where_labels_come_from_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    rows = {"instruction": "Say 'good' or 'bad'.", "examples": [{"input": "a", "output": "good"}]}
    path = tmp_path / "mood.yaml"
    path.write_text(f"{rows | {'instances': [{'input': 'x', 'output': one} for one in ('good', 'bad')]}}")
    tasks = [load_task(path, labels_from=source) for source in ("examples", "instances")]
    assert tasks[0].digest == tasks[1].digest
    assert len({fingerprint(tmp_path / "run", task, Recipe()) for task in tasks}) == 2


async def test_authors_metrics_stand_beside_the_official(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    labelled = make_task([("yes", "no")] * 30 + [("no",)] * 10, "labelled", labels=("no", "yes"))
    free = make_task([("a b", "c")] * 20, "free")
    async with open_simulated(**{"evaluation.protocol": "authors"}) as session:
        store = RunStore(tmp_path / "run")
        runs = [session.task_run(task, store, lambda task, stage, counts: None) for task in (labelled, free)]
        first, second = [await base(run) for run in runs]
    assert first is not None
    assert second is not None
    assert (first.marker["protocol"], first.marker["labels_from"], second.marker["labels_from"]) == (
        "authors", "task", None,
    )  # fmt: skip
    assert (first.marker["scores"]["n"], second.marker["scores"]["n"]) == (36, 18)
    assert {"authors_em", "authors_rouge_char"} & first.marker["scores"].keys() == {"authors_em"}
    assert {"authors_em", "authors_rouge_char"} & second.marker["scores"].keys() == {"authors_rouge_char"}
    for row in first.rows():
        assert row["authors_em"] in (0.0, 1.0)
        assert row["authors_rouge_char"] is None
        assert len(row["references"]) == 1
    assert all(row["authors_em"] is None and 0 <= row["authors_rouge_char"] <= 1 for row in second.rows())


async def test_the_official_protocol_computes_no_other_metrics(open_simulated: OpenSimulated, tmp_path: Path) -> None:
    task = make_task([("yes", "no")] * 3, labels=("no", "yes"))
    async with open_simulated() as session:
        found = await base(session.task_run(task, RunStore(tmp_path / "run"), lambda task, stage, counts: None))
    assert found is not None
    assert sorted(found.marker["scores"]) == ["exact_match", "n", "rouge_l"]
    assert [row["references"] for row in found.rows()] == [["yes", "no"]] * 3
    assert {(row["authors_em"], row["authors_rouge_char"]) for row in found.rows()} == {(None, None)}
