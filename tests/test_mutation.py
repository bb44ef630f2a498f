"""No task file and no recipe, however broken, ends in a traceback.

MUTATIONS=10000 python -m pytest -q -s tests/test_mutation.py      as many tries of each kind as are asked for
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from selfguide.errors import UserError
from selfguide.recipefile import load_recipe, shipped_recipes
from selfguide.validation import show_verdicts, validate

TRIES = int(os.environ.get("MUTATIONS", "400"))
EXAMPLES = Path(__file__).parent.parent / "selfguide" / "examples"
TASKS, RECIPES = sorted(EXAMPLES.glob("*")), list(shipped_recipes().values())
RECIPE = load_recipe("default")
NUM_REAL, NUM_INSTANCES = 40, 3

# ---- what is done to a file

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e400, float("nan"), "", " ", "\x00\x1b[31m", "{{ x }}", "[/red]", "<script>", "../../etc",
    "é\u202e", "\ud800", "yes", "2001-12-15", [], [[]], {}, {"": ""}, ["a", 1], "x" * 10_000, 10**30,
)  # fmt: skip
KEYS = ("", "Definition", "instruction", "examples", "Instances", "labels", "extends", "name", "\x1b[2J", "a/b")
BYTES = (b"", b'"', b"[" * 5000, b"{", b"\xff\xfe", b"\x00", b"- ", b": ", b"&a ", b"*a", b"\n---\n", b"#", b"\\ud800")
values = st.sampled_from(VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def change(draw: Draw, node: Any) -> Any:
    """The tree with one place of it changed."""
    if isinstance(node, str) and draw(st.booleans()):
        return node + draw(st.text(max_size=20))
    if not isinstance(node, dict | list) or not node or draw(st.integers(0, 9)) == 9:
        return draw(values)
    if isinstance(node, list):
        place = draw(st.integers(0, len(node) - 1))
        if draw(st.booleans()):
            return [*node[:place], change(draw, node[place]), *node[place + 1 :]]
        return (node[:place], node * 2, [node], {"0": node})[draw(st.integers(0, 3))]
    key = draw(st.sampled_from(sorted(node)))
    if draw(st.booleans()):
        return {**node, key: change(draw, node[key])}
    rest = {name: value for name, value in node.items() if name != key}
    other = draw(st.sampled_from((f"{key}s", key.upper(), *KEYS)))
    return (rest, {**rest, other: node[key]}, {**node, other: node[key]})[draw(st.integers(0, 2))]


def repeat_key(draw: Draw, text: str) -> str:
    """A line that has a key, twice."""
    lines = text.splitlines(keepends=True)
    keyed = [number for number, line in enumerate(lines) if ":" in line]
    place = draw(st.sampled_from(keyed or [0]))
    return "".join([*lines[: place + 1], *lines[place:]])


def spoil(draw: Draw, data: bytes) -> bytes:
    """Cuts the file off, or cuts, repeats, turns round or replaces a run of bytes."""
    start = draw(st.integers(0, len(data)))
    length = draw(st.sampled_from((0, 1, 2, 8, 100, len(data))))
    piece = data[start : start + length]
    new = (piece * 2, piece[::-1], draw(st.sampled_from(BYTES) | st.binary(max_size=4)))[draw(st.integers(0, 2))]
    return data[:start] + new + data[start + length :]


def written(tree: Any, suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(tree, separators=(",\n", ": "))
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@st.composite
def broken_files(draw: Draw, files: list[tuple[Any, str]]) -> tuple[bytes, str]:
    """Content and suffix of a file that was whole before one to three changes. Some JSON turns into YAML."""
    tree, suffix = files[draw(st.integers(0, len(files) - 1))]
    suffix = ".yaml" if draw(st.integers(0, 3)) == 3 else suffix
    kind = draw(st.sampled_from(("tree", "tree", "keys", "bytes")))
    times = draw(st.sampled_from((1, 1, 1, 2, 3)))
    for _ in range(times if kind == "tree" else 0):
        tree = change(draw, tree)
    text = written(tree, suffix)
    for _ in range(times if kind == "keys" else 0):
        text = repeat_key(draw, text)
    data = text.encode("utf-8", "surrogatepass")
    for _ in range(times if kind == "bytes" else 0):
        data = spoil(draw, data)
    return data, suffix


def read(path: Path) -> tuple[Any, str]:
    text = path.read_text(encoding="utf-8")
    return (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)), path.suffix


# ---- what must become of it


def judge_task(path: Path) -> str:
    """As `selfguide validate` does: a verdict, and what is printed of it obeys nobody."""
    [verdict] = validate([path], recipe=RECIPE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show_verdicts([verdict])
    assert out.getvalue().replace("\n", "").isprintable()
    json.dumps(asdict(verdict), allow_nan=False)
    if verdict.error is not None:
        assert_one_line(verdict.error, path)
    return verdict.verdict


def judge_recipe(path: Path) -> str:
    """What loads can be written down again, and held against a task."""
    try:
        recipe = load_recipe(path)
    except UserError as error:
        assert_one_line(str(error), path)
        return "error"
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False).encode()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": ""})})
    return f"ok, a task is {validate([EXAMPLES / 'sentiment.json'], recipe=recipe)[0].verdict}"


def assert_one_line(message: str, path: Path) -> None:
    assert len(message.splitlines()) == 1, message
    assert path.name in message or path.stem in message, message
    assert len(message) < 1000, message


def run(files: list[tuple[Any, str]], judge: Callable[[Path], str], folder: Path) -> Counter[str]:
    """What became of `TRIES` broken files, and in how many seconds, on standard output."""
    counts: Counter[str] = Counter()

    @settings(
        max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(broken_files(files))
    def check(broken: tuple[bytes, str]) -> None:
        data, suffix = broken
        path = folder / f"broken{suffix}"
        path.write_bytes(data)
        counts[judge(path)] += 1

    began = time.perf_counter()
    check()
    print(f"\n{dict(counts)}, {counts.total():,} tries in {time.perf_counter() - began:.0f} s")
    return counts


def shortened(path: Path) -> tuple[Any, str]:
    """A real task with its first instances: what breaks a file seldom stands in the thousandth."""
    tree, suffix = read(path)
    return {**tree, "Instances": tree["Instances"][:NUM_INSTANCES]}, suffix


def test_broken_tasks_are_judged(tmp_path: Path) -> None:
    counts = run([read(path) for path in TASKS], judge_task, tmp_path)
    assert counts.total() >= TRIES
    assert min(counts["error"], counts["ok"] + counts["remarks"]) > TRIES / 20


def test_broken_real_tasks_are_judged(ni_v2_dir: Path, tmp_path: Path) -> None:
    paths = sorted(ni_v2_dir.glob("tasks/*.json"))
    counts = run([shortened(path) for path in paths[:: len(paths) // NUM_REAL]], judge_task, tmp_path)
    assert counts.total() >= TRIES
    assert min(counts["error"], counts["ok"] + counts["remarks"]) > TRIES / 20


def test_broken_recipes_load_or_are_refused(tmp_path: Path) -> None:
    counts = run([read(path) for path in RECIPES], judge_recipe, tmp_path)
    assert counts.total() >= TRIES
    assert min(counts["error"], counts.total() - counts["error"]) > TRIES / 20
