"""Grids: which recipes a search tries, from a YAML file of dotted recipe keys, each with the values to try."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from selfguide.errors import UserError
from selfguide.recipefile import change_recipe, read_mapping
from selfguide.taskfile import Kind, shorten

if TYPE_CHECKING:
    from selfguide.config import Recipe

_SEARCHED = ("synthesis", "annotation", "filters", "finetuning")
_FIXED = {"finetuning.epochs": "write epochs: [1, 2, 3]", "finetuning.method": "all points share their engines"}


@dataclass(frozen=True)
class Grid:
    """What is tried on one kind of task: every change with every epoch, in this order. A change is one training."""

    changes: tuple[Mapping[str, Any], ...]
    epochs: tuple[int, ...]
    """Scored from the checkpoints of one training of the most of them; empty: the recipe's own number, the last."""

    @property
    def num_points(self) -> int:
        return len(self.changes) * max(1, len(self.epochs))

    @property
    def varied(self) -> list[str]:
        """The keys that have more than one value."""
        first = self.changes[0]
        return [key for key in first if any(changes[key] != first[key] for changes in self.changes)]

    def recipes(self, recipe: Recipe) -> list[Recipe]:
        """The recipe that each change trains by. Raises `UserError` where one of them is none."""
        if self.epochs and recipe.finetuning.min_steps:
            raise UserError(
                f"finetuning.min_steps is {recipe.finetuning.min_steps}: it, not the grid, would decide how many "
                "epochs a small set trains for; --set finetuning.min_steps=0, or leave epochs out of the grid"
            )
        trained = {"finetuning.epochs": max(self.epochs)} if self.epochs else {}
        if len(self.epochs) > 1:
            trained["finetuning.keep_epochs"] = True
        return [change_recipe(recipe, {**changes, **trained}) for changes in self.changes]


def shipped_grids() -> dict[str, Path]:
    """Name and file of every grid in the package."""
    folder = Path(str(files("selfguide"))) / "recipes" / "grids"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_grid(grid: str) -> dict[Kind, Grid]:
    """A shipped grid by name, or a YAML file: what is tried on each kind of task.

    Keys under `classification` and `generation` are added to the others for tasks of that kind alone.
    """
    path = _find(grid)
    axes = read_mapping(path, "grid")
    of_kind = {kind: axes.pop(kind, {}) for kind in get_args(Kind)}
    for kind, more in of_kind.items():
        if not isinstance(more, dict):
            raise UserError(f"grid {path}: {kind}: is no mapping; write recipe keys below it")
    return {kind: _cross({**axes, **more}, path) for kind, more in of_kind.items()}


def _find(grid: str) -> Path:
    shipped = shipped_grids()
    if grid in shipped:
        return shipped[grid]
    if grid.endswith((".yaml", ".yml")):
        return Path(grid)
    near = difflib.get_close_matches(grid, shipped, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(shipped)} or a .yaml file"
    raise UserError(f"no grid is called {shorten(grid)}: {hint}")


def _cross(axes: Mapping[str, Any], path: Path) -> Grid:
    """The first key varies slowest."""
    for key, values in axes.items():
        _check_axis(key, values, path)
    epochs = axes.get("epochs", [])
    if not all(type(epoch) is int and epoch > 0 for epoch in epochs):
        raise UserError(f"grid {path}: epochs: write whole numbers from 1 on")
    keys = [key for key in axes if key != "epochs"]
    crossed = itertools.product(*(axes[key] for key in keys))
    return Grid(tuple(dict(zip(keys, values, strict=True)) for values in crossed), tuple(sorted(epochs)))


def _check_axis(key: str, values: object, path: Path) -> None:
    section = key.partition(".")[0]
    if key != "epochs" and section not in _SEARCHED:
        raise UserError(f"grid {path}: {shorten(key)}: cannot be searched; choose keys of {', '.join(_SEARCHED)}")
    if key in _FIXED:
        raise UserError(f"grid {path}: {key}: cannot be searched so: {_FIXED[key]}")
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"grid {path}: {key}: write the list of values to try, as in [0.7, 1.0]")
    if any(value in values[:number] for number, value in enumerate(values)):
        raise UserError(f"grid {path}: {key}: a value stands there twice; take one out")
