"""What a search found, for a person: a table of points by tasks for each kind, its winner, and what failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfguide.report.cells import escape, points, signed, table

Json = Mapping[str, Any]

_NOTE = (
    "Scores are of validation rows, in points; in parentheses the gain over the base on the same rows. The winner has "
    "the best worst gain, among equals the best mean gain; a point that failed on a task cannot win."
)
_EPOCHS = (
    "An epoch's score is of that checkpoint of one training, whose learning rate falls over all epochs. The winner's "
    "recipe trains for as many epochs with a rate that falls over those, which is not the same student."
)


def render_search(document: Json) -> str:
    """Markdown of search.json."""
    settings = document["recipe"]
    evaluation, seed = settings["evaluation"], settings["seed"]
    facts = f"Student {escape(settings['model']['path'])}, recipe {escape(settings['name'])}, "
    blocks = ["# Search", f"{facts}protocol {evaluation['protocol']}, seed {seed}."]
    if settings["engine"]["kind"] == "simulated":
        blocks.append("Simulated engines answered, without a model: the figures mean nothing.")
    blocks.append(_NOTE)
    falls = settings["finetuning"]["scheduler"] != "constant"
    if falls and any(point["epoch"] for kind in document["kinds"] for point in kind["points"]):
        blocks.append(_EPOCHS)
    for kind in document["kinds"]:
        blocks += [f"## {kind['kind'].capitalize()}, {kind['metric']}", _winner(kind), _table(kind), *_failures(kind)]
    return "\n\n".join(blocks) + "\n"


def _winner(kind: Json) -> str:
    if kind["winner"] is None:
        return "No point came to an end on all tasks, so none wins."
    point = kind["points"][kind["winner"]]
    text = f"The winner is {_name(point)}: `{kind['winner_recipe']}`. Its worst gain is {signed(point['worst'])} "
    text += f"({escape(point['worst_task'])}), its mean gain {signed(point['mean'])}."
    return text if point["worst"] > 0 else f"{text} No point gains on every task."


def _name(point: Json) -> str:
    named = {**point["changes"], **({"epoch": point["epoch"]} if point["epoch"] else {})}
    return ", ".join(f"{escape(key)} {_value(value)}" for key, value in named.items()) or "the recipe as it is"


def _value(value: object) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))


def _table(kind: Json) -> str:
    keys = list(dict.fromkeys(key for point in kind["points"] for key in point["changes"]))
    names = [one["task"] for one in kind["tasks"]]
    heads = ["", *map(escape, keys), "epoch", *map(escape, names), "worst", "mean"]
    bases = [points(one["score"]) if "score" in one else "failed" for one in kind["tasks"]]
    sizes = [f"{one['n']:,}" if "n" in one else "" for one in kind["tasks"]]
    blank = [""] * (len(keys) + 1)
    lines = [["rows", *blank, *sizes, "", ""], ["base", *blank, *bases, "", ""]]
    for number, point in enumerate(kind["points"]):
        marked = "winner" if number == kind["winner"] else str(number + 1)
        settings = [_value(point["changes"][key]) if key in point["changes"] else "" for key in keys]
        cells = [_cell(point["tasks"][name]) for name in names]
        lines.append([marked, *settings, str(point["epoch"] or ""), *cells, *_ends(point)])
    return table("l" + "r" * (len(heads) - 1), heads, lines)


def _cell(entry: Json) -> str:
    return "failed" if "failed" in entry else f"{points(entry['score'])} ({signed(entry['gain'])})"


def _ends(point: Json) -> Sequence[str]:
    return ["failed", ""] if point["worst"] is None else [signed(point["worst"]), signed(point["mean"])]


def _failures(kind: Json) -> Iterator[str]:
    """Each reason, which names its task, with the points that it ended."""
    reasons: dict[str, list[str]] = {}
    for number, point in enumerate(kind["points"], 1):
        for entry in point["tasks"].values():
            if "failed" in entry:
                reasons.setdefault(entry["failed"], []).append(str(number))
    if reasons:
        lines = (f"- points {', '.join(numbers)}: {escape(reason)}" for reason, numbers in reasons.items())
        yield "Failed; `--retry-failed` tries again:\n\n" + "\n".join(lines)
