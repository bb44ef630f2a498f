"""The demonstration: SELF-GUIDE with the embedded student on four held-out tasks, and what its numbers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfguide import nano
from selfguide.api import open_session, run
from selfguide.intervals import bootstrap_tasks
from selfguide.methods import Comparison
from selfguide.recipefile import load_recipe
from selfguide.taskrun import Progress
from selfguide.tasks import load_task

CONTROLS = ("filtered_decoding", "constrained_labels", "calibrated_labels")
_IN_FLIGHT = 2
_COLUMNS = {
    "base": "base", "filtered_decoding": "filtered", "constrained_labels": "constrained",
    "calibrated_labels": "calibrated", "self_guide": "SELF-GUIDE",
}  # fmt: skip


async def run_demo(
    out: Path, progress: Progress, changes: Mapping[str, Any], command: Sequence[str] = ()
) -> list[Comparison]:
    """Runs the four tasks in one session, one sampling while another trains; resumes in `out` as every run does."""
    recipe = load_recipe(nano.NAME, {"evaluation.controls": list(CONTROLS), **changes})
    slots = asyncio.Semaphore(_IN_FLIGHT)
    async with open_session(recipe, progress) as session:

        async def run_one(name: str) -> Comparison:
            async with slots:
                task = load_task(nano.TASKS / f"{name}.json")
                return await run(task, recipe, out, progress=progress, session=session, command=command)

        return list(await asyncio.gather(*map(run_one, nano.DEMO_TASKS)))


def document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Per task and method exact match in points; the mean gain over each task's bar with its 95% interval.

    The bar is the best of filtered decoding, constrained labels and chance, so that a student that always gives one
    answer makes no gain.
    """
    lines, gains = [], []
    for one in comparisons:
        scores = {method: _exact(one, method) for method in _COLUMNS if method in one.evaluations}
        labels = len(load_task(nano.TASKS / f"{one.task}.json").labels)
        untuned = ("filtered_decoding", "constrained_labels")
        bars = {str(method): _mean(scores[method]) for method in untuned if method in scores}
        bars["chance"] = 1 / labels if labels else 0.0
        bar = max(bars, key=lambda name: bars[name])
        ours = scores["self_guide"]
        theirs = scores[bar] if bar in scores else [bars[bar]] * len(ours)
        gains.append([a - b for a, b in zip(ours, theirs, strict=True)])
        means = {method: round(100 * _mean(values), 1) for method, values in scores.items()}
        lines.append(
            {"task": one.task, "n": len(ours), "exact_match": means, "bar": bar, "gain": 100 * _mean(gains[-1])}
        )
    mean = bootstrap_tasks(gains, 10_000, 0)
    return {"tasks": lines, "gain": {"mean": mean.mean, "low": mean.low, "high": mean.high, "n": mean.n}}


def _exact(comparison: Comparison, method: str) -> list[float]:
    return [row["exact_match"] for row in comparison.evaluations[method].rows()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(found: Mapping[str, Any], report: Path) -> None:
    """The table, one sentence, and where the report is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("exact match, held-out tasks", no_wrap=True)
    for head in ("n", *_COLUMNS.values(), "gain"):
        table.add_column(head, justify="right")
    for line in found["tasks"]:
        cells = [_points(line["exact_match"].get(method)) for method in _COLUMNS]
        table.add_row(Text(line["task"]), str(line["n"]), *cells, f"{line['gain']:+.1f}")
    console = Console(width=120)
    console.print(table)
    console.print()
    console.print(Text(sentence(found)), soft_wrap=True)
    console.print(Text(f"\nReport: {report}"), soft_wrap=True)


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def sentence(found: Mapping[str, Any]) -> str:
    """What the numbers mean, in one sentence that holds whatever they are."""
    gain = found["gain"]
    sure = "more" if gain["low"] > 0 else "fewer" if gain["high"] < 0 else "neither surely more nor surely fewer"
    return (
        f"Trained on nothing but what it wrote and answered itself, the student answers {sure} held-out questions "
        f"rightly than the best it does untuned by filtering its samples or choosing among the labels: "
        f"{gain['mean']:+.1f} points (95% interval {gain['low']:+.1f} to {gain['high']:+.1f}, {gain['n']} questions); "
        'the column "calibrated" shows how much of it removing the student\'s label bias alone would bring.'
    )


def demonstrate(
    out: Path, progress: Progress, changes: Mapping[str, Any], command: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs, writes `demo.json` into the run folder, and returns its content."""
    found = document(asyncio.run(run_demo(out, progress, changes, command)))
    (out / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    return found
