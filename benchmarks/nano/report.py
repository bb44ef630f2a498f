"""The benchmark's report: `python -m benchmarks.nano.report OUT` reads OUT/rows.json, writes report.md and report.json.

Intervals are 95%, by a bootstrap that draws tasks, within each task seeds, and instances (the same for all methods).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 4000
METHODS = {
    "chance": "chance", "base": "base, greedy", "base_lenient": "base, lenient parsing",
    "few_shot_icl": "base, all demonstrations", "filtered_decoding": "base, filtered decoding",
    "constrained_labels": "base, constrained labels", "calibrated_labels": "base, calibrated",
    "few_shot_sft": "few-shot SFT", "self_guide_published": "SELF-GUIDE as published",
    "self_guide_best": "SELF-GUIDE, best levers", "oracle": "oracle labels",
}  # fmt: skip
BARS = ("filtered_decoding", "constrained_labels", "chance")
OURS = ("self_guide_published", "self_guide_best")
LABEL_FACTS = {
    "inputs": "inputs", "valid": "valid", "carry": "carry their label", "before": "right before filters",
    "kept": "kept", "after": "right after",
}  # fmt: skip
Scores = dict[str, np.ndarray[Any, Any]]


def main(out: Path) -> None:
    runs = json.loads((out / "rows.json").read_text())["runs"]
    parts = {kind: describe([one for one in runs if one["kind"] == kind]) for kind in ("classification", "generation")}
    (out / "report.json").write_text(json.dumps(parts, indent=1) + "\n")
    text = "\n".join(line for kind, part in parts.items() if part for line in render(kind, part))
    (out / "report.md").write_text(text + "\n")
    print(text)


def describe(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means by task and over all, and the differences that matter, of the tasks of one kind."""
    if not runs:
        return {}
    tasks = sorted({one["task"] for one in runs})
    seeds = sorted({one["seed"] for one in runs})
    exact, rouge = (gather(runs, tasks, seeds, metric) for metric in ("exact_match", "rouge_l"))
    bars = {task: max((m for m in BARS if m in exact), key=lambda m: float(exact[m][i].mean()))
            for i, task in enumerate(tasks)}  # fmt: skip
    bar = np.stack([exact[bars[task]][i] for i, task in enumerate(tasks)])
    differences = {
        f"{ours} - {name}": interval(exact[ours] - theirs)
        for ours in OURS
        for name, theirs in {
            "bar": bar,
            **{m: exact[m] for m in METHODS if m in exact and m not in (*OURS, "chance")},
        }.items()
    }
    return {
        "tasks": {task: _of_task(task, i, exact, rouge, bars[task], runs) for i, task in enumerate(tasks)},
        "seeds": len(seeds), "instances": int(exact["base"].shape[2]),
        "mean": {m: {"exact_match": interval(exact[m]), "rouge_l": interval(rouge[m])} for m in METHODS if m in exact},
        "bar": interval(bar), "differences": differences,
    }  # fmt: skip


def gather(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], seeds: Sequence[int], metric: str) -> Scores:
    """By method (tasks, seeds, instances); only methods that every run has."""
    by_key = {(one["task"], one["seed"]): one for one in runs}
    some = next(iter(runs))
    found: Scores = {}
    for method in METHODS:
        if all(method in one["methods"] for one in runs):
            values = [[by_key[task, seed]["methods"][method][metric] for seed in seeds] for task in tasks]
            found[method] = np.array(values)
    size = len(some["methods"]["base"][metric])
    chances = [[[by_key[task, seed]["chance"]] * size for seed in seeds] for task in tasks]
    if some["chance"]:
        found["chance"] = np.array(chances)
    return found


def interval(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean in points of (tasks, seeds, instances), with its 95% interval."""
    rng = np.random.default_rng(0)
    num_tasks, num_seeds, size = values.shape
    means = np.empty(RESAMPLES)
    for b in range(RESAMPLES):
        total = 0.0
        for task in rng.integers(num_tasks, size=num_tasks):
            columns = rng.integers(size, size=size)
            drawn = values[task][rng.integers(num_seeds, size=num_seeds)]
            total += drawn.mean(axis=0)[columns].mean()
        means[b] = total / num_tasks
    low, high = np.percentile(means, [2.5, 97.5])
    mean, low, high = (round(100 * float(v), 1) for v in (values.mean(), low, high))
    return {"mean": mean, "low": low, "high": high}


def _of_task(
    task: str, index: int, exact: Scores, rouge: Scores, bar: str, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    mine = [one for one in runs if one["task"] == task]
    labels = {
        kind: {key: _mean([one["labels"][kind].get(key) for one in mine]) for key in LABEL_FACTS}
        for kind in ("published", "best")
    }
    return {
        "exact_match": {m: round(100 * float(exact[m][index].mean()), 1) for m in exact},
        "rouge_l": {m: round(100 * float(rouge[m][index].mean()), 1) for m in rouge},
        "bar": bar, "valid_answers": _mean([one["valid"] for one in mine]), "labels": labels,
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None


def render(kind: str, part: Mapping[str, Any]) -> list[str]:
    """Markdown: the methods over all tasks, the gains, each task, and what became of the labels."""
    present = [m for m in METHODS if m in part["mean"]]
    count = f"{len(part['tasks'])} tasks, {part['seeds']} seeds, {part['instances']} instances each"
    lines = [f"## {kind.capitalize()}: {count}", "", "| method | exact match | ROUGE-L |", "|---|---|---|"]
    lines += [f"| {METHODS[m]} | {_said(part['mean'][m]['exact_match'])} | {_said(part['mean'][m]['rouge_l'])} |"
              for m in present]  # fmt: skip
    lines += [f"| each task's bar | {_said(part['bar'])} | |", "", "| difference, exact match | points |", "|---|---|"]
    lines += [f"| {_named(name)} | {_said(value, '+')} |" for name, value in part["differences"].items()]
    lines += ["", f"| exact match by task | {' | '.join(METHODS[m] for m in present)} | valid answers |",
              "|---|" + "---|" * (len(present) + 1)]  # fmt: skip
    for task, one in part["tasks"].items():
        cells = [f"{one['exact_match'][m]:.1f}" for m in present]
        lines.append(f"| {task} | {' | '.join(cells)} | {_share(one['valid_answers'])} |")
    lines += ["", f"| labels by task, as published / best levers | {' | '.join(LABEL_FACTS.values())} |"]
    lines.append("|---|" + "---|" * len(LABEL_FACTS))
    for task, one in part["tasks"].items():
        both = one["labels"]["published"], one["labels"]["best"]
        cells = [" / ".join(_fact(key, side[key]) for side in both) for key in LABEL_FACTS]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return [*lines, ""]


def _said(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.1f} ({value['low']:{sign}.1f} to {value['high']:{sign}.1f})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def _fact(key: str, value: float | None) -> str:
    return f"{value or 0:.0f}" if key in ("inputs", "kept") else _share(value)


def _named(difference: str) -> str:
    ours, theirs = difference.split(" - ")
    return f"{METHODS[ours]} minus {METHODS.get(theirs, 'the bar')}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
