"""The replication's part of the report for a person: published and measured columns, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfguide.report.cells import escape, gain, points, score, signed, table

Json = Mapping[str, Any]

_NOTE = (
    "Columns headed *published* are the authors' figures, never measured here, with the tag of their source (below), "
    "in points: fractions are multiplied by 100. All others were measured by this run, by the authors' metrics "
    "(`authors_em` for classification, `authors_rouge_char` for generation) on a split of the authors' kind, with 95% "
    "intervals; gain is SELF-GUIDE minus base, paired row by row. An empty cell was not published, or is not measured."
)
_MEANS_NOTE = (
    "Means count each task the same; a measured one has the interval that follows from its tasks' own, and stands only "
    "where all of its tasks are measured. Where some are, a second line has the mean over those, on both sides."
)
_ABSENT = "Absent from the task files, and not run: {}."


def render_replication(replication: Json, tasks: Sequence[Json]) -> list[str]:
    """Blocks of Markdown."""
    rows = replication["tasks"]
    done = sum(row["state"] == "compared" for row in rows)
    absent = [row["name"] for row in rows if row["state"] == "absent"]
    blocks = [
        "## Replication of the authors' experiment",
        f"{done} of the authors' {len(rows)} tasks are compared; their student was {escape(replication['student'])}.",
        *_caveats(tasks), *([_ABSENT.format(", ".join(absent))] if absent else []), _NOTE,
    ]  # fmt: skip
    for group in dict.fromkeys((row["set"], row["kind"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["kind"]) == group]
        means = [one for one in replication["means"] if (one["set"], one["kind"]) == group]
        lines = [*map(_task_row, mine), *(_mean_row(one, len(mine)) for one in means)]
        blocks += [f"### {group[0].capitalize()} {group[1]}", table("lrrrrrrrrl", _heads(replication), lines)]
    return [*blocks, _MEANS_NOTE, *_failures(rows), *_validation(replication), *_sources(replication)]


def _caveats(tasks: Sequence[Json]) -> Iterator[str]:
    """What makes the measured columns mean nothing."""
    lines = [line for task in tasks for line in task["lines"]]
    if any(line["engine"] == "simulated" for line in lines):
        yield "Simulated engines answered, without a model: the measured columns mean nothing."
    if any(line["student"]["name"] == "random" for line in lines):
        yield "The student's weights are random: the measured columns say nothing about the method."
    students = sorted({escape(line["student"]["name"]) for line in lines})
    if students:
        yield f"Student here: {', '.join(students)}."


def _heads(replication: Json) -> list[str]:
    said = {one["what"]: f"{one['title']}, published ({one['source']})" for one in replication["kinds"]}
    return [
        "task", said["base"], "base", said["filtered_decoding"], "filtered decoding", "SELF-GUIDE", said["gain"],
        "gain", "n", "state",
    ]  # fmt: skip


def _task_row(row: Json) -> list[str]:
    theirs, ours = row["published"], row["measured"]
    rows = ours["base"]["n"] if ours["base"] else None
    return [
        row["name"], _theirs(theirs["base"]), score(ours["base"]), _theirs(theirs["filtered_decoding"]),
        score(ours["filtered_decoding"]), score(ours["self_guide"]), _theirs(theirs["gain"], plus=True),
        gain(ours["gain"]), "" if rows is None else f"{rows:,}", row["state"],
    ]  # fmt: skip


def _mean_row(mean: Json, num_all: int) -> list[str]:
    theirs, ours, count = mean["published"], mean["measured"], len(mean["tasks"])
    name = f"mean of all {count}" if count == num_all else f"mean of the {count} measured"
    cells = {what: "" if value is None else points(value) for what, value in theirs.items()}
    theirs_gain = "" if theirs["gain"] is None else signed(theirs["gain"])
    return [
        name, cells["base"], score(ours["base"]), cells["filtered_decoding"], score(ours["filtered_decoding"]),
        score(ours["self_guide"]), theirs_gain, gain(ours["gain"]), "", "",
    ]  # fmt: skip


def _theirs(figure: Json | None, *, plus: bool = False) -> str:
    if figure is None:
        return ""
    return signed(figure["points"]) if plus else points(figure["points"])


def _failures(rows: Sequence[Json]) -> list[str]:
    failed = [f"- {escape(row['failure'])}" for row in rows if row["state"] == "failed"]
    return ["Failed; the same command tries again:", "\n".join(failed)] if failed else []


def _validation(replication: Json) -> list[str]:
    """Figures with nothing beside them: no validation rows are scored here."""
    cells = [(row["name"], row["published"]["best_validation"]) for row in replication["tasks"]]
    source = next(one["source"] for one in replication["kinds"] if one["what"] == "best_validation")
    lines = [[name, points(one["points"]), "", escape(one["settings"])] for name, one in cells if one]
    heads = ["task", f"best validation, published ({source})", "best validation", "their configuration"]
    return ["### Best validation score", table("lrrl", heads, lines)]


def _sources(replication: Json) -> list[str]:
    """Where each published column comes from, and what differs from what stands beside it."""
    lines = []
    for kind in replication["kinds"]:
        lines.append(f"- **{kind['title']}, published** ({kind['source']}: {kind['source_meaning']}). {kind['said']}")
        lines += [f"    - Differs: {text}." for text in kind["differs"]]
    for one in replication["overall"]:
        lines.append(f"- **{one['kind']} as a whole** ({one['source']}: {one['source_meaning']}). {one['said']}")
        lines.append(f"    - Differs: {one['differs']}.")
    return ["### Sources of the published figures, and what differs", "\n".join(lines)]
