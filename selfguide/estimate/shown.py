"""The plans of a run, of one task or of many, for a person and as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from engines.files import AnyPath
from selfguide.estimate.assumed import Assumptions
from selfguide.estimate.plan import Plan
from selfguide.sizes import existing, readable_bytes
from selfguide.tables import make_table, show
from selfguide.text import printable

UNKNOWN = "unknown until measured"
_LEGEND = (
    "≤ at most, ~ expected from {source}. Stages that are done show what they took. Starting the engines is not "
    "counted."
)
_NOTHING = "Nothing is left to do: the run would only show its report."
_ABSENT = (
    "it is not on this machine: prompts are plain text, {chars:g} characters make a token (chars_per_token), the "
    "context is {context:,} tokens (context)"
)
_UNASSUMED = " --assume defaults reckons what is unknown from assumptions, and names them."


@dataclass(frozen=True)
class Estimate:
    """One task's stages, what was assumed to reckon them, and the student's name where it is not on this machine."""

    task: str
    plans: list[Plan]
    assumed: Assumptions | None = None
    absent: str | None = None

    @property
    def left(self) -> list[Plan]:
        return [plan for plan in self.plans if plan.status != "done"]


def document(estimate: Estimate, out: AnyPath) -> dict[str, Any]:
    """Every number of every stage, and the sums over what is left."""
    return {
        "out": str(out), "stages": [asdict(plan) for plan in estimate.plans],
        "left": {**_sums(estimate.left), "free_bytes": _free(out)}, **_assumed(estimate),
    }  # fmt: skip


def document_tasks(estimates: Sequence[Estimate], out: AnyPath) -> dict[str, Any]:
    """The same of each task, and the sums over all."""
    tasks = [
        {"task": one.task, "stages": [asdict(plan) for plan in one.plans], "left": _sums(one.left)} for one in estimates
    ]
    left = [plan for one in estimates for plan in one.left]
    return {
        "out": str(out),
        "tasks": tasks,
        "left": {**_sums(left), "free_bytes": _free(out)},
        **_assumed(estimates[0]),
    }


def _assumed(estimate: Estimate) -> dict[str, Any]:
    return {"assumed": estimate.assumed and estimate.assumed.as_dict(), "absent_student": estimate.absent}


def _sums(left: Sequence[Plan]) -> dict[str, Any]:
    """Over plans; None where one of them does not know. Stages and tasks come one after another."""
    trained = [plan for plan in left if plan.stage.startswith("finetuning")]
    asked = [plan for plan in left if plan.stage.startswith(("synthesis", "evaluation"))]
    gpu_seconds = _sum(plan.gpu_seconds for plan in left)
    return {
        "prompt_tokens": _sum(plan.tokens_in for plan in asked),
        "most_prompt_tokens": sum(plan.most_tokens_in for plan in asked),
        "output_tokens": _sum(plan.tokens_out for plan in asked),
        "most_output_tokens": sum(plan.most_tokens_out for plan in asked),
        "trained_tokens": _sum(plan.tokens_in for plan in trained),
        "most_trained_tokens": sum(plan.most_tokens_in for plan in trained),
        "seconds": _sum(plan.seconds for plan in left),
        "gpu_hours": None if gpu_seconds is None else round(gpu_seconds / 3600, 3),
        "disk_bytes": needed_bytes(left),
    }  # fmt: skip


def _sum(numbers: Any) -> Any:
    found = list(numbers)
    return None if None in found else round(sum(found), 1)


def needed_bytes(plans: Sequence[Plan]) -> int:
    """Bytes at the worst moment: all that stays, and the largest of what lies there for a while."""
    left = [plan for plan in plans if plan.status != "done"]
    return sum(plan.disk_bytes for plan in left) + max((plan.peak_bytes for plan in left), default=0)


# ---- for a person


def show_plans(estimate: Estimate, out: AnyPath) -> None:
    """A table, what is to be said of its lines, and the sums."""
    heads = ("stage", "status", "rows", "tokens in", "tokens out", "disk", "time")
    notes = [f"{plan.stage}: {note}" for plan in estimate.plans for note in plan.notes]
    remarks = [Text("\n".join(map(printable, notes)))] if notes else []
    sums = document(estimate, out)["left"]
    left = f"Left to do: {_time_left(sums, estimate)}; {_disk(sums, out)}." if estimate.left else _NOTHING
    show(make_table(heads, map(_cells, estimate.plans)), *remarks, *_legend(estimate), left)


def show_tasks(estimates: Sequence[Estimate], out: AnyPath) -> None:
    """A line for each task with what is left of it, the sum, and what was assumed."""
    heads = ("task", "test rows", "prompt tokens", "output tokens", "trained tokens", "disk", "GPU hours")
    sums = document_tasks(estimates, out)["left"]
    rows = [[one.task, _test_rows(one), *_sum_cells(one.left)] for one in estimates]
    every = [plan for one in estimates for plan in one.left]
    rows.append([f"{len(estimates)} tasks", sum(map(_test_rows, estimates)), *_sum_cells(every)])
    some = any(one.left for one in estimates)
    left = f"Left to do, one task after another: {_time_left(sums, estimates[0])}; {_disk(sums, out)}."
    show(make_table(heads, rows), *_legend(estimates[0]), left if some else _NOTHING)


def _sum_cells(left: Sequence[Plan]) -> list[str]:
    sums = _sums(left)
    tokens = [_amount(sums[f"{kind}_tokens"], sums[f"most_{kind}_tokens"]) for kind in ("prompt", "output", "trained")]
    hours = "" if not any(tokens) else UNKNOWN if sums["gpu_hours"] is None else f"{sums['gpu_hours']:.2f}"
    return [*tokens, _bytes(sum(plan.disk_bytes for plan in left), max((p.peak_bytes for p in left), default=0)), hours]


def _bytes(stays: int, goes: int) -> str:
    return readable_bytes(stays) + (f" (+{readable_bytes(goes)} while it works)" if goes else "")


def _test_rows(estimate: Estimate) -> int:
    """Of the base's evaluation, which every task with held-out data has."""
    found = [plan for plan in estimate.plans if plan.stage.startswith("evaluation")][:1]
    return sum(plan.rows_done + (plan.most_rows if plan.status != "done" else 0) for plan in found)


def _legend(estimate: Estimate) -> list[str | Text]:
    if estimate.assumed:
        said = [Text(printable(line)) for line in _assumptions(estimate)]
        return [_LEGEND.format(source="what the run folder holds, else as assumed"), Text("\n").join(said)]
    unknown = any(plan.seconds is None for plan in estimate.left)
    return [_LEGEND.format(source="what the run folder holds") + (_UNASSUMED if unknown else "")]


def _assumptions(estimate: Estimate) -> list[str]:
    """Every assumed number, by the name that `--assume` takes."""
    one = estimate.assumed
    assert one is not None
    assert one.params is not None
    absent = _ABSENT.format(chars=one.chars_per_token, context=one.context)
    said = [f"{estimate.absent} of {one.params / 1e9:.3g} billion parameters (params); {absent}"] * bool(
        estimate.absent
    )
    said += [
        f"one GPU takes {one.prompt_tokens_per_s:,.0f} prompt tokens a second (prompt_tokens_per_s), writes "
        f"{one.output_tokens_per_s:,.0f} (output_tokens_per_s) and trains on {one.train_tokens_per_s:,.0f} "
        "(train_tokens_per_s)",
        f"the student writes {one.answer_length:g} times as much as the gold examples (answer_length)",
        f"{one.kept_share:.0%} of the candidates are kept, where no target ends synthesis (kept_share)",
    ]
    return ["Assumed where nothing was measured; --assume NAME=VALUE changes it:", *(f"- {one}" for one in said)]


def _time_left(sums: dict[str, Any], estimate: Estimate) -> str:
    if sums["seconds"] is None:
        return f"time {UNKNOWN}"
    hours = f", {sums['gpu_hours']:.2f} GPU hours" if estimate.assumed else ""
    return f"time {readable_seconds(sums['seconds'])}{hours}"


def _disk(sums: dict[str, Any], out: AnyPath) -> str:
    needed, free = sums["disk_bytes"], sums["free_bytes"]
    said = f"disk {readable_bytes(needed)} at most, {readable_bytes(free)} free for {out}"
    return said + (": too little" if needed > free else "")


def _cells(plan: Plan) -> list[str]:
    committed = plan.status == "unfinished" and plan.rows_done
    status = f"{plan.status}, {plan.rows_done:,} rows committed" if committed else plan.status
    rows = f"{plan.rows_done:,}" if plan.status == "done" else _amount(plan.rows, plan.most_rows)
    tokens_in = _amount(plan.tokens_in, plan.most_tokens_in)
    tokens_out = _amount(plan.tokens_out, plan.most_tokens_out)
    return [plan.stage, status, rows, tokens_in, tokens_out, _bytes(plan.disk_bytes, plan.peak_bytes), _time(plan)]


def _amount(expected: float | None, most: int) -> str:
    if not most:
        return ""
    if expected is None:
        return f"≤ {most:,}"
    return f"{expected:,}" if expected == most else f"~ {expected:,} (≤ {most:,})"


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return UNKNOWN
    bounded = plan.status != "done" and plan.rows is None
    return ("≤ " if bounded and plan.seconds >= 1 else "") + readable_seconds(plan.seconds)


def readable_seconds(seconds: float) -> str:
    """4 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _free(out: AnyPath) -> int:
    return shutil.disk_usage(existing(out)).free
