"""Reading recipes: YAML files, `extends`, and `--set key=value`; every mistake names the key and the remedy."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from selfguide.config import Recipe
from selfguide.errors import UserError
from selfguide.filters import Vote, filter_specs
from selfguide.taskfile import shorten
from selfguide.text import printable

_MAX_EXTENDS = 8


def shipped_recipes() -> dict[str, Path]:
    """Name and file of every recipe in the package."""
    folder = Path(str(files("selfguide"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(recipe: str | Path = "default", changes: Mapping[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or a YAML file; `changes` maps dotted keys to values."""
    path = _find(str(recipe))
    # Merged over the defaults: a section's own (`evaluation.sampling` is greedy) must outlive a change of one key.
    tree = _merge(Recipe(name=path.stem).model_dump(mode="json"), _read(path, depth=0))
    return _change(tree, changes or {}, path.name)


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with `changes`, dotted keys to values, as `--set` makes them."""
    return _change(recipe.model_dump(mode="json"), changes, recipe.name)


def _change(tree: dict[str, Any], changes: Mapping[str, Any], name: str) -> Recipe:
    for key, value in changes.items():
        _set(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(printable(f"recipe {name}: {_explain(error)}")) from None


def extend_recipe(recipe: str, changed: Recipe, beside: Path) -> str:
    """YAML of a recipe that extends `recipe`, a name or a file, to `changed`; for a file in the folder `beside`."""
    parent = recipe if recipe in shipped_recipes() else os.path.relpath(Path(recipe).resolve(), beside.resolve())
    tree = _difference(load_recipe(recipe).model_dump(mode="json"), changed.model_dump(mode="json"))
    return yaml.safe_dump({"extends": parent, "name": changed.name, **tree}, sort_keys=False, allow_unicode=True)


def _difference(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be merged over `base`; the keys of both are the same."""
    found = {}
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base[key], dict):
            value = _difference(base[key], value)
            if not value:
                continue
        elif value == base[key]:
            continue
        found[key] = [_without_defaults(one) for one in value] if isinstance(value, list) else value
    return found


def _without_defaults(entry: Any) -> Any:
    """A filter as a person would list it; what else stands in lists as it is."""
    known = {one.model_fields["name"].default: one().model_dump(mode="json") for one in filter_specs()}
    defaults = known.get(entry.get("name"), {}) if isinstance(entry, dict) else {}
    return {k: v for k, v in entry.items() if k == "name" or v != defaults[k]} if defaults else entry


def parse_change(text: str) -> tuple[str, Any]:
    """`synthesis.lag=10` as key and value; the value is YAML, so lists, numbers, true and null work."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text}: write key=value, for example --set synthesis.lag=10")
    return key.strip(), _load_yaml(value, f"--set {key.strip()}")


def describe_fields() -> list[str]:
    """Every key of the recipe and every filter with its parameters, as Markdown lines; docs/recipe.md is this."""
    lines = ["# Recipe keys", "", "Printed by `selfguide recipes --fields`. Change one with `--set key=value`.", ""]
    lines += _describe(Recipe, "")
    lines += ["", "## Filters", "", "Entries of the chains in `filters`: `- {name: length, sigmas: 3.0}`.", ""]
    lines += ["With `--set`, `filters.inputs.length=false` takes one out of its chain, `filters.inputs.length=true`"]
    lines += ["puts one in, and `filters.inputs.length.sigmas=2.0` changes it.", ""]
    for one in filter_specs():
        lines += ["", f"### {one.model_fields['name'].default}", "", cleandoc(one.__doc__ or ""), ""]
        lines += [line for line in _describe(one, "") if not line.startswith("- `name`")]
    return lines


def _describe(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Vote:
            yield from _describe(kind, f"{prefix}{name}.")
        else:
            default = json.dumps(field.get_default(call_default_factory=True), default=_as_json)
            shown = default if len(default) < 80 else f"{default[:76]} ..."
            yield f"- `{prefix}{name}` = `{shown}`: {cleandoc(field.description or '')}"


def _as_json(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else asdict(value)


def _find(recipe: str) -> Path:
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[recipe]
    if recipe.endswith((".yaml", ".yml")):
        return Path(recipe)
    near = difflib.get_close_matches(recipe, shipped, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(shipped)} or a .yaml file"
    raise UserError(f"no recipe is called {shorten(recipe)}: {hint}")


def _read(path: Path, depth: int) -> dict[str, Any]:
    tree = read_mapping(path, "recipe")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if depth >= _MAX_EXTENDS:
        raise UserError(f"{path}: extends goes more than {_MAX_EXTENDS} recipes deep; does it name itself?")
    return _merge(_read(_find_parent(path, str(parent)), depth + 1), tree)


def _find_parent(path: Path, parent: str) -> Path:
    beside = path.parent / parent
    if os.path.isfile(beside):  # not `Path.is_file`: a name too long for a file is no file
        return beside
    try:
        found = _find(parent)
    except UserError as error:
        raise UserError(f"recipe {path}: extends: {error}") from None
    if not os.path.isfile(found):
        raise UserError(f"recipe {path}: extends {printable(parent)[:100]}: cannot be read; correct the path")
    return found


class _Loader(yaml.SafeLoader):
    """Safe YAML that also refuses repeated keys and aliases (a few of which can stand for gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias (*): write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"repeated key {key!r}", problem_mark=mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file, "recipe" or "grid", whose keys are texts; an empty one is {}."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror}); correct the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: is not UTF-8 text; save it as UTF-8") from None
    tree = _load_yaml(text, f"{what} {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{what} {path}: is no mapping; write sections such as synthesis: with keys below them")
    return tree


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{source}: is nested too deeply; write sections of keys") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{source}, line {line}: {error.problem}; correct it there, or quote the text") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{source}: is not YAML ({' '.join(str(error).split())}); quote the text") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, everything else, a chain of filters too, is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        tree = tree.setdefault(section, {})
        if isinstance(tree, list) and sections[0] == "filters":
            _set_filter(tree, [*sections[depth:], last], value, key)
            return
        if not isinstance(tree, dict):
            raise UserError(f"--set {key}: {section} is a value, not a section")
    tree.update(_merge(tree, {last: value}))


def _set_filter(chain: list[Any], path: Sequence[str], value: Any, key: str) -> None:
    """`filters.inputs.length`: false takes the filter out of the chain, true or its parameters put it in.

    One that is there keeps its place, and keeps the parameters that are not named.
    """
    name, *parameter = path
    known = [one.model_fields["name"].default for one in filter_specs() if one is not Vote]
    if name not in known:
        raise UserError(f"--set {key}: no filter is called {shorten(name)}; choose {', '.join(known)}")
    if len(parameter) > 1 or not (parameter or isinstance(value, bool | dict)):
        raise UserError(f"--set {key}: write true, false, or the filter's parameters, as in {{sigmas: 2.0}}")
    there = [one for one in chain if isinstance(one, dict) and one.get("name") == name]
    if value is False and not parameter:
        chain[:] = [one for one in chain if one not in there]
        return
    if not there:
        there = [{"name": name}]
        chain += there
    changes = {parameter[0]: value} if parameter else {} if value is True else value
    for one in there:
        one.update(changes)


def _explain(error: ValidationError) -> str:
    """The first mistake: its dotted key, what is wrong, and for an unknown key the nearest known one."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):  # of models, of dataclasses
        return f"{where}: {first['msg']} (got {str(first.get('input'))[:60]!r})"
    *parents, name = first["loc"]
    known = _known_keys(parents)
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{where}: no such key; {hint}"


def _known_keys(path: list[int | str]) -> list[str]:
    section: Any = Recipe
    filters = {one.model_fields["name"].default: one for one in filter_specs()}  # a filter's name stands in the path
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        section = getattr(field, "annotation", None) if field else filters.get(part, section)
    return sorted(getattr(section, "model_fields", getattr(section, "__dataclass_fields__", {})))
