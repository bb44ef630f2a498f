"""What a sweep cost and lost: the funnel, seconds and tokens of each stage, the sessions, the failures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from selfguide.report.collect import FUNNEL_STEPS, TRAINED_FROM, funnel, moment
from selfguide.report.sweep_reading import Sweep, SweptTask
from selfguide.store import TOKEN_COUNTS, Artifact

STAGES = (*TRAINED_FROM, "evaluation", "comparison")
_ADDED = (
    "rows",
    *TOKEN_COUNTS,
    "engine_deaths",
    "stale",
    "poisoned",
    "engine_busy_s",
    "engine_awake_s",
    "engine_starved_s",
)
"""What sessions count from zero, so that several of them add up."""

Json = Mapping[str, Any]

# ---- the funnel


def lineage(task: SweptTask) -> dict[str, Artifact]:
    """The stages behind the tuned student, by stage, as far as the task came; few-shot SFT's own training is none."""
    found: dict[str, Artifact] = {}
    for artifact in task.stages.values():
        if artifact.stage in TRAINED_FROM and (artifact.stage == "synthesis" or artifact.marker["inputs"]):
            found[artifact.stage] = artifact
    return found


def sum_funnel(tasks: Sequence[SweptTask]) -> dict[str, Any]:
    """Over the tasks that came to the end, so that each step has the rows of the same tasks; the failed apart."""
    done = [behind for task in tasks if task.comparison and len(behind := lineage(task)) == len(TRAINED_FROM)]
    counts: Counter[str] = Counter()
    losses: dict[tuple[str, str, str], list[int]] = {}
    for behind in done:
        counts.update({step["step"]: step["rows"] for step in funnel(behind)})
        for stage in TRAINED_FROM:
            ledger = behind[stage].marker["ledger"]
            for state in ("rejected", "failed"):
                for reason, rows in ledger[state].items():
                    losses.setdefault((stage, state, reason), []).append(rows)
    whole = max(counts["candidates"], 1)
    steps = [{"step": step, "rows": counts[step], "share": round(counts[step] / whole, 4)} for step in FUNNEL_STEPS]
    lost = [
        {"stage": stage, "state": state, "reason": reason, "rows": sum(rows), "num_tasks": len(rows)}
        for (stage, state, reason), rows in losses.items()
    ]
    order = {stage: at for at, stage in enumerate(TRAINED_FROM)}
    lost.sort(key=lambda one: (order[str(one["stage"])], -int(str(one["rows"]))))
    return {"num_tasks": len(done), "steps": steps, "losses": lost}


def rows_by_step(task: SweptTask) -> dict[str, int | None]:
    """One task's funnel; None for steps that it has not come to."""
    behind = lineage(task)
    ledgers = [behind[stage].marker["ledger"] if stage in behind else None for stage in TRAINED_FROM]
    ends = [ledger and ledger["accepted"] for ledger in ledgers]
    return dict(zip(FUNNEL_STEPS, [ledgers[0] and ledgers[0]["candidates"], *ends], strict=True))


# ---- stages


def seconds_by_stage(task: SweptTask) -> dict[str, float]:
    found = dict.fromkeys(STAGES, 0.0)
    for one in task.stages.values():
        found[one.stage] = round(found.get(one.stage, 0.0) + one.marker["seconds"], 3)
    return found


def sum_tokens(artifacts: Iterable[Artifact]) -> dict[str, int]:
    total = dict.fromkeys(TOKEN_COUNTS, 0)
    for one in artifacts:
        for key in TOKEN_COUNTS:
            total[key] += one.marker.get(key) or 0
    return total


def sum_stages(tasks: Sequence[SweptTask]) -> list[dict[str, Any]]:
    """Of all finished stages; a task's stages of one kind (its evaluations, say) count together."""
    spent = {task.job: seconds_by_stage(task) for task in tasks if task.stages}
    names = {task.job: task.name for task in tasks}
    whole = sum(sum(one.values()) for one in spent.values()) or 1.0
    found = []
    for stage in STAGES:
        mine = [one for task in tasks for one in task.stages.values() if one.stage == stage]
        jobs = [task.job for task in tasks if any(one.stage == stage for one in task.stages.values())]
        if mine:
            seconds = {job: spent[job][stage] for job in jobs}
            worst, total = max(seconds, key=lambda job: seconds[job]), sum(seconds.values())
            found.append({
                "stage": stage, "num_tasks": len(jobs), "num_stages": len(mine),
                "seconds": round(total, 3), "share": round(total / whole, 4),
                "median_s": round(median(seconds.values()), 3), "worst_s": seconds[worst],
                "worst_task": names[worst], **sum_tokens(mine),
            })  # fmt: skip
    return found


# ---- sessions


def split_sessions(sweep: Sweep) -> list[dict[str, Any]]:
    """One for each time that the sweep was started, from its events and the outcomes that fell into it."""
    parts: list[list[Json]] = []
    for event in sweep.events:
        if event["event"] == "session_began":
            parts.append([])
        if parts:
            parts[-1].append(event)
    starts = [*(part[0]["time"] for part in parts), float("inf")]
    return [_session(part, until, sweep) for part, until in zip(parts, starts[1:], strict=True)]


def _session(events: Sequence[Json], until: float, sweep: Sweep) -> dict[str, Any]:
    began, last = events[0], events[-1]
    totals = [one for one in events if one["event"] == "totals"]
    ended = next((one for one in events if one["event"] == "session_ended"), None)
    final: Json = totals[-1] if totals else {}
    seconds = ended["seconds"] if ended else final.get("seconds", last["time"] - began["time"])
    states = Counter(
        one["state"]
        for lines in sweep.outcomes.values()
        for one in lines
        if began["time"] <= one.get("ended", 0.0) < until
    )
    memory = [max([0, *(one.get("runner_rss_bytes") or ())]) for one in totals]
    return {
        "began": moment(began["time"]), "environment": began.get("environment") or {},
        "end": "none recorded" if ended is None else "stopped" if ended["stopped"] else "whole",
        **{f"num_{key}": began.get(key) for key in ("engines", "runners", "trainers")},
        "start_s": began.get("start_s"),
        **_rates(seconds, states["done"], states["failed"], {key: final.get(key) or 0 for key in _ADDED}),
        "driver_rss_bytes": max((one.get("driver_rss_bytes") or 0 for one in totals), default=0) or None,
        "runner_rss_bytes": max(memory, default=0) or None,
    }  # fmt: skip


def _rates(seconds: float, done: int, failed: int, added: Mapping[str, float]) -> dict[str, Any]:
    hours, awake = seconds / 3600, added["engine_awake_s"]
    idle = max(0.0, 1 - added["engine_busy_s"] / awake) if awake else None
    return {
        "seconds": round(seconds, 3), "num_done": done, "num_failed": failed,
        "tasks_per_hour": round(done / hours, 2) if hours else None,
        **{key: added[key] for key in ("rows", *TOKEN_COUNTS)},
        "output_tokens_per_s": round(added["output_tokens"] / seconds, 1) if seconds else None,
        "num_engine_deaths": added["engine_deaths"], "num_stale": added["stale"], "num_poisoned": added["poisoned"],
        "engine_busy_s": round(added["engine_busy_s"], 3), "engine_awake_s": round(awake, 3),
        "engine_idle_share": None if idle is None else round(idle, 4),
        "engine_starved_s": round(added["engine_starved_s"], 3),
    }  # fmt: skip


def sum_sessions(sessions: Sequence[Json]) -> dict[str, Any]:
    named = {"engine_deaths": "num_engine_deaths", "stale": "num_stale", "poisoned": "num_poisoned"}
    added = {key: sum(one[named.get(key, key)] for one in sessions) for key in _ADDED}
    done, failed = (sum(one[key] for one in sessions) for key in ("num_done", "num_failed"))
    seconds = sum(one["seconds"] for one in sessions)
    return {"num_sessions": len(sessions), **_rates(seconds, done, failed, added)}


# ---- failures


def sum_failures(tasks: Sequence[SweptTask]) -> list[dict[str, Any]]:
    """Failed tasks by their error and its reason, numbers aside; the most frequent first."""
    found: dict[tuple[str, str], list[SweptTask]] = {}
    for task in tasks:
        if task.state == "failed":
            bare = (task.reason or "").removeprefix(f"{task.name}: ")
            found.setdefault((task.error or "unknown", re.sub(r"\d+(\.\d+)?", "#", bare)), []).append(task)
    return [
        {"error": error, "reason": mine[0].reason, "num_tasks": len(mine), "tasks": [task.name for task in mine]}
        for (error, _), mine in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
