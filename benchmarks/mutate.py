"""Broken task files and recipes: whatever is wrong with one, it loads or raises a one-line UserError.

python benchmarks/mutate.py [--tries 10000] [--seed 0] [TASK ...]      exits with 1 at the first traceback
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from selfguide.errors import UserError
from selfguide.recipefile import load_recipe, shipped_recipes
from selfguide.tasks import load_task

EXAMPLES = Path(__file__).parent.parent / "selfguide" / "examples"
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e400, float("nan"), "", " ", "\x00\x1b[31m", "{{ x }}", "[/red]", "<script>", "../../etc",
    "é\u202e", [], [[]], {}, {"": ""}, ["a", 1], "x" * 10_000, 10**30,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", type=Path, help="task files to break, beside the examples of the package")
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seeds = [*EXAMPLES.glob("*.json"), *EXAMPLES.glob("*.yaml"), *args.tasks]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args.tries, args.seed, seeds, Path(folder))))
    return 0


def run(tries: int, seed: int, tasks: list[Path], folder: Path) -> dict[str, int]:
    """Counts of what became of the files. Anything but loading or a one-line `UserError` is raised."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    sources = [(path, path.read_bytes(), load_task) for path in tasks]
    sources += [(path, path.read_bytes(), load_recipe) for path in shipped_recipes().values()]  # type: ignore[misc]
    for number in range(tries):
        path, content, load = draw.choice(sources)
        broken = folder / f"{number}{path.suffix}"
        broken.write_bytes(draw.choice((mutate_bytes, mutate_tree))(draw, content, path.suffix))
        counts[_outcome(load, broken)] += 1
        broken.unlink()
    return dict(counts)


def _outcome(load: Callable[[Path], object], path: Path) -> str:
    try:
        load(path)
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error!r}") from error
        return f"refused {load.__name__}"
    except Exception:
        sys.stderr.buffer.write(path.read_bytes()[:500] + b"\n")
        raise
    return f"loaded {load.__name__}"


def mutate_bytes(draw: random.Random, content: bytes, suffix: str) -> bytes:
    """Cuts, repeats, swaps or spoils a run of bytes."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) or 1)
        length = draw.choice((1, 1, 2, 8, 100, len(data)))
        piece = bytes(data[start : start + length])
        data[start : start + length] = draw.choice(
            (b"", piece * 2, bytes(draw.randbytes(4)), b'"', b"[" * 5000, piece[::-1])
        )
    return bytes(data)


def mutate_tree(draw: random.Random, content: bytes, suffix: str) -> bytes:
    """Puts a value of another kind somewhere, or takes, renames or repeats a key."""
    tree = json.loads(content) if suffix == ".json" else yaml.safe_load(content)
    for _ in range(draw.randint(1, 3)):
        tree = _change(draw, tree)
    text = json.dumps(tree) if suffix == ".json" else yaml.safe_dump(tree, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


def _change(draw: random.Random, node: Any) -> Any:
    if draw.random() < 0.2 or not isinstance(node, dict | list) or not node:
        return draw.choice(_VALUES)
    if isinstance(node, list):
        place = draw.randrange(len(node))
        return draw.choice(([*node[:place], _change(draw, node[place]), *node[place + 1 :]], node[:place], node * 2))
    key = draw.choice(list(node))
    rest = {name: value for name, value in node.items() if name != key}
    return draw.choice(({**node, key: _change(draw, node[key])}, rest, {**rest, f"{key}s": node[key]}))


if __name__ == "__main__":
    sys.exit(main())
