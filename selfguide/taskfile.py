"""From a task file to checked fields: NI-V2 JSON, or a task of one's own in JSON or YAML.

Whatever is wrong with a file raises UserError: one line that names the file, the place and the remedy.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic import model_validator as validates_model

from selfguide.errors import UserError

Kind = Literal["classification", "generation"]

SUFFIXES = (".json", ".yaml", ".yml")
MAX_JSON_BYTES = 256 * 2**20
MAX_YAML_BYTES = 16 * 2**20
# A task's deepest text is in instances, an instance, its output: 4 levels.
MAX_YAML_DEPTH = 20

_WANTED = "write a mapping with instruction and examples"
# The C loader where PyYAML was built with it. Only its events are used: nothing is constructed from a tag.
_YAML_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_YAML_FRAME = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# Own texts are stripped: YAML's block scalars end in a newline that nobody means.
Text = Annotated[str, StringConstraints(strip_whitespace=True)]
Texts = Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list)]
RawTexts = Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True)


class NIExample(_Fields):
    input: str
    output: str


class NIInstance(_Fields):
    id: str | None = None
    input: str
    output: RawTexts


class NITask(_Fields):
    """What is used of the NI-V2 schema; its other fields (contributors, licence, ...) are passed over."""

    definition: Texts = Field(alias="Definition")
    examples: list[NIExample] = Field(alias="Positive Examples", min_length=1)
    negative: list[NIExample] = Field(alias="Negative Examples", default=[])
    instances: list[NIInstance] = Field(alias="Instances", default=[])
    categories: list[str] = Field(alias="Categories", default=[])
    input_languages: list[str] = Field(alias="Input_language", default=[])
    output_languages: list[str] = Field(alias="Output_language", default=[])
    kind: ClassVar[Kind | None] = None
    labels: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str | None] = None

    @property
    def instruction(self) -> str:
        return "\n".join(self.definition).strip()

    @property
    def category(self) -> str:
        return ", ".join(self.categories[:1])

    @property
    def input_language(self) -> str:
        return ", ".join(self.input_languages)

    @property
    def output_language(self) -> str:
        return ", ".join(self.output_languages)


class OwnExample(_Fields, extra="forbid"):
    input: Text
    output: Text


class OwnInstance(_Fields, extra="forbid"):
    id: Text | None = None
    input: Text
    output: Texts


class OwnTask(_Fields, extra="forbid"):
    """A task of one's own: an instruction and a few examples, and what may be added to them."""

    instruction: Text
    examples: list[OwnExample] = Field(min_length=1)
    instances: list[OwnInstance] = []
    labels: list[Text] = []
    kind: Kind | None = None
    name: Text | None = None
    language: Text = ""
    negative: ClassVar[tuple[OwnExample, ...]] = ()
    category: ClassVar[str] = ""

    @property
    def input_language(self) -> str:
        return self.language

    @property
    def output_language(self) -> str:
        return self.language

    @validates_model(mode="after")
    def _check_labels(self) -> OwnTask:
        distinct = set(self.labels) - {""}
        if self.labels and (len(distinct) < 2 or len(distinct) < len(self.labels)):
            raise ValueError("labels are not at least two different texts, none empty: correct the list")
        if self.labels and self.kind == "generation":
            raise ValueError("kind is generation, which has no labels: remove labels, or change kind")
        return self


def read_task_file(path: Path) -> NITask | OwnTask:
    """Reads and checks one task file. An NI-V2 file is known by its capitalised keys."""
    text = _read_text(path)
    content = _parse_json(path, text) if path.suffix.lower() == ".json" else _parse_yaml(path, text)
    if not isinstance(content, dict):
        fail(path, f"the file holds {describe_type(content)}: {_WANTED}")
    model = NITask if {"Definition", "Positive Examples", "Instances"} & content.keys() else OwnTask
    try:
        fields = model.model_validate(content)
    except ValidationError as error:
        fail(path, _explain(error))
    if not fields.instruction:
        fail(path, f"{'instruction' if model is OwnTask else 'Definition'} is empty: say what is to be done")
    return fields


def fail(path: Path, message: str) -> NoReturn:
    """Raises UserError about the file, on one line."""
    raise UserError(" ".join(f"{path}: {message}".split()))


def shorten(value: object) -> str:
    """The value as Python writes it, control characters escaped, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(path: Path) -> str:
    _check_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        fail(path, f"the file cannot be read ({error.strerror}): correct its permissions")
    except UnicodeDecodeError as error:
        fail(path, f"the file is not UTF-8 text (byte {error.start}): save it as UTF-8")
    if not text.strip():
        fail(path, f"the file is empty: {_WANTED}")
    return text


def _check_file(path: Path) -> None:
    # Not `Path.exists` and its like, which raise where a name is too long for a file.
    if not os.path.exists(path):
        fail(path, "there is no such file: correct the path")
    if os.path.isdir(path):
        fail(path, "this is a folder: name one of the task files in it")
    if not os.path.isfile(path):
        fail(path, "this is no regular file: name a task file")
    if path.suffix.lower() not in SUFFIXES:
        fail(path, f"the suffix {shorten(path.suffix)} is not known: name the file .json, .yaml or .yml")
    limit = MAX_JSON_BYTES if path.suffix.lower() == ".json" else MAX_YAML_BYTES
    if path.stat().st_size > limit:
        remedy = "keep fewer instances" + ("" if limit == MAX_JSON_BYTES else ", or write it as JSON")
        fail(path, f"the file is larger than {limit // 2**20} MiB: {remedy}")


def _parse_json(path: Path, text: str) -> object:
    def check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            fail(path, f"the key {shorten(repeated)} stands twice in one mapping: keep one of them")
        return mapping

    try:
        return json.loads(text, object_pairs_hook=check_keys)
    except json.JSONDecodeError as error:
        fail(path, f"line {error.lineno} column {error.colno} is not JSON ({error.msg}): correct it there")
    except RecursionError:
        fail(path, f"the file is nested too deeply for a task: {_WANTED}")
    except ValueError as error:  # a number of more digits than Python converts
        fail(path, f"a number cannot be read ({error}): write it as text in quotes")


def _parse_yaml(path: Path, text: str) -> object:
    """Every scalar is read as text, so that `output: yes` and `output: 1` are what they look like."""
    try:
        events = (e for e in yaml.parse(text, Loader=_YAML_LOADER) if not isinstance(e, _YAML_FRAME))
        first = next(events, None)
        if first is None:
            fail(path, f"the file is empty: {_WANTED}")
        content = _build(path, events, first, depth=0)
        if (rest := next(events, None)) is not None:
            fail(path, f"line {_line(rest)} begins a second document: keep one task in a file")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1} column {mark.column + 1}" if mark else "the text"
        fail(path, f"{place} is not YAML ({error.problem or error.context}): correct it there")
    except yaml.YAMLError as error:
        fail(path, f"the file is not YAML ({error}): correct it there")
    return content


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _build(path: Path, events: Iterator[Any], event: Any, depth: int) -> object:
    if getattr(event, "anchor", None) is not None:
        fail(path, f"line {_line(event)} has an anchor or alias (& or *): write the value out, or quote it")
    if depth > MAX_YAML_DEPTH:
        fail(path, f"line {_line(event)} is nested too deeply for a task: {_WANTED}")
    if isinstance(event, yaml.ScalarEvent):
        return event.value
    if isinstance(event, yaml.MappingStartEvent):
        return _build_mapping(path, events, depth)
    items = []
    while not isinstance(item := next(events), yaml.SequenceEndEvent):
        items.append(_build(path, events, item, depth + 1))
    return items


def _build_mapping(path: Path, events: Iterator[Any], depth: int) -> dict[str, object]:
    mapping: dict[str, object] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _build(path, events, event, depth + 1)
        if not isinstance(key, str):
            fail(path, f"line {_line(event)} has {describe_type(key)} as a key: write a word")
        if key in mapping:
            fail(path, f"line {_line(event)} repeats the key {shorten(key)}: keep one of them")
        mapping[key] = _build(path, events, next(events), depth + 1)
    return mapping


def _explain(error: ValidationError) -> str:
    """The first of pydantic's errors in the words of a task file, and how many there are besides."""
    # A misspelt key is two errors, missing and unknown, of which the second is the one to mend.
    errors = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    first = errors[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    wrong_type = f"{field} is {describe_type(first['input'])}"
    match first["type"]:
        case "missing":
            text = f"{field} is missing: add it"
        case "extra_forbidden":
            text = f"{shorten(field)} is not a known key: {_suggest_key(first['loc'])}"
        case "string_type":
            text = f"{wrong_type}: write it as one text in quotes"
        case "string_unicode":
            text = f"{field} holds half of a surrogate pair: write the whole character"
        case "list_type":
            text = f"{wrong_type}: write a list"
        case "model_type":
            text = f"{wrong_type}: write a mapping with input and output"
        case "too_short":
            text = f"{field} is empty: give at least one"
        case "literal_error":
            text = f"{field} is {shorten(first['input'])}: write classification or generation"
        case _:
            text = ". ".join([field, first["msg"].removeprefix("Value error, ")]).lstrip(". ")
    return text + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _suggest_key(loc: tuple[int | str, ...]) -> str:
    inner: dict[object, type[BaseModel]] = {"examples": OwnExample, "instances": OwnInstance}
    keys = list((OwnTask if len(loc) == 1 else inner[loc[0]]).model_fields)
    nearest = difflib.get_close_matches(str(loc[-1]).lower(), keys, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"remove it (known are {', '.join(keys)})"


def describe_type(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    if isinstance(value, str | list):
        return "text" if isinstance(value, str) else "a list"
    return "a mapping" if isinstance(value, dict) else "a number"
