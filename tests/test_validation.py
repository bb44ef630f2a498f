from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from selfguide.cli import app
from selfguide.errors import UserError
from selfguide.recipefile import load_recipe
from selfguide.tasks import Task
from selfguide.validation import FEW_TASKS, remark_kind, summary, validate

MOOD: dict[str, Any] = {
    "instruction": "Is the review 'good' or 'bad'?",
    "examples": [{"input": "Loved it.", "output": "good"}, {"input": "Hated it.", "output": "bad"}],
    "instances": [{"input": "Fine.", "output": "good"}, {"input": "Meh.", "output": "bad"}],
    "language": "English",
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: object = MOOD, **changes: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps({**dict(content), **changes})  # type: ignore[call-overload]
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["validate", *map(str, arguments)], catch_exceptions=False)


def test_each_task_has_a_verdict(write: Write, tmp_path: Path) -> None:
    write("a.json")
    write("b.json", instances=[], language="Hindi")
    broken = write("c.json", "{")
    ok, remarked, failed = validate([tmp_path])
    assert (ok.task, ok.verdict, ok.kind, ok.labels, ok.labels_from) == (
        "a", "ok", "classification", ("bad", "good"), "examples",
    )  # fmt: skip
    assert (ok.num_examples, ok.num_instances, ok.language, ok.remarks, ok.error) == (2, 2, "English", (), None)
    assert (remarked.verdict, remarked.num_instances, remarked.language) == ("remarks", 0, "Hindi")
    assert "there are no instances: nothing can be evaluated" in remarked.remarks
    assert (failed.path, failed.task, failed.verdict, failed.labels, failed.remarks) == (
        str(broken), None, "error", (), (),
    )  # fmt: skip
    assert str(failed.error).startswith(f"{broken}: line 1 column 2 is not JSON")


def test_the_exit_code_says_whether_a_task_is_in_error(write: Write, tmp_path: Path) -> None:
    good = write("a.json")
    assert run(good).exit_code == 0
    assert run(write("b.json", instances=[])).exit_code == 0
    write("c.json", "{")
    assert run(tmp_path).exit_code == 2
    assert run(tmp_path, "--json").exit_code == 2


def test_json_is_one_list_with_stable_keys(write: Write, tmp_path: Path) -> None:
    write("a.json")
    write("b.json", "{")
    listed = json.loads(run(tmp_path, "--json").stdout)
    keys = ("path task verdict kind labels labels_from num_examples num_instances language remarks error").split()
    assert [list(one) for one in listed] == [keys, keys]
    assert listed[0] == {
        "path": str(tmp_path / "a.json"), "task": "a", "verdict": "ok", "kind": "classification",
        "labels": ["bad", "good"], "labels_from": "examples", "num_examples": 2, "num_instances": 2,
        "language": "English", "remarks": [], "error": None,
    }  # fmt: skip
    assert listed[1]["verdict"] == "error"


def test_kind_and_labels_can_be_said(write: Write) -> None:
    path = write("a.json", labels=["good", "bad", "so-so"])
    for source, labels in {"task": 3, "examples": 2, "instances": 2}.items():
        [one] = json.loads(run(path, "--labels-from", source, "--json").stdout)
        assert (one["labels_from"], len(one["labels"])) == (source, labels)
        assert (one["verdict"] == "remarks") == (source == "instances")
    [one] = json.loads(run(path, "--kind", "generation", "--json").stdout)
    assert (one["kind"], one["labels"], one["labels_from"]) == ("generation", [], None)
    wanting = run(write("b.json"), "--labels-from", "task")
    assert wanting.exit_code == 2
    assert "labels_from is task, but the file declares no labels" in wanting.stdout
    assert run(path, "--labels-from", "elsewhere").exit_code == 2


def test_labels_from_the_test_answers_are_marked(write: Write) -> None:
    text = run(write("a.json"), "--labels-from", "instances").stdout
    assert "2 (test answers)" in text
    assert "a: the labels are taken from the instances, which are the test answers" in text
    assert text.splitlines()[-1].endswith("1 take their labels from the test answers")


def test_few_tasks_are_listed_and_many_summed_up(write: Write, tmp_path: Path) -> None:
    for index in range(FEW_TASKS):
        write(f"task{index:02}.json", instances=[])
    few = run(tmp_path).stdout
    assert all(f"task{index:02}: there are no instances" in few for index in range(FEW_TASKS))
    write("last.json", "{")
    many = run(tmp_path).stdout.splitlines()
    assert many[0].split() == ["remark", "tasks"]
    assert many[1].split() == ["there", "are", "no", "instances", str(FEW_TASKS)]
    assert [line for line in many if line.startswith("error")] == [
        f"error  {tmp_path}/last.json: line 1 column 2 is not JSON "
        "(Expecting property name enclosed in double quotes): correct it there"
    ]
    assert many[-1] == "11 tasks: 0 ok, 10 with remarks, 1 in error"
    assert "task03 " not in "\n".join(many)
    listed = run(tmp_path, "--all").stdout
    assert all(f"task{index:02} " in listed for index in range(FEW_TASKS))


HOSTILE = "[red]x[/red] \x1b[31mred\u202e"


@pytest.mark.parametrize("terminal", [False, True])
def test_text_from_files_is_neither_markup_nor_obeyed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    write("a.json", language=HOSTILE)
    write("[bold]b\x1b[31m.json", "{")
    text = run(tmp_path, "--all").stdout
    assert r"but [red]x[/red] \x1b[31mred\u202e" in text
    assert r"[bold]b\x1b[31m.json: line 1" in text
    assert "\x1b[31mred" not in text
    assert "\u202e" not in text
    assert ("\x1b[" in text) == terminal


def test_a_narrow_terminal_loses_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    name = "task0001_with_a_name_that_is_longer_than_what_is_left_of_a_line"
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(write(f"{name}.json")).stdout)
    head, *rows = text.splitlines()[:6]
    assert max(map(len, [head, *rows])) <= 80
    assert "".join(row.split()[0] for row in rows if row.strip() and "1 task" not in row) == name
    assert rows[0].split()[1:] == ["ok", "classification", "2", "2", "2", "English"]


def test_two_tasks_of_one_name_are_remarked(write: Write, tmp_path: Path) -> None:
    first = write("a/same.json")
    write("b/same.json", instances=[])
    one, other = validate([tmp_path / "a", tmp_path / "b"])
    assert one.verdict == "ok"
    assert other.remarks[-1] == f"another task has this name: {first}"
    assert [two.verdict for two in validate([first, first])] == ["ok"]


def test_remarks_are_counted_by_kind() -> None:
    kinds = {
        "the input is not English but Hindi": "the input is not English",
        "3 of 100 instances have the input of an example": "some instances have the input of an example",
        "2 outputs of examples are not among the labels (['a: b ('])":
            "some outputs of examples are not among the labels",
        "too few labels are found in examples (0): declare labels": "too few labels are found in examples",
        "1 of 9 instances have an input of more than 10,000 characters":
            "some instances have an input of more than 10,000 characters",
    }  # fmt: skip
    assert {remark: remark_kind(remark) for remark in kinds} == kinds


def test_a_recipe_is_held_against_the_tasks(write: Write) -> None:
    many = [{"input": str(index), "output": "good"} for index in range(120)]
    path, few = write("many.json", instances=many), write("few.json")
    default, authors = load_recipe("default"), load_recipe("authors")
    assert [one.verdict for one in validate([path], recipe=default)] == ["ok"]
    assert [one.verdict for one in validate([path], recipe=authors)] == ["ok"]
    none_left = "no instances are left for validation: a search cannot use this task"
    too_few = "2 of 100 test rows are there: evaluation.num_instances asks for more"
    assert [one.remarks for one in validate([few], recipe=default)] == [(too_few, none_left)]
    assert [one.remarks for one in validate([few], recipe=authors)] == [(none_left,)]
    assert too_few in run(few, "--recipe", "default").stdout


def test_a_student_is_held_against_the_tasks(write: Write, random_student: Path) -> None:
    settings = {"model.path": str(random_student), "engine.max_model_len": 256, "evaluation.num_instances": 1}
    recipe = load_recipe("smoke", settings)
    [fits] = validate([write("a.json")], recipe=recipe)
    assert (fits.verdict, fits.remarks) == ("ok", ())
    long = [{"input": "word " * 400, "output": "good"}, {"input": "x", "output": "bad"}]
    [missed] = validate([write("b.json", instances=long)], recipe=recipe)
    assert missed.remarks == ("1 of 1 test rows do not fit the student's context: they will be misses",)
    [refused] = validate([write("c.json", instruction="word " * 400)], recipe=recipe)
    assert (refused.verdict, refused.task) == ("error", None)
    assert "c.json: the instruction does not fit the student's context" in str(refused.error)
    with pytest.raises(UserError, match=r"config\.json"):
        run(write("a.json"), "--model", write("empty/x.json").parent)


def test_every_real_task_has_a_verdict(ni_v2_dir: Path, ni_v2_manifest: dict[str, dict[str, str]]) -> None:
    verdicts = validate([ni_v2_dir])
    assert summary(verdicts) == "1,451 tasks: 861 ok, 590 with remarks, 0 in error"
    assert sorted(str(one.task) for one in verdicts) == sorted(ni_v2_manifest)
    kinds = Counter(remark_kind(remark) for one in verdicts for remark in one.remarks)
    foreign = sum(row["output_language"] != "English" for row in ni_v2_manifest.values())
    assert kinds["the output is not English"] == foreign
    assert len(kinds) <= 12


def test_a_run_takes_kind_and_labels_too(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Task] = []

    async def take(task: Task, *_: object, **__: object) -> None:
        seen.append(task)

    monkeypatch.setattr("selfguide.api.run", take)
    monkeypatch.setattr("selfguide.cli._write_report", lambda folder, as_json: None)
    path = write("a.json", labels=["good", "bad", "so-so"])
    for options in (["--labels-from", "instances"], ["--kind", "generation"], []):
        arguments = ["run", str(path), "--out", str(tmp_path / "run"), "--recipe", "smoke", *options]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert [(task.kind, task.labels_from, len(task.labels)) for task in seen] == [
        ("classification", "instances", 2), ("generation", None, 0), ("classification", "task", 3),
    ]  # fmt: skip
