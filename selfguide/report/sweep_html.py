"""The report of a sweep as one page that needs nothing else: no request, no framework. Every text is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from selfguide.report import sweep_tables as tables
from selfguide.report.cells import bounds, signed
from selfguide.report.conclusion import sign
from selfguide.report.sweep_style import CSS, SCRIPT
from selfguide.report.sweep_svg import forest, funnel_bars, histogram, stage_bar
from selfguide.text import printable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_MOST_NAMES = 20
"""Of each failure's tasks; the table of every task has them all."""

Json = Mapping[str, Any]


def render_page(document: Json) -> str:
    """HTML of a document that has a `sweep`."""
    sweep = document["sweep"]
    sections = [
        *_head(sweep), *_methods(sweep), *_categories(sweep["groups"]), *_gains(sweep["tasks"]),
        *_funnel(sweep["funnel"]), *_stages(sweep["stages"]), *_sessions(sweep), *_failures(sweep),
        *_tasks(sweep["tasks"]), _foot(document),
    ]  # fmt: skip
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>SELF-GUIDE sweep, {_text(sweep['recipe_name'])}</title>",
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>",
        *sections, f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _text(text: object) -> str:
    return escape(printable(str(text)))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _table(one: tables.Table, *, tall: bool = False) -> str:
    sides = ["" if side == "l" else ' class="r"' for side in one.align]
    heads = "".join(f'<th scope="col"{side}>{_text(head)}</th>' for side, head in zip(sides, one.heads, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{side}>{_text(cell)}</td>" for side, cell in zip(sides, row, strict=True)) + "</tr>"
        for row in one.rows
    )
    frame = f'<div class="wide{" tall" if tall else ""}" tabindex="0">'
    return f"{frame}<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"


def _fold(summary: str, *content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{''.join(content)}</details>"


# ---- the head


def _head(sweep: Json) -> Iterator[str]:
    student, counts = sweep["student"], sweep["counts"]
    digest = f" ({student['digest'][:12]})" if student["digest"] else ""
    yield "<h1>SELF-GUIDE sweep</h1>"
    yield (
        f'<p class="soft">Recipe {_text(sweep["recipe_name"])}, seed {sweep["seed"]}; student {_text(student["name"])}'
        f"{digest}; {_text(sweep['engine'])} engine; {_text(sweep['protocol'])} protocol. All scores are over the "
        f"{counts['scored']:,} tasks that are done and have held-out data.</p>"
    )
    yield f'<div class="cards">{"".join(_cards(sweep))}</div>'
    parts = [(state, counts[state]) for state in ("done", "failed", "waiting") if counts[state]]
    bars = "".join(f'<i class="{state}" style="flex:{many}" title="{many:,} {state}"></i>' for state, many in parts)
    yield f'<div class="states" role="img" aria-label="{", ".join(f"{n} {state}" for state, n in parts)}">{bars}</div>'
    yield f'<ul class="said">{"".join(f"<li>{_text(one)}</li>" for one in sweep["conclusion"])}</ul>'


def _cards(sweep: Json) -> Iterator[str]:
    counts, totals = sweep["counts"], sweep["totals"]
    rest = f"{counts['failed']:,} failed, {counts['waiting']:,} waiting"
    yield _card(f"{counts['done']:,}", f"of {counts['listed']:,} tasks done; {rest}")
    for one in sweep["groups"]:
        if one["scope"] == "kind":
            base = next(method for method in one["methods"] if method["method"] == "base")
            gain, tasks = base["difference"], base["num_tasks"]
            tone = {1: "up", -1: "down"}.get(sign(gain), "")
            what = f"{tables.metric_title(one['metric'])} over the base, {tasks:,} {one['kind']} tasks ({bounds(gain)})"
            yield _card(signed(gain["mean"]), what, tone)
    if totals["num_sessions"]:
        yield _card(tables.decimal(totals["tasks_per_hour"]), "tasks done per hour")
        idle = totals["engine_idle_share"]
        yield _card(tables.NONE if idle is None else f"{idle:.1%}", "of the engines' waking time was idle")


def _card(value: str, said: str, tone: str = "") -> str:
    return f'<div class="card"><b class="{tone}">{_text(value)}</b><span>{_text(said)}</span></div>'


# ---- scores


def _methods(sweep: Json) -> Iterator[str]:
    mine = [one for one in sweep["groups"] if one["scope"] in ("kind", "all")]
    if mine:
        yield "<h2>Methods side by side</h2>"
    for one in sorted(mine, key=lambda one: str(one["scope"] == "all")):
        yield f"<h3>{_text(tables.group_title(one))}</h3>{_table(tables.methods(one, sweep['pairs']))}"
    if mine:
        yield _note(tables.MEANS_NOTE) + _note(tables.TESTS_NOTE)


def _categories(groups: Sequence[Json]) -> Iterator[str]:
    for scope, head in (("test_category", "Categories of the official test split"), ("category", "Categories")):
        mine = [one for one in groups if one["scope"] == scope]
        if any(method["method"] == "base" for one in mine for method in one["methods"]):
            yield f"<h2>{head}</h2>"
            yield '<p class="soft">SELF-GUIDE minus base in points, with 95% intervals, and how many tasks.</p>'
            yield f'<div class="figure">{forest(mine)}</div>'
            yield _fold("Every method by category", _table(tables.categories(groups, scope)))


def _gains(tasks: Sequence[Json]) -> Iterator[str]:
    gains = [gain for task in tasks if (gain := tables.gain_on_base(task)) is not None]
    if gains:
        yield "<h2>Gains task by task</h2>"
        yield '<p class="soft">How many tasks gained how many points over the base.</p>'
        yield f'<div class="figure">{histogram(gains)}</div>'


# ---- work


def _funnel(funnel: Json) -> Iterator[str]:
    if funnel["num_tasks"]:
        yield "<h2>From candidates to trained rows</h2>"
        yield f'<p class="soft">Over {funnel["num_tasks"]:,} tasks that came to the end.</p>'
        yield f'<div class="figure">{funnel_bars(funnel["steps"])}</div>'
    if funnel["losses"]:
        yield _fold("What rows were lost to", _table(tables.losses(funnel)))


def _stages(stages: Sequence[Json]) -> Iterator[str]:
    if stages:
        yield f'<h2>Time and tokens</h2><div class="figure">{stage_bar(stages)}</div><p></p>'
        yield _table(tables.stages(stages)) + _note(tables.SECONDS_NOTE)


def _sessions(sweep: Json) -> Iterator[str]:
    if sweep["sessions"]:
        yield "<h2>Sessions</h2>" + _table(tables.sessions(sweep["sessions"], sweep["totals"]))


def _failures(sweep: Json) -> Iterator[str]:
    if sweep["failures"]:
        yield "<h2>Failed tasks</h2>" + _table(tables.failures(sweep["failures"], _MOST_NAMES), tall=True)
        yield _note("Reasons that differ in numbers alone count together.")
    if sweep["absent"]:
        said = "Listed by the split, and not in the folder: " + ", ".join(sweep["absent"])
        yield _fold(f"{len(sweep['absent']):,} absent", f"<p>{_text(said)}.</p>")
    if sweep["invalid"]:
        summary = f"{len(sweep['invalid']):,} invalid task files"
        yield _fold(summary, _table(tables.invalid(sweep["invalid"]), tall=True))


# ---- every task


def _tasks(tasks: Sequence[Json]) -> Iterator[str]:
    names = list(dict.fromkeys(one["method"] for task in tasks for one in task["methods"]))
    names.sort(key=lambda name: name == "self_guide")
    heads = [
        "task",
        "gain",
        "Holm p",
        "state",
        "category",
        "metric",
        *map(tables.method_title, names),
        "rows",
        "seconds",
    ]
    words = ("task", "state", "category", "metric")
    cells = "".join(_sortable(head, right=head not in words) for head in heads)
    yield '<h2>Every task</h2><input id="search" type="search" aria-label="Search the tasks" '
    yield 'placeholder="Search: a name, a category, failed …"><span id="shown" class="note" role="status"></span>'
    yield f'<div class="wide tall" tabindex="0"><table id="tasks"><thead><tr>{cells}</tr></thead><tbody>'
    yield from (_task(task, names) for task in tasks)
    yield "</tbody></table></div>"
    yield _note("Gain: SELF-GUIDE minus base, in points. Rows: trained on. A click on a heading sorts.")


def _sortable(head: str, *, right: bool) -> str:
    side = ' class="r"' if right else ""
    return f'<th scope="col" aria-sort="none"{side}><button type="button">{_text(head)}</button></th>'


def _task(task: Json, names: Sequence[str]) -> str:
    metric, gain, test = task["primary_metric"], tables.gain_on_base(task), tables.base_test(task)
    found = {
        one["method"]: one["scores"][metric]["mean"] for one in task["methods"] if metric and one["scores"][metric]
    }
    state = f"<td>{_text(task['state'])}" + (f": {_text(task['reason'])}" if task["reason"] else "") + "</td>"
    tone = "" if gain is None or not test or test["holm_p"] > 0.05 else " up" if gain > 0 else " down"
    return (
        f'<tr><td class="name">{_text(task["task"])}</td>'
        + _number(gain, "{:+.1f}", tone)
        + _number(test["holm_p"] if test else None, "{:.3f}")
        + f"{state}<td>{_text(task['category'] or tables.NONE)}</td>"
        + f"<td>{_text(tables.metric_title(metric) if metric else tables.NONE)}</td>"
        + "".join(_number(found.get(name), "{:.1f}") for name in names)
        + _number(task["funnel"]["rows_trained"], "{:,}")
        + _number(sum(task["stage_seconds"].values()) or None, "{:,.1f}")
        + "</tr>"
    )


def _number(value: float | None, spec: str, tone: str = "") -> str:
    if value is None:
        return f'<td class="r" data-n="">{tables.NONE}</td>'
    return f'<td class="r{tone}" data-n="{value:g}">{spec.format(value)}</td>'


def _foot(document: Json) -> str:
    return _note(f"selfguide {document['selfguide']}. Every number, with all intervals and tests, is in report.json.")
