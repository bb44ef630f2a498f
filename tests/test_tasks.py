from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfguide.errors import UserError
from selfguide.tasks import Example, Instance, Task, find_tasks, load_split, load_task

OWN: dict[str, Any] = {
    "instruction": "Is the review 'good' or 'bad'?",
    "examples": [{"input": "Loved it.", "output": "good"}, {"input": "Hated it.", "output": "bad"}],
    "instances": [{"id": "a", "input": "Fine.", "output": ["good", "ok"]}, {"input": "Meh.", "output": "bad"}],
    "language": "English",
}
NI: dict[str, Any] = {
    "Contributors": ["someone"],
    "Categories": ["Sentiment Analysis"],
    "Definition": ["Answer 'Yes' or 'No'."],
    "Input_language": ["Hindi"],
    "Output_language": ["English"],
    "Positive Examples": [{"input": "p", "output": "Yes", "explanation": "so"}],
    "Negative Examples": [{"input": "n", "output": "Maybe", "explanation": "no"}],
    "Instances": [{"id": "task1-x", "input": "i", "output": ["Yes", "No"]}],
}
YAML = """\
instruction: Is the review 'good' or 'bad'?
examples:
  - {input: Loved it., output: good}
  - input: Hated it.
    output: |
      bad
instances:
  - {id: a, input: Fine., output: [good, ok]}
  - {input: Meh., output: bad}
language: English
"""

Write = Callable[[str, object], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write_file


def one_line(error: pytest.ExceptionInfo[UserError], path: Path) -> str:
    message = str(error.value)
    assert message.startswith(str(path)), message
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_an_own_task_is_read(write: Write) -> None:
    task = load_task(write("mood.json", OWN))
    assert task.name == "mood"
    assert task.instruction == OWN["instruction"]
    assert task.examples == (Example("Loved it.", "good"), Example("Hated it.", "bad"))
    assert task.instances == (Instance("a", "Fine.", ("good", "ok")), Instance("mood-1", "Meh.", ("bad",)))
    assert (task.kind, task.labels, task.labels_from) == ("classification", ("bad", "good"), "examples")
    assert (task.category, task.input_language, task.output_language) == ("", "English", "English")
    assert task.remarks == ()


def test_an_ni_task_is_read(write: Write) -> None:
    task = load_task(write("task1_x.json", NI))
    assert (task.name, task.instruction, task.category) == ("task1_x", "Answer 'Yes' or 'No'.", "Sentiment Analysis")
    assert task.examples == (Example("p", "Yes"),)
    assert task.instances == (Instance("task1-x", "i", ("Yes", "No")),)
    assert (task.kind, task.labels, task.labels_from) == ("classification", ("No", "Yes"), "examples")
    assert (task.input_language, task.output_language) == ("Hindi", "English")
    assert task.remarks == ("the input is not English but Hindi", "there is only one example")


def test_the_digest_is_of_the_content_alone(write: Write) -> None:
    task = load_task(write("mood.json", OWN))
    indented = "\ufeff" + json.dumps(dict(reversed(OWN.items())), indent=3)
    for path in (write("mood.yaml", YAML), write("deeper/mood.json", indented)):
        again = load_task(path)
        assert again == replace(task, source=str(path))


def test_the_digest_sees_each_part_of_the_content(write: Write) -> None:
    changed = {
        "name": "other",
        "instruction": "Is it 'good' or 'bad'?",
        "examples": OWN["examples"][::-1],
        "instances": OWN["instances"][:1],
        "kind": "generation",
        "labels": ["good", "bad", "so-so"],
    }
    tasks = [load_task(write("mood.json", OWN | {key: value})) for key, value in changed.items()]
    assert len({task.digest for task in [*tasks, load_task(write("mood.json", OWN))]}) == len(changed) + 1


def test_yaml_scalars_are_text(write: Write) -> None:
    text = "instruction: Answer yes or no.\nexamples: [{input: 1, output: yes}, {input: 1.50, output: no}]"
    task = load_task(write("a.yml", text))
    assert task.examples == (Example("1", "yes"), Example("1.50", "no"))
    assert load_task(write("b.yml", text + "\nkind: !!python/name:os.system generation")).kind == "generation"


def own_with(**changes: object) -> dict[str, Any]:
    return OWN | changes


BROKEN: list[tuple[str, object, str]] = [
    ("a.json", b"", "empty"),
    ("a.yaml", b"# nothing\n", "empty"),
    ("a.json", b'{"instruction": "x",\n "examples": [', "line 2 column 15"),
    ("a.yaml", b"instruction: [a\nb: c", "line 2 column"),
    ("a.yaml", b"instruction: a\x07b", "not YAML"),
    ("a.json", "naïve".encode("latin-1"), "UTF-8"),
    ("a.json", "{}".encode("utf-16"), "UTF-8"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
    ("a.yaml", b"[" * 1000, "nested too deeply"),
    ("a.json", b"9" * 5000, "number cannot be read"),
    ("a.json", b'{"instruction": "a", "instruction": "b"}', "'instruction' stands twice"),
    ("a.yaml", b"instruction: a\ninstruction: b", "line 2 repeats the key 'instruction'"),
    ("a.yaml", b"a: &a [x, x]\nb: [*a, *a]", "line 1 has an anchor"),
    ("a.yaml", b"a: 1\nb: *a", "line 2 has an anchor"),
    ("a.yaml", b"a: 1\n---\nb: 2", "second document"),
    ("a.yaml", b"? [a]\n: b", "a list as a key"),
    ("a.txt", b"{}", "suffix '.txt'"),
    ("a.json", [], "holds a list"),
    ("a.json", None, "holds null"),
    ("a.json", "7", "holds a number"),
    ("a.json", {}, "instruction is missing: add it (and 1 more)"),
    ("a.json", own_with(instruction=" \n"), "instruction is empty"),
    ("a.json", own_with(instruction=["x"]), "instruction is a list: write it as one text"),
    ("a.json", own_with(examples=[]), "examples is empty"),
    ("a.json", own_with(examples={}), "examples is a mapping: write a list"),
    ("a.json", own_with(examples=["x"]), "examples[0] is text: write a mapping"),
    ("a.json", own_with(examples=[{"input": "x"}]), "examples[0].output is missing"),
    ("a.json", own_with(examples=[{"input": "x", "output": True}]), "examples[0].output is true or false"),
    ("a.json", own_with(examples=[{"input": "x", "output": 5}]), "examples[0].output is a number: write it as"),
    ("a.json", own_with(examples=[{"input": "x", "outptu": "y"}]), "did you mean output?"),
    ("a.json", own_with(instances=[{"input": "x", "output": []}]), "instances[0].output is empty"),
    ("a.json", own_with(instances=[{"input": "x", "output": ["a", None]}]), "instances[0].output[1] is null"),
    ("a.json", own_with(Instruction="x"), "'Instruction' is not a known key: did you mean instruction?"),
    ("a.json", own_with(qqq=1), "remove it (known are instruction, examples"),
    ("a.json", own_with(labels=["a"]), "at least two"),
    ("a.json", own_with(labels=["a", "a "]), "at least two"),
    ("a.json", own_with(labels=["a", "b"], kind="generation"), "has no labels"),
    ("a.json", own_with(kind="regression"), "kind is 'regression': write classification or generation"),
    ("a.json", own_with(name="../../etc"), "name '../../etc'"),
    ("a.json", own_with(name=""), "name ''"),
    ("a b.json", OWN, "name 'a b'"),
    ("a.json", b'{"instruction": "\\ud800", "examples": []}', "surrogate"),
    ("a.json", NI | {"Positive Examples": []}, "Positive Examples is empty"),
    ("a.json", NI | {"Definition": []}, "Definition is empty"),
    ("a.json", NI | {"Definition": [""]}, "Definition is empty"),
    ("a.json", NI | {"Instances": [{"input": "x"}]}, "Instances[0].output is missing"),
    ("a.json", {"Instances": []}, "Definition is missing"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BROKEN)
def test_a_broken_file_is_named_with_its_remedy(write: Write, name: str, content: object, expected: str) -> None:
    path = write(name, content)
    with pytest.raises(UserError) as error:
        load_task(path)
    assert expected in one_line(error, path)


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name, expected in {"": "folder", "absent.json": "no such file", "pipe.json": "no regular file"}.items():
        with pytest.raises(UserError, match=expected):
            load_task(tmp_path / name)


@pytest.mark.parametrize(("name", "num_bytes"), [("a.json", 2**28 + 1), ("a.yaml", 2**24 + 1)])
def test_a_huge_file_is_refused_unread(tmp_path: Path, name: str, num_bytes: int) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, num_bytes)
    with pytest.raises(UserError, match="larger than"):
        load_task(tmp_path / name)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


def graft(content: Any, path: list[int], value: object) -> Any:
    """The content with the value put where `path` leads."""
    if not path or not isinstance(content, dict | list) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    chosen = keys[path[0] % len(keys)]
    new = graft(content[chosen], path[1:], value)
    if isinstance(content, dict):
        return content | {chosen: new}
    return [new if key == chosen else content[key] for key in keys]


def load_or_complain(path: Path) -> None:
    try:
        message = str(load_task(path).source)
    except UserError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([OWN, NI]), st.lists(st.integers(0, 9), max_size=4), json_values)
def test_any_wrong_value_anywhere_is_a_user_error(
    write: Write, content: dict[str, Any], place: list[int], value: object
) -> None:
    load_or_complain(write("a.json", graft(content, place, value)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.json", "a.yaml"]), st.binary(max_size=60) | st.text("{[:-&*!|>\"'a ,\n#%", max_size=60))
def test_any_text_is_a_task_or_a_user_error(write: Write, name: str, content: bytes | str) -> None:
    load_or_complain(write(name, content))


def test_kind_and_labels_may_be_given(write: Write) -> None:
    path = write("a.json", OWN)
    assert load_task(path, kind="generation").labels_from is None
    assert load_task(path, kind="generation", labels_from="instances").labels == ()
    task = load_task(path, labels_from="instances")
    assert (task.labels, task.labels_from) == (("bad", "good", "ok"), "instances")
    assert "the labels are taken from the instances, which are the test answers" in task.remarks
    declared = load_task(write("b.json", own_with(labels=["good", "bad", "ok"])))
    assert (declared.labels, declared.labels_from) == (("good", "bad", "ok"), "task")
    assert load_task(write("b.json", own_with(labels=["good", "bad", "ok"])), kind="generation").labels == ()


def test_labels_cannot_come_from_where_none_are(write: Write) -> None:
    with pytest.raises(UserError, match="declares no labels"):
        load_task(write("a.json", OWN), labels_from="task")
    with pytest.raises(UserError, match="the file has none"):
        load_task(write("a.json", own_with(instances=[])), labels_from="instances")


def test_the_test_answers_change_neither_kind_nor_labels(write: Write) -> None:
    task = load_task(write("a.json", NI))
    other = load_task(write("a.json", NI | {"Instances": [{"id": "x", "input": "i", "output": ["a long story"]}]}))
    assert (task.kind, task.labels) == (other.kind, other.labels)


def test_what_is_odd_is_remarked(write: Write) -> None:
    instances = [
        {"id": "x", "input": "", "output": "a"},
        {"id": "x", "input": "Same", "output": ["b", ""]},
        {"input": "y" * 10_001, "output": "c"},
    ]
    odd = {"instruction": "Say it.", "examples": [{"input": "Same", "output": ""}], "instances": instances}
    task = load_task(write("a.json", odd), kind="classification")
    assert task.labels == ()
    assert [row.id for row in task.instances] == ["a-0", "a-1", "a-2"]
    assert task.remarks == (
        "instance ids repeat: all instances are numbered anew",
        "no language is stated: taken as English, which decides how ROUGE-L is computed",
        "there is only one example",
        "1 of 1 examples have an empty input or output",
        "2 of 3 instances have an empty input or reference",
        "1 of 3 instances have the input of an example",
        "1 of 3 instances have an input of more than 10,000 characters",
        "too few labels are found in examples (0): "
        "declare labels, or use labels_from: instances (which reads the test answers)",
        "1 outputs of examples are not among the labels ([''])",
        "3 of 3 instances have no reference among the labels",
    )


def test_find_tasks(write: Write, tmp_path: Path) -> None:
    a, b, c = (write(f"clone/tasks/{name}", NI) for name in ("b.json", "a.json", "c.yaml"))
    for name in ("clone/tasks/README.md", "clone/tasks/.hidden.json", "clone/splits/x.json"):
        write(name, "")
    (tmp_path / "clone" / "tasks" / "folder.json").mkdir()
    root = tmp_path / "clone"
    everything = [b, a, c]
    assert find_tasks([root]) == everything
    same: list[str | Path] = [root / "tasks", a, str(root / "tasks" / "*.json"), root / "splits" / ".." / "tasks"]
    assert find_tasks(same) == everything
    assert find_tasks([str(root / "**" / "b.json")]) == [a]
    for path in (root / "absent.json", root / "tasks" / "folder.json", str(root / "*.txt")):
        with pytest.raises(UserError, match="name task files"):
            find_tasks([path])


def test_load_split_says_what_is_absent(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write("splits/default/test_tasks.txt", "task2_b\ntask1_a\ntask3_c\n")
    for name in ("task1_a", "task2_b"):
        write(f"tasks/{name}.json", NI)
    with pytest.raises(UserError, match=r"1 of its 3 tasks are absent .*task3_c.*complete the clone"):
        load_split(tmp_path, "default/test")
    with caplog.at_level(logging.WARNING):
        assert load_split(tmp_path, "default/test", missing_ok=True) == ["task2_b", "task1_a"]
    assert "1 of its 3 tasks are absent" in caplog.text
    caplog.clear()
    write("tasks/task3_c.json", NI)
    assert load_split(tmp_path, "default/test") == ["task2_b", "task1_a", "task3_c"]
    assert not caplog.text
    for name, expected in {"default/../x": "no split", "xlingual/test": "no such file"}.items():
        with pytest.raises(UserError, match=expected):
            load_split(tmp_path, name)


def test_importing_tasks_is_light() -> None:
    code = "import sys, selfguide.tasks; print([m for m in sys.modules])"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "polars", "vllm", "ray", "transformers", "nltk") if f"'{name}'" in modules]


@pytest.fixture(scope="module")
def ni_tasks(ni_v2_dir: Path) -> list[Task]:
    return [load_task(path) for path in find_tasks([ni_v2_dir])]


def test_every_real_task_loads(ni_tasks: list[Task], ni_v2_manifest: dict[str, dict[str, str]]) -> None:
    assert sorted(task.name for task in ni_tasks) == sorted(ni_v2_manifest)
    assert len({task.digest for task in ni_tasks}) == len(ni_tasks)
    for task in ni_tasks:
        assert len(task.instances) == int(ni_v2_manifest[task.name]["n_instances"])
        assert len(task.examples) == int(ni_v2_manifest[task.name]["n_positive"])
    empty = [task for task in ni_tasks if any("empty input or reference" in remark for remark in task.remarks)]
    assert len(empty) == 8


def test_kind_agrees_with_the_manifest(ni_tasks: list[Task], ni_v2_manifest: dict[str, dict[str, str]]) -> None:
    """The manifest counts the distinct outputs of the instances, which the rule does not see."""
    agree = [
        (task.kind == "classification") == (ni_v2_manifest[task.name]["is_classification"] == "True")
        for task in ni_tasks
    ]
    assert sum(agree) / len(agree) >= 0.975


def test_kind_of_the_tasks_of_the_paper(ni_tasks: list[Task]) -> None:
    """Held-in and held-out tasks of SELF-GUIDE, without task284, which the archive lacks."""
    labelled = "190 199 200 738 937 1385 1386 1516 1529 1612 1615 329 346".split()
    free = "036 039 121 1195 281 1345 1562 1622".split()
    kinds = {task.name.split("_")[0].removeprefix("task"): task for task in ni_tasks}
    assert {number for number in labelled + free if kinds[number].kind == "classification"} == set(labelled)
    for number in labelled:
        answers = {text.strip() for row in kinds[number].instances for text in row.references}
        assert answers <= set(kinds[number].labels)


def test_labels_agree_with_the_manifest(ni_v2_dir: Path, ni_v2_manifest: dict[str, dict[str, str]]) -> None:
    equal = enough = 0
    names = [name for name, row in ni_v2_manifest.items() if row["is_classification"] == "True"]
    for name in names:
        found = set(load_task(ni_v2_dir / "tasks" / f"{name}.json", kind="classification").labels)
        wanted = {label.strip() for label in ni_v2_manifest[name]["labels"].split(" | ")}
        equal, enough = equal + (found == wanted), enough + (found >= wanted)
    assert len(names) == 544
    assert equal >= 495
    assert enough >= 505


def test_the_real_splits(ni_v2_dir: Path, ni_tasks: list[Task]) -> None:
    names = {task.name for task in ni_tasks}
    with pytest.raises(UserError, match="31 of its 119 tasks are absent"):
        load_split(ni_v2_dir, "default/test")
    counts = {"default/train": 691, "default/test": 88, "default/excluded": 672, "xlingual/test": 34}
    for split, count in counts.items():
        tasks = load_split(ni_v2_dir, split, missing_ok=True)
        assert len(tasks) == count
        assert names.issuperset(tasks)
