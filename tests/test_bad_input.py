"""Whatever a user gets wrong is one line that names the thing and the remedy, exit 2, and loses nothing.

What single parts refuse is tested beside them (test_tasks, test_recipes, test_adapters, test_store, test_scoring,
test_report); here it goes through the command line, or through a run.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.models import ModelError
from selfguide import api, cli, scorecard
from selfguide.api import Session
from selfguide.recipefile import load_recipe
from selfguide.sizes import read_size
from tests.test_adapters import BROKEN_FILES, SPOILT, WriteLora, write_spoilt

EXAMPLES = Path(cli.__file__).parent / "examples"
TASK = EXAMPLES / "sentiment.json"
OpenSimulated = Callable[..., AbstractAsyncContextManager[Session]]
DEEP = "[" * 100_000
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the console script, which must refuse before any engine starts: the one line that it says."""

    @asynccontextmanager
    async def refuse(*_: Any) -> Any:
        raise AssertionError("engines were started")
        yield

    for module in (api, scorecard):
        monkeypatch.setattr(module, "open_session", refuse)

    def run(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["selfguide", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        line = captured.err.splitlines()[-1]  # libraries may have warned before
        assert (end.value.code, captured.out) == (2, "")
        assert line.startswith("selfguide: ")
        assert line.isprintable()
        return line

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- task files and recipes

GOOD: dict[str, Any] = {"instruction": "Say it.", "examples": [{"input": "a", "output": "b"}]}
TASKS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("t.json", b"", "the file is empty"),
    "truncated": ("t.json", TASK.read_bytes()[:700], "is not JSON"),
    "truncated YAML": ("t.yaml", b'instruction: "a', "is not YAML"),
    "not UTF-8": ("t.json", '{"instruction": "é"}'.encode("latin-1"), "save it as UTF-8"),
    "deeply nested": ("t.json", DEEP.encode(), "nested too deeply"),
    "deeply nested YAML": ("t.yaml", DEEP[:5000].encode(), "nested too deeply"),
    "wrong type": ("t.json", json.dumps(GOOD | {"examples": "x"}).encode(), "examples is text: write a list"),
    "repeated key": ("t.json", b'{"instruction": "a", "instruction": "b"}', "stands twice"),
    "repeated key in YAML": ("t.yaml", b"instruction: a\ninstruction: b", "line 2 repeats the key"),
    "no examples": ("t.json", json.dumps(GOOD | {"examples": []}).encode(), "examples is empty: give at least one"),
    "a path for a name": ("t.json", json.dumps(GOOD | {"name": "../../x"}).encode(), "name '../../x'"),
    "a name too long": (f"{'n' * 240}.json", json.dumps(GOOD).encode(), "up to 200 of letters"),
}
RECIPES: dict[str, tuple[bytes, str]] = {
    "truncated": (b"synthesis: {lag: 3", "correct it there"),
    "not UTF-8": ("name: é".encode("latin-1"), "save it as UTF-8"),
    "deeply nested": (DEEP.encode(), "nested too deeply"),
    "no mapping": (b"- synthesis", "is no mapping; write sections"),
    "wrong type": (b"synthesis: {lag: [1]}", "synthesis.lag: "),
    "repeated key": (b"seed: 1\nseed: 2", "line 2: repeated key 'seed'"),
    "unknown key": (b"synthesis: {lagg: 3}", "did you mean lag?"),
    "unknown parent": (b"extends: papr", "mine.yaml: extends: no recipe is called 'papr': did you mean paper?"),
    "absent parent": (b"extends: no/such.yaml", "mine.yaml: extends no/such.yaml: cannot be read; correct the path"),
    "endless parents": (b"extends: mine.yaml", "does it name itself?"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_broken_task(refused: Refused, tmp_path: Path, kind: str) -> None:
    name, data, said = TASKS[kind]
    path = tmp_path / name
    path.write_bytes(data)
    for verb in ("run", "preview", "evaluate"):
        line = refused(verb, path, "--recipe", "smoke")
        assert said in line
        assert str(path) in line
    assert content(tmp_path) == {name: data}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_broken_recipe(refused: Refused, tmp_path: Path, kind: str) -> None:
    data, said = RECIPES[kind]
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    for argv in (["recipes", path], ["run", TASK, "-r", path], ["validate", TASK, "-r", path], ["doctor", "-r", path]):
        line = refused(*argv)
        assert said in line
        assert "mine.yaml" in line
    assert content(tmp_path) == {"mine.yaml": data}


@pytest.mark.parametrize("argv", [["run"], ["validate"], ["preview"], ["evaluate"], ["score"], ["report"]])
def test_a_name_too_long_for_a_file(refused: Refused, argv: list[str]) -> None:
    assert f"{'n' * 300}" in refused(*argv, f"{'n' * 300}.json")


# ---- students

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + b"x" * 99


STUDENTS: dict[str, tuple[str, object, str]] = {
    "no config": (CONFIG, None, "no config.json; this is not a model folder"),
    "config cut off": (CONFIG, b'{"architectures": [', "not valid JSON"),
    "config not UTF-8": (CONFIG, b"\xff\xfe", "not valid JSON"),
    "config nested": (CONFIG, DEEP.encode(), "not valid JSON"),
    "config is a list": (CONFIG, b"[]", "holds no mapping"),
    "no causal LM": (CONFIG, {"architectures": ["T5ForConditionalGeneration"]}, "is no causal language model"),
    "no architecture": (CONFIG, {"architectures": None}, "is no causal language model"),
    "architecture of numbers": (CONFIG, {"architectures": [3]}, "is no causal language model"),
    "architecture is a number": (CONFIG, {"architectures": 3}, "is no causal language model"),
    "context is text": (CONFIG, {"max_position_embeddings": "long"}, "set engine.max_model_len"),
    "context is true": (CONFIG, {"max_position_embeddings": True}, "set engine.max_model_len"),
    "heads are text": (CONFIG, {"num_attention_heads": "four"}, "num_attention_heads"),
    "no weights": (WEIGHTS, None, "no *.safetensors; pickled weights are not loaded"),
    "weights empty": (WEIGHTS, b"", "is cut off or no safetensors file"),
    "weights are something else": (WEIGHTS, b"PK\x03\x04" * 99, "is cut off or no safetensors file"),
    "weights' header is no JSON": (WEIGHTS, header('{"a": ['), "its header cannot be read"),
    "weights' header is a list": (WEIGHTS, header("[]"), "its header is no list of tensors"),
    "weights' header lacks fields": (WEIGHTS, header('{"a": {"shape": [1]}}'), "its header is no list of tensors"),
    "weights' header has other types": (WEIGHTS, header('{"a": 3}'), "its header is no list of tensors"),
    "index is a list": (INDEX, b"[]", "holds no mapping"),
    "index cut off": (INDEX, b'{"weight_map"', "not valid JSON"),
    "index of numbers": (INDEX, b'{"weight_map": {"a": 3}}', "its weight_map names no files"),
    "index names what is not there": (INDEX, b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors: missing"),
    "no tokenizer": ("tokenizer.json", None, "the tokenizer cannot be loaded"),
    "tokenizer cut off": ("tokenizer.json", b"{", "the tokenizer cannot be loaded"),
    "tokenizer's config is a list": ("tokenizer_config.json", b"[]", "the tokenizer cannot be loaded"),
    "template with an error": (TEMPLATE, b"{% if %}", "the chat template fails (TemplateSyntaxError"),
    "template that refuses": (TEMPLATE, b"{{ raise_exception('no') }}", "the chat template fails (TemplateError: no)"),
    "template that reaches out": (TEMPLATE, b"{{ ''.__class__.__mro__ }}", "the chat template fails (SecurityError"),
    "template that says nothing": (TEMPLATE, b"Hello.", "the chat template leaves messages out"),
    "template of the last turn": (TEMPLATE, b"{{ messages[-1].content }}", "the chat template leaves messages out"),
}


@pytest.fixture
def student(random_student: Path, tmp_path: Path) -> Path:
    return shutil.copytree(random_student, tmp_path / "student")


def spoil(path: Path, new: object) -> None:
    """Removes the file, writes bytes into it, or changes keys of its JSON."""
    if new is None:
        path.unlink()
    elif isinstance(new, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | new))
    else:
        assert isinstance(new, bytes)
        path.write_bytes(new)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_that_is_none(refused: Refused, student: Path, tmp_path: Path, kind: str) -> None:
    name, new, said = STUDENTS[kind]
    spoil(student / name, new)
    before = content(tmp_path)
    line = refused("run", TASK, "--recipe", "smoke", "--model", student, "--out", tmp_path / "out")
    assert said in line
    assert str(student) in line
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_loaded(refused: Refused, student: Path, tmp_path: Path) -> None:
    (student / WEIGHTS).rename(student / "pytorch_model.bin")
    assert "convert them to safetensors" in refused("validate", TASK, "--model", student)


def test_no_chat_template_where_one_is_asked_for(refused: Refused, student: Path, tmp_path: Path) -> None:
    argv = ("--recipe", "smoke", "--model", student, "--set", "model.prompts=chat")
    assert "no chat template; set model.prompts: plain" in refused("run", TASK, *argv, "--out", tmp_path / "out")


def test_a_broken_template_is_no_matter_where_prompts_are_plain(student: Path) -> None:
    (student / TEMPLATE).write_text("{% if %}")
    changes = {"model.path": str(student), "model.prompts": "plain"}
    assert not api.load_student(load_recipe("smoke", changes)).chat


def test_sizes_of_a_config_with_wrong_types(student: Path) -> None:
    spoil(student / CONFIG, {"num_hidden_layers": "two"})
    with pytest.raises(ModelError, match="num_hidden_layers is no whole number"):
        read_size(student)


# What a pattern allows is no mistake here: an engine is started with room for it.
ADAPTERS = [kind for kind in (*SPOILT, *BROKEN_FILES) if kind != "high rank in a pattern"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_cannot_be_served(
    refused: Refused, write_lora: WriteLora, random_student: Path, tmp_path: Path, kind: str
) -> None:
    write_spoilt(write_lora, tmp_path / "adapter", kind)
    before = content(tmp_path)
    argv = ("--recipe", "smoke", "--model", random_student, "--out", tmp_path / "out")
    assert str(tmp_path / "adapter") in refused("evaluate", TASK, "--adapter", tmp_path / "adapter", *argv)
    assert content(tmp_path) == before


def test_a_prompt_that_cannot_fit(refused: Refused, random_student: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps(GOOD | {"instruction": "word " * 3000}))
    line = refused("run", path, "--recipe", "smoke", "--model", random_student, "--out", tmp_path / "out")
    assert f"{path}: the instruction does not fit the student's context" in line
    assert not (tmp_path / "out").exists()


# ---- run folders


@pytest.mark.parametrize("out", ["/dev/full/run", "/dev/null", "/proc/none/run"])
def test_a_folder_that_cannot_be_written(refused: Refused, random_student: Path, out: str) -> None:
    line = refused("run", TASK, "--recipe", "smoke", "--model", random_student, "--out", out)
    assert out in line
    assert "choose another" in line


@pytest.mark.parametrize("data", [b'{"format": 999}', b"{", b"[]", DEEP.encode(), b"\xff"])
def test_a_run_folder_of_another_version(refused: Refused, random_student: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.json").write_bytes(data)
    (tmp_path / "tasks" / "old").mkdir(parents=True)
    for verb in (["run", TASK, "--model", random_student], ["evaluate", TASK, "--model", random_student]):
        assert "another" in refused(*verb, "--recipe", "smoke", "--out", tmp_path)
    assert "another" in refused("report", tmp_path)
    assert content(tmp_path) == {"run.json": data}
