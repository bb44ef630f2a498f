"""A verdict on each task before anything starts: is the file a task, what is odd about it, does a recipe suit it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import track
from rich.text import Text

from selfguide.errors import UserError
from selfguide.prompts import Prompts, TooLong
from selfguide.protocols import test_instances, validation_instances
from selfguide.tables import make_table, show
from selfguide.taskfile import Kind
from selfguide.tasks import LabelsFrom, Task, find_tasks, load_task
from selfguide.text import printable

if TYPE_CHECKING:
    from selfguide.config import Recipe
    from selfguide.taskrun import Student

FEW_TASKS = 10
"""So many tasks are listed without being asked to; more are summed up."""
_STYLES = {"ok": "green", "remarks": "yellow", "error": "red"}


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one task. In an error all that the file would tell is None or empty."""

    path: str
    task: str | None
    verdict: Literal["ok", "remarks", "error"]
    kind: Kind | None
    labels: tuple[str, ...]
    labels_from: LabelsFrom | None
    num_examples: int | None
    num_instances: int | None
    language: str | None
    """Of the output: it decides how ROUGE-L is computed."""
    remarks: tuple[str, ...]
    error: str | None


def validate(
    paths: Iterable[str | Path],
    *,
    kind: Kind | None = None,
    labels_from: LabelsFrom | None = None,
    recipe: Recipe | None = None,
) -> list[Verdict]:
    """A verdict on each task under the paths, in their order. `kind` and `labels_from` are as in `load_task`.

    With a recipe the tasks are also held against its evaluation protocol and, where it names a student, against that
    student's context. Raises `UserError` where a path names nothing or the student cannot be read.
    """
    student = _load_student(recipe) if recipe and recipe.model.path else None
    verdicts = [_judge(path, kind, labels_from, recipe, student) for path in _watched(find_tasks(paths))]
    return list(_remark_names(verdicts))


def num_errors(verdicts: Iterable[Verdict]) -> int:
    return sum(one.verdict == "error" for one in verdicts)


def show_verdicts(verdicts: Sequence[Verdict], *, every: bool = False) -> None:
    """Errors, the kinds of remarks with their counts, and the sum; every task where asked, or where they are few."""
    parts: list[Any] = []
    if every or len(verdicts) <= FEW_TASKS:
        parts += [make_table(_HEADS, map(_cells, verdicts)), *_all_remarks(verdicts)]
    elif counts := Counter(kind for one in verdicts for kind in {remark_kind(remark) for remark in one.remarks}):
        parts.append(make_table(("remark", "tasks"), counts.most_common()))
    failed = [one for one in verdicts if one.verdict == "error"]
    parts += [Text("\n").join(Text.assemble(("error  ", "red"), printable(str(one.error))) for one in failed)]
    show(*(part for part in parts if part), summary(verdicts))


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(one.verdict for one in verdicts)
    text = f"{len(verdicts):,} {'task' if len(verdicts) == 1 else 'tasks'}: {counts['ok']:,} ok, "
    text += f"{counts['remarks']:,} with remarks, {counts['error']:,} in error"
    leaking = sum(one.labels_from == "instances" for one in verdicts)
    return text + (f"; {leaking:,} take their labels from the test answers" if leaking else "")


def remark_kind(remark: str) -> str:
    """A remark without its numbers and names, by which equal ones are counted together."""
    kind = re.sub(r"^\d+ (of \d+ )?", "some ", remark.partition(": ")[0])
    return re.sub(r" (but |\().*$", "", kind)


def _load_student(recipe: Recipe) -> Student:
    from selfguide.api import load_student

    return load_student(recipe)


def _watched(paths: list[Path]) -> Iterable[Path]:
    """Many files take seconds: a terminal sees how far they are."""
    console = Console(stderr=True)
    hidden = len(paths) <= FEW_TASKS or not console.is_terminal
    return track(paths, "reading tasks", console=console, transient=True, disable=hidden)


def _judge(
    path: Path, kind: Kind | None, labels_from: LabelsFrom | None, recipe: Recipe | None, student: Student | None
) -> Verdict:
    try:
        task = load_task(path, kind=kind, labels_from=labels_from)
        remarks = (*task.remarks, *(_remark_recipe(task, recipe, student) if recipe else ()))
    except UserError as error:
        return Verdict(str(path), None, "error", None, (), None, None, None, None, (), str(error))
    return Verdict(
        path=str(path), task=task.name, verdict="remarks" if remarks else "ok", kind=task.kind, labels=task.labels,
        labels_from=task.labels_from, num_examples=len(task.examples), num_instances=len(task.instances),
        language=task.output_language, remarks=remarks, error=None,
    )  # fmt: skip


def _remark_recipe(task: Task, recipe: Recipe, student: Student | None) -> Iterator[str]:
    config = recipe.evaluation
    test = test_instances(task, config, recipe.seed)
    if config.protocol == "official" and 0 < len(test) < config.num_instances:
        yield f"{len(test)} of {config.num_instances} test rows are there: evaluation.num_instances asks for more"
    if test and not validation_instances(task, config, recipe.seed):
        yield "no instances are left for validation: a search cannot use this task"
    if student:
        from selfguide.api import check_prompts

        prompts = Prompts(task, student.tokenizer, student.max_model_len, chat=student.chat)
        check_prompts(task, recipe, prompts)
        num_gold = None if config.demonstrations == "all" else config.demonstrations
        misses = sum(not _fits(prompts, row.input, config.sampling.max_tokens, num_gold) for row in test)
        if misses:
            yield f"{misses} of {len(test)} test rows do not fit the student's context: they will be misses"


def _fits(prompts: Prompts, text: str, max_tokens: int, num_gold: int | None) -> bool:
    try:
        prompts.answer(text, max_tokens, num_gold)
    except TooLong:
        return False
    return True


def _remark_names(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """A task's name is its folder in a run, so two tasks of one name are worth a word."""
    first: dict[str, str] = {}
    for one in verdicts:
        if one.task and one.path != first.setdefault(one.task, one.path):
            remark = f"another task has this name: {first[one.task]}"
            yield replace(one, verdict="remarks", remarks=(*one.remarks, remark))
        else:
            yield one


_HEADS = ("task", "verdict", "kind", "labels", "examples", "instances", "language")


def _cells(one: Verdict) -> list[object]:
    labels = Text(str(len(one.labels))) if one.kind == "classification" else Text("")
    if one.labels_from == "instances":
        labels = Text(f"{len(one.labels)} (test answers)", style="yellow")
    name, verdict = one.task or Path(one.path).name, Text(one.verdict, style=_STYLES[one.verdict])
    return [name, verdict, one.kind, labels, one.num_examples, one.num_instances, one.language]


def _all_remarks(verdicts: Iterable[Verdict]) -> list[Text]:
    lines = [f"{one.task}: {remark}" for one in verdicts for remark in one.remarks]
    return [Text("\n".join(map(printable, lines)))] if lines else []
