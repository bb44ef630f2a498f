"""selfguide: SELF-GUIDE (arXiv 2407.12874) as a batch system on a serving engine. It decides what to ask.

import asyncio, selfguide

task = selfguide.load_task("task.json")
recipe = selfguide.load_recipe("default", {"model.path": "path/to/model"})
comparison = asyncio.run(selfguide.run(task, recipe))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfguide.api import run
    from selfguide.config import Recipe
    from selfguide.errors import TaskFailed, UserError
    from selfguide.recipefile import load_recipe
    from selfguide.tasks import Task, load_task

__version__ = "0.1.0"
__all__ = ["Recipe", "Task", "TaskFailed", "UserError", "load_recipe", "load_task", "run"]

_HOMES = {
    "run": "api", "Recipe": "config", "load_recipe": "recipefile", "Task": "tasks", "load_task": "tasks",
    "TaskFailed": "errors", "UserError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import selfguide` stays light."""
    if name in _HOMES:
        return getattr(import_module(f"selfguide.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfguide' has no attribute {name!r}")
