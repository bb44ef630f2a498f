"""The SELF-GUIDE authors' experiment again: their tasks, one after another, in one run folder, each as `run` takes it.

One at a time, since tuned full weights take the place of the untuned ones in the engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.files import AnyPath
from selfguide.errors import TaskFailed, UserError
from selfguide.published import PublishedTask, published, published_tasks
from selfguide.store import RunStore, write_whole
from selfguide.tasks import load_task

if TYPE_CHECKING:
    from selfguide.api import Session
    from selfguide.config import Recipe
    from selfguide.taskrun import Progress
    from selfguide.tasks import LabelsFrom, Task

MARKER = "replication.json"
"""In a run folder: which of the authors' tasks it is of, and which of them failed. Reports read it."""


@dataclass(frozen=True)
class Chosen:
    """The tasks that were asked for: those that the data holds, and the names of those that it does not."""

    tasks: Mapping[str, Task]
    absent: tuple[str, ...]


def settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to a recipe: the authors' student, split and metrics, which their figures are by; `changes` win."""
    ours: dict[str, Any] = {"evaluation.protocol": "authors"}
    if not changes.get("model.path"):
        student = published()["student"]
        ours |= {"model.path": student["model"], "model.revision": student["revision"]}
    return ours | dict(changes)


def choose_tasks(folder: Path, only: Sequence[str] = (), labels_from: LabelsFrom | None = None) -> Chosen:
    """Those of the authors' tasks (`only`: numbers or names) that a clone of NI-V2 holds. Raises `UserError`."""
    wanted = _wanted(only)
    files = _task_files(folder)
    found = {one: files[one.name] for one in wanted if one.name in files}
    if not found:
        raise UserError(f"{folder}: holds none of the authors' tasks that were asked for; name a clone of NI-V2")
    tasks = {one.name: load_task(path, kind=one.kind, labels_from=labels_from) for one, path in found.items()}
    return Chosen(tasks, tuple(one.name for one in wanted if one not in found))


def _wanted(only: Sequence[str]) -> list[PublishedTask]:
    tasks = published_tasks()
    known = {key: one for one in tasks for key in (one.name, one.name.removeprefix("task"))}
    if unknown := [name for name in only if name not in known]:
        names = ", ".join(one.name.removeprefix("task") for one in tasks)
        raise UserError(f"--only {unknown[0]}: is none of the authors' tasks; choose from {names}")
    return [one for one in tasks if not only or one in map(known.__getitem__, only)]


def _task_files(folder: Path) -> dict[str, Path]:
    """Task files by the first part of their names, task190."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; selfguide data ni-v2 {folder} fetches NI-V2 into it")
    places = (folder / "tasks", folder / "natural-instructions" / "tasks", folder)
    place = next(one for one in places if one.is_dir())
    return {path.name.split("_")[0]: path for path in sorted(place.glob("task*_*.json"))}


async def replicate(
    chosen: Chosen,
    recipe: Recipe,
    out: AnyPath,
    *,
    progress: Progress = lambda task, stage, counts: None,
    say: Callable[[str], None] = lambda text: None,
    session: Session | None = None,
    command: Sequence[str] = (),
) -> dict[str, str]:
    """Runs every chosen task in the run folder `out`; returns what failed, by task, with the reason.

    A task that fails does not end the others. A second call goes on where the first one ended, and tries again what
    failed. `say` hears of each task's end.
    """
    from selfguide.api import open_session, run

    RunStore(out, create=False)
    if session is None:
        async with open_session(recipe, progress) as own:
            return await replicate(chosen, recipe, out, progress=progress, say=say, session=own, command=command)
    RunStore(out, command=command)
    failed: dict[str, str] = {}
    _mark(out, chosen, failed)
    for number, (name, task) in enumerate(chosen.tasks.items(), 1):
        try:
            await run(task, recipe, out, progress=progress, session=session)
            say(f"{number}/{len(chosen.tasks)} {task.name}: done")
        except TaskFailed as error:
            if _lost_engines(error):
                raise
            failed[name] = str(error)
            _mark(out, chosen, failed)
            say(f"{number}/{len(chosen.tasks)} {error}")
    return failed


def _lost_engines(error: TaskFailed) -> bool:
    from cluster.pool import EnginesLost

    return isinstance(error.__cause__, EnginesLost)


def _mark(out: AnyPath, chosen: Chosen, failed: Mapping[str, str]) -> None:
    """What a report must know and no stage tells. Tasks of an earlier call in the folder stay."""
    known = read_marker(out) or {"tasks": {}, "absent": [], "failed": {}}
    tasks = {**known["tasks"], **{name: task.name for name, task in chosen.tasks.items()}}
    absent = sorted({*known["absent"], *chosen.absent} - set(tasks))
    others = {name: why for name, why in known["failed"].items() if name not in chosen.tasks}
    content = {"tasks": tasks, "absent": absent, "failed": {**others, **failed}}
    write_whole(out / MARKER, json.dumps(content, indent=1).encode())


def read_marker(folder: AnyPath) -> dict[str, Any] | None:
    """What `replicate` left in the run folder; None where it is of another kind. Raises `UserError`."""
    path = folder / MARKER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"tasks": dict(content["tasks"]), "absent": list(content["absent"]), "failed": dict(content["failed"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error!r}); `selfguide replicate` writes it anew, remove it"
        ) from None
