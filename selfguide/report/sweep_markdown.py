"""The report of a sweep for a person: a summary first, and of many tasks those that stand out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfguide.report import sweep_tables as tables
from selfguide.report.cells import escape, table

_MOST = 20
_MOST_NAMES = 50

Json = Mapping[str, Any]


def render_sweep(document: Json) -> str:
    """Markdown of a document that has a `sweep`; `docs/report.md` describes it."""
    return "\n\n".join(_blocks(document["sweep"])) + "\n"


def _blocks(sweep: Json) -> Iterator[str]:
    yield "# SELF-GUIDE sweep"
    yield headline(sweep)
    yield "\n".join(f"- {escape(one)}" for one in sweep["conclusion"])
    yield from _methods(sweep["groups"], sweep["pairs"])
    yield from _categories(sweep["groups"])
    yield from _extremes(sweep["tasks"])
    yield from _funnel(sweep["funnel"])
    if sweep["stages"]:
        yield from ("## Time and tokens", _table(tables.stages(sweep["stages"])), tables.SECONDS_NOTE)
    if sweep["sessions"]:
        yield from ("## Sessions", _table(tables.sessions(sweep["sessions"], sweep["totals"])))
    yield from _failures(sweep)
    yield "Every task, with all methods and tests: `report.json`, and as a table to sort and search: `report.html`."


def headline(sweep: Json) -> str:
    """What was swept, and what the means are over."""
    counts, student = sweep["counts"], sweep["student"]
    digest = f" ({student['digest'][:12]})" if student["digest"] else ""
    return (
        f"{counts['listed']:,} tasks by recipe {escape(sweep['recipe_name'])}, seed {sweep['seed']}; student "
        f"{escape(student['name'])}{digest}, {escape(sweep['engine'])} engine, {escape(sweep['protocol'])} protocol. "
        f"{counts['done']:,} done, {counts['failed']:,} failed, {counts['waiting']:,} waiting. All scores are over the "
        f"{counts['scored']:,} tasks that are done and have held-out data."
    )


def _table(one: tables.Table) -> str:
    return table(one.align, one.heads, [[escape(cell) for cell in row] for row in one.rows])


def _methods(groups: Sequence[Json], pairs: Sequence[Json]) -> Iterator[str]:
    mine = [one for one in groups if one["scope"] in ("kind", "all")]
    if mine:
        yield "## Methods side by side"
    for one in sorted(mine, key=lambda one: str(one["scope"] == "all")):
        yield f"### {escape(tables.group_title(one))}: {_tasks(one['num_tasks'])}"
        yield _table(tables.methods(one, pairs))
    if mine:
        yield from (tables.MEANS_NOTE, tables.TESTS_NOTE)


def _categories(groups: Sequence[Json]) -> Iterator[str]:
    for scope, head in (("test_category", "Categories of the official test split"), ("category", "Categories")):
        found = tables.categories(groups, scope)
        if found.rows:
            yield from (f"## {head}", _table(found))


def _extremes(tasks: Sequence[Json]) -> Iterator[str]:
    for name, found in tables.extremes(tasks, _MOST):
        yield from (f"## The largest {name} against the base", _table(found))


def _funnel(funnel: Json) -> Iterator[str]:
    if funnel["num_tasks"]:
        yield f"## From candidates to trained rows: {_tasks(funnel['num_tasks'])}"
        yield _table(tables.funnel(funnel))
        if funnel["losses"]:
            yield _table(tables.losses(funnel))


def _failures(sweep: Json) -> Iterator[str]:
    if sweep["failures"]:
        yield from ("## Failed tasks", _table(tables.failures(sweep["failures"])))
        yield "Reasons that differ in numbers alone count together; `--retry-failed` tries these tasks again."
    if sweep["absent"]:
        names, rest = sweep["absent"][:_MOST_NAMES], len(sweep["absent"]) - _MOST_NAMES
        more = f" and {rest:,} more" if rest > 0 else ""
        yield "## Absent tasks"
        yield f"Listed by the split, and not in the folder: {', '.join(map(escape, names))}{more}."
    if sweep["invalid"]:
        yield from ("## Invalid task files", _table(tables.invalid(sweep["invalid"][:_MOST_NAMES])))
        if len(sweep["invalid"]) > _MOST_NAMES:
            yield f"And {len(sweep['invalid']) - _MOST_NAMES:,} more, in `report.json`."


def _tasks(number: int) -> str:
    return f"{number:,} task{'' if number == 1 else 's'}"
