"""Recipes: all that ship parse, every key is explained, and every mistake is one line that names the key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from selfguide.config import Recipe
from selfguide.errors import UserError
from selfguide.filters import Balance, Length, filter_specs
from selfguide.recipefile import (
    change_recipe,
    describe_fields,
    extend_recipe,
    load_recipe,
    parse_change,
    shipped_recipes,
)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def mistake(path: Path | str, changes: dict[str, Any] | None = None) -> str:
    """What the error says, on one line."""
    with pytest.raises(UserError) as error:
        load_recipe(path, changes)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# ---- what ships


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses_and_comes_back_from_its_own_dump(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert shipped_recipes()[name].read_text(encoding="utf-8").startswith("# ")  # what `recipes` lists


def test_the_named_recipes_ship() -> None:
    assert {"authors", "default", "paper", "smoke"} <= set(shipped_recipes())


def test_the_authors_recipe_is_the_papers_with_other_filters() -> None:
    authors, paper = load_recipe("authors"), load_recipe("paper")
    same = set(Recipe.model_fields) - {"name", "filters", "evaluation"}
    assert authors.model_dump(include=same) == paper.model_dump(include=same)
    assert authors.filters != paper.filters


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe()
    for section, name in ((recipe, "seed"), (recipe.synthesis, "lag"), (recipe.cluster.limits, "stall_s")):
        with pytest.raises(ValidationError):
            setattr(section, name, 1)


# ---- every field has a doc string


def sections(section: type[BaseModel] = Recipe) -> Iterator[type[Any]]:
    """The recipe's classes, filters and dataclasses included."""
    yield section
    for field in section.model_fields.values():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from sections(kind)
        elif dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield kind


def documented(kind: type[Any]) -> set[str]:
    """Fields that a non-empty string follows in the source."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = set()
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found |= {field.target.id} if str(text.value.value).strip() else set()
    return found


@pytest.mark.parametrize("kind", [*dict.fromkeys([*sections(), *filter_specs()])], ids=lambda kind: kind.__name__)
def test_every_field_has_a_doc_string(kind: type[Any]) -> None:
    assert inspect.getdoc(kind)
    fields = {
        name for name, annotation in inspect.get_annotations(kind, eval_str=True).items() if not is_tag(annotation)
    }
    assert fields <= documented(kind)


def is_tag(annotation: Any) -> bool:
    """A filter's name: the one value by which the recipe knows it."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def test_the_listing_explains_every_key_and_every_filter() -> None:
    lines = describe_fields()
    keys = [line for line in lines if line.startswith("- `")]
    assert all(line.partition("`: ")[2] for line in keys)
    for key in ("synthesis.lag", "cluster.limits.stall_s", "filters.vote", "engine.faults", "sigmas", "min_share"):
        assert sum(line.startswith(f"- `{key}` = ") for line in keys) == 1, key
    assert {f"### {one.model_fields['name'].default}" for one in filter_specs()} <= set(lines)


# ---- mistakes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("synthesis: {lagg: 3}", "synthesis.lagg: no such key; did you mean lag?"),
        ("sinthesis: {lag: 3}", "sinthesis: no such key; did you mean synthesis?"),
        ("xyzzy: 1", "xyzzy: no such key; known here: annotation, cluster,"),
        ("cluster: {limits: {stall: 5}}", "cluster.limits.stall: no such key; did you mean stall_s?"),
        ("engine: {faults: {die_afterr: 5}}", "engine.faults.die_afterr: no such key; did you mean die_after?"),
        ("filters: {vote: {min_shares: 0.3}}", "filters.vote.min_shares: no such key; did you mean min_share?"),
        ("filters: {inputs: [{name: length, sigma: 2}]}", "length.sigma: no such key; did you mean sigmas?"),
        ("filters: {samples: [{name: noise, word: [a]}]}", "noise.word: no such key; did you mean words?"),
        ("filters: {classification: {sets: [{name: balance, ration: 2}]}}", "did you mean ratio?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(write: Write, content: str, said: str) -> None:
    assert said in mistake(write(content))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("seed: x", "seed"),
        ("seed: 1.5", "seed"),
        ("seed: 2001-12-15", "seed"),
        ("seed: [1]", "seed"),
        ("name: 3", "name"),
        ("synthesis: 5", "synthesis"),
        ("synthesis:", "synthesis"),
        ("synthesis: {lag: 0}", "synthesis.lag"),
        ("synthesis: {pool: deep}", "synthesis.pool"),
        ("synthesis: {sampling: {temperature: .nan}}", "synthesis.sampling.temperature"),
        ("finetuning: {learning_rate: .inf}", "finetuning.learning_rate"),
        ("evaluation: {demonstrations: some}", "evaluation.demonstrations"),
        ("filters: {inputs: duplicate}", "filters.inputs"),
        ("filters: {inputs: [duplicate]}", "filters.inputs.0"),
        ("filters: {inputs: [{}]}", "filters.inputs.0"),
        ("filters: {inputs: [{name: lenght}]}", "filters.inputs.0"),
        ("filters: {inputs: [{name: agreement}]}", "filters.inputs.0"),  # an input has no annotation to agree with
        ("filters: {inputs: [{name: length, sigmas: .inf}]}", "filters.inputs.0.length.sigmas"),
        ("filters: {sets: [{name: balance, ratio: 0}]}", "filters.sets.0.balance.ratio"),
        ("engine: {faults: {die_after: x}}", "engine.faults.die_after"),
        ('seed: "\\x1b[31m"', "seed"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(write: Write, content: str, key: str) -> None:
    assert mistake(write(content)).startswith(f"recipe mine.yaml: {key}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: 1\nname: x\nseed: 2", ", line 3: repeated key 'seed'"),
        ("synthesis:\n  lag: 1\n  lag: 2", ", line 3: repeated key 'lag'"),
        ("? |\n  a\n  b\n: 1\n? |\n  a\n  b\n: 2", "repeated key"),
        ("seed: &one 1\nname: *one", ", line 2: an alias (*)"),
        ("<<: {seed: 1}", "line 1"),
        ("seed: !!python/object/apply:os.system [true]", "line 1"),
        ("seed: [1", "line 1"),
        ("seed: 1\n---\nseed: 2", "line 2"),
        ("? [a]\n: 1", "line 1: found unhashable key"),
        ("seed: 2001-13-45", "is not YAML (month must be in 1..12)"),
        (f"seed: {'9' * 5000}", "is not YAML"),
        ("seed: \0", "is not YAML"),
        ("- 1", "is no mapping"),
        ("just text", "is no mapping"),
        ("1: 2", "is no mapping"),
        (b"name: \xff\xfe", "is not UTF-8 text"),
        ("seed: 1".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(write: Write, content: str | bytes, said: str) -> None:
    path = write(content)
    message = mistake(path)
    assert message.startswith(f"recipe {path}")
    assert said in message


@pytest.mark.parametrize("depth", [30, 100, 200, 300, 500])
@pytest.mark.parametrize("brackets", ["[]", "{a: }"])
def test_deep_nesting_is_refused(write: Write, depth: int, brackets: str) -> None:
    mistake(write(f"synthesis: {brackets[:-1] * depth}1{brackets[-1] * depth}"))


def test_aliases_cannot_blow_up(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "an alias" in mistake(write("\n".join(lines)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in mistake(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read (Is a directory)" in mistake(tmp_path / "folder.yaml")


def test_an_unknown_recipe_is_named_with_the_nearest_known_one() -> None:
    assert "did you mean paper?" in mistake("papr")
    assert "choose authors, default," in mistake("xyzzy")


def test_an_empty_file_is_all_defaults(write: Write) -> None:
    assert load_recipe(write("")) == Recipe(name="mine")
    assert load_recipe(write("\ufeff# nothing\n")) == Recipe(name="mine")


# ---- extends


def test_extends_merges_sections_and_replaces_chains(write: Write) -> None:
    recipe = load_recipe(write("extends: paper\nsynthesis: {lag: 5}\nfilters: {inputs: [{name: empty}]}"))
    paper = load_recipe("paper")
    assert recipe.synthesis == paper.synthesis.model_copy(update={"lag": 5})
    assert [one.name for one in recipe.filters.inputs] == ["empty"]
    assert recipe.filters.samples == paper.filters.samples
    assert recipe.finetuning == paper.finetuning


def test_extends_takes_a_file_beside_and_goes_on_from_there(write: Write) -> None:
    write("extends: smoke\nseed: 3\nsynthesis: {lag: 7}", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nsynthesis: {round_size: 2}"))
    assert (recipe.seed, recipe.synthesis.lag, recipe.synthesis.round_size) == (3, 7, 2)
    assert recipe.engine == load_recipe("smoke").engine


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("extends: mine.yaml", "does it name itself?"),
        ("extends: none.yaml", "none.yaml: cannot be read"),
        ("extends: papr", "did you mean paper?"),
        ("extends: [paper]", "no recipe is called"),
        ("extends: 3", "no recipe is called '3'"),
    ],
)
def test_extends_that_leads_nowhere(write: Write, content: str, said: str) -> None:
    assert said in mistake(write(content))


# ---- --set


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("synthesis.lag=10", "synthesis.lag", 10),
        (" seed = 3 ", "seed", 3),
        ("a=b=c", "a", "b=c"),
        ("a=", "a", None),
        ("a=null", "a", None),
        ("a=true", "a", True),
        ("a=[x, y]", "a", ["x", "y"]),
        ('a="3"', "a", "3"),
    ],
)
def test_a_change_is_a_dotted_key_and_a_yaml_value(change: str, key: str, value: object) -> None:
    assert parse_change(change) == (key, value)


@pytest.mark.parametrize(
    "change",
    ["synthesis.lag", "=3", " =3", "seed=[", "seed=*x", "seed={a: 1, a: 2}", "seed=2001-13-45",
     "seed=" + "[" * 500, "seed=" + "9" * 5000, "seed=\0"],
)  # fmt: skip
def test_a_change_that_cannot_be_read_is_one_line(change: str) -> None:
    with pytest.raises(UserError, match=r"^--set ") as error:
        load_recipe("default", dict([parse_change(change)]))
    assert len(str(error.value).splitlines()) == 1


def test_changes_reach_any_depth() -> None:
    changes = {
        "synthesis.sampling.temperature": 0.5, "finetuning.learning_rate": "1e-3", "cluster.limits.max_deaths": 2,
        "filters.vote.choose": "medoid", "filters.sets": [{"name": "duplicate"}], "name": "other",
    }  # fmt: skip
    recipe = load_recipe("default", changes)
    assert recipe.synthesis.sampling.temperature == 0.5
    assert recipe.finetuning.learning_rate == 1e-3
    assert recipe.cluster.limits.max_deaths == 2
    assert (recipe.filters.vote.choose, recipe.filters.sets[0].name, recipe.name) == ("medoid", "duplicate", "other")


def test_a_change_of_one_key_leaves_the_others_as_they_were(write: Write) -> None:
    """A section's defaults may differ from its class's: evaluation is greedy, samplings in general are not."""
    changes = {"evaluation.sampling.max_tokens": 9, "annotation.sampling": {"temperature": 0.9}}
    written = "evaluation: {sampling: {max_tokens: 9}}\nannotation: {sampling: {temperature: 0.9}}"
    for recipe in (load_recipe("default", changes), load_recipe(write("extends: default\n" + written))):
        expected = load_recipe("default").model_dump() | {"name": recipe.name}
        expected["evaluation"]["sampling"]["max_tokens"] = 9
        expected["annotation"]["sampling"]["temperature"] = 0.9
        assert recipe.model_dump() == expected


def test_changes_reach_into_a_chain_of_filters() -> None:
    """The others keep their places and their parameters."""
    paper = load_recipe("paper")
    before = paper.model_dump()["filters"]
    assert load_recipe("paper", {"filters.inputs.length": True}) == paper
    without = load_recipe("paper", {"filters.inputs.length": False}).model_dump()["filters"]
    assert without == {**before, "inputs": tuple(one for one in before["inputs"] if one["name"] != "length")}
    changed = load_recipe("paper", {"filters.inputs.length.floor": 0.1, "filters.samples.length": {"sigmas": 3.0}})
    assert [one.name for one in changed.filters.inputs] == [one.name for one in paper.filters.inputs]
    assert changed.filters.inputs[1] == Length(sigmas=2.0, floor=0.1)
    assert changed.filters.samples == (*paper.filters.samples, Length(sigmas=3.0))
    assert change_recipe(changed, {"filters.samples.length": False, "filters.inputs.length.floor": 0.5}) == paper
    classes = {"filters.classification.sets.balance.ratio": 2.0}
    assert load_recipe("paper", classes).filters.classification.sets == (Balance(ratio=2.0),)


def test_a_changed_recipe_comes_back_from_what_extends_the_first(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    own = tmp_path / "own.yaml"
    own.write_text("extends: paper\nsynthesis: {target_rows: 9}\n")
    for parent in ("nano", str(own)):
        changes = {"filters.inputs.length": False, "synthesis.target_rows": None, "model.path": "a/b", "name": "won"}
        changed = load_recipe(parent, changes)
        path = tmp_path / "runs" / "won.yaml"
        path.write_text(extend_recipe(parent, changed, path.parent))
        assert load_recipe(path) == changed
    assert "  - name: noise\n    extra:\n" in path.read_text()  # its other parameters are the filter's own


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("synthesis.lagg", 1, "did you mean lag?"),
        ("seed.x", 1, "seed"),
        ("synthesis.num_candidates.x", 1, "num_candidates is a value, not a section"),
        ("synthesis.sampling.stop.x", 1, "stop is a value, not a section"),
        ("filters.inputs.0", 1, "no filter is called '0'; choose empty, finished,"),
        ("filters.inputs.vote", True, "no filter is called 'vote'"),
        ("filters.inputs.length", 3, "write true, false, or the filter's parameters"),
        ("filters.inputs.length.sigmas.x", 3, "write true, false, or the filter's parameters"),
        ("filters.inputs.length.sigma", 3, "length.sigma: no such key; did you mean sigmas?"),
        ("filters.inputs.agreement", True, "filters.inputs"),
        ("", 1, "no such key"),
        ("..", 1, "no such key"),
        ("extends", "paper", "extends: no such key"),
    ],
)
def test_a_change_of_what_is_not_there(key: str, value: object, said: str) -> None:
    assert said in mistake("default", {key: value})


def test_a_recipe_is_plain_json() -> None:
    for name in shipped_recipes():
        json.dumps(load_recipe(name).model_dump(mode="json"), allow_nan=False)
