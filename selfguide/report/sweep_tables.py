"""The tables of a sweep's report, as Markdown and HTML both show them. Cells are plain text, not escaped yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfguide.report.cells import gain, score, signed
from selfguide.report.conclusion import METRIC_TITLES, title

NONE = "–"
STEP_TITLES = {
    "candidates": "candidates", "inputs_accepted": "accepted inputs", "pairs_kept": "kept pairs",
    "rows_trained": "trained rows",
}  # fmt: skip
TESTS_NOTE = (
    "Wins, losses and ties count tasks by the sign of the difference. Surely better or worse: of all tasks at once, "
    "5% chance of a single false one (Holm's correction over the tasks that have the method). Likely: 5% of those "
    "named are false (Benjamini and Hochberg). Each task's p is two-sided and exact, row by row: McNemar's test for "
    "exact match, the permutation of signs for ROUGE-L. The sign test and Wilcoxon's signed-rank test are over tasks, "
    "each counting the same."
)
MEANS_NOTE = (
    "Points from 0 to 100. Every task counts the same, and a method's mean is over the tasks that have it, as counted "
    "beside it; differences are SELF-GUIDE minus the method on the same rows of the same tasks. 95% intervals: 2,000 "
    "resamples of tasks, and of rows within tasks. They say how much other tasks of the same sort would change, and "
    "nothing of another finetuning seed."
)
SECONDS_NOTE = (
    "Stages of many tasks overlap, so their seconds add up to more than the sweep took. Only finished stages count."
)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """`align` has l or r for each column."""

    align: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def method_title(name: str) -> str:
    return title(name).removeprefix("the ")


def metric_title(name: str | None) -> str:
    return METRIC_TITLES[name].removeprefix("the ") if name else "each task's own metric"


def group_title(one: Json) -> str:
    if one["scope"] in ("all", "kind", "test_kind"):
        return f"{(one['kind'] or 'all tasks').capitalize()}, {metric_title(one['metric'])}"
    return one["name"] or "no category"


def methods(one: Json, pairs: Sequence[Json]) -> Table:
    """Methods side by side over one group, with their record of wins and losses where it was counted."""
    mine = {pair["method"]: pair for pair in pairs if all(pair[key] == one[key] for key in ("scope", "kind", "metric"))}
    heads = ["method", "tasks", "mean", "SELF-GUIDE minus", "wins–losses–ties", "surely ±", "likely ±"]
    rows = [_method(method, mine.get(method["method"])) for method in one["methods"]]
    return Table("lrrrrrrrr", [*heads, "sign test p", "Wilcoxon p"], rows)


def _method(method: Json, pair: Json | None) -> list[str]:
    cells = [method_title(method["method"]), count(method["num_tasks"]), score(method["score"])]
    cells.append(gain(method["difference"], NONE))
    if pair is None:
        return [*cells, *[NONE] * 5]
    return [
        *cells, f"{pair['wins']:,}–{pair['losses']:,}–{pair['ties']:,}",
        *(f"{pair[f'{how}_better']:,} / {pair[f'{how}_worse']:,}" for how in ("surely", "likely")),
        *(chance(pair[key]) for key in ("sign_p", "wilcoxon_p")),
    ]  # fmt: skip


def categories(groups: Sequence[Json], scope: str) -> Table:
    """Each category's mean by every method, and the gain over the base."""
    mine = [one for one in groups if one["scope"] == scope]
    names = list(dict.fromkeys(method["method"] for one in mine for method in one["methods"]))
    names.sort(key=lambda name: name == "self_guide")
    heads = ["category", "metric", "tasks", *map(method_title, names), "SELF-GUIDE minus base"]
    return Table("llr" + "r" * (len(names) + 1), heads, [_category(one, names) for one in mine])


def _category(one: Json, names: Sequence[str]) -> list[str]:
    found = {method["method"]: method for method in one["methods"]}
    means = [f"{found[name]['score']['mean']:.1f}" if name in found else NONE for name in names]
    base = found["base"]["difference"] if "base" in found else None
    return [group_title(one), metric_title(one["metric"]), count(one["num_tasks"]), *means, gain(base, NONE)]


def losses(funnel: Json) -> Table:
    rows = [
        [one["stage"], one["reason"], one["state"], count(one["rows"]), count(one["num_tasks"])]
        for one in funnel["losses"]
    ]
    return Table("lllrr", ["stage", "lost to", "as", "rows", "tasks"], rows)


def funnel(one: Json) -> Table:
    rows = [[STEP_TITLES[step["step"]], count(step["rows"]), f"{step['share']:.1%}"] for step in one["steps"]]
    return Table("lrr", ["step", "rows", "share"], rows)


def stages(found: Sequence[Json]) -> Table:
    heads = ["stage", "tasks", "stages", "time", "share", "median", "worst", "worst task", "tokens in", "cached", "out"]
    rows = [
        [
            one["stage"], count(one["num_tasks"]), count(one["num_stages"]), duration(one["seconds"]),
            f"{one['share']:.1%}", duration(one["median_s"]), duration(one["worst_s"]), one["worst_task"],
            *(count(one[f"{key}_tokens"] or None) for key in ("prompt", "cached", "output")),
        ]
        for one in found
    ]  # fmt: skip
    return Table("lrrrrrrlrrr", heads, rows)


def sessions(found: Sequence[Json], totals: Json) -> Table:
    heads = ["began (UTC)", "end", "time", "engines", "done", "failed", "tasks/hour", "rows", "tokens out", "out/s"]
    rows = [_session(one) for one in found]
    if len(found) > 1:
        rows.append(_session({"began": "all", "end": "", **totals}))
    return Table("rl" + "r" * 12, [*heads, "idle", "engine deaths", "stale", "poisoned"], rows)


def _session(one: Json) -> list[str]:
    idle = one["engine_idle_share"]
    return [
        one["began"].replace("T", " ").removesuffix("+00:00"), one["end"], duration(one["seconds"]),
        count(one["num_engines"]) if "num_engines" in one else "",
        count(one["num_done"]), count(one["num_failed"]), decimal(one["tasks_per_hour"]), count(one["rows"]),
        count(one["output_tokens"]), decimal(one["output_tokens_per_s"]), NONE if idle is None else f"{idle:.1%}",
        *(count(one[key]) for key in ("num_engine_deaths", "num_stale", "num_poisoned")),
    ]  # fmt: skip


def failures(found: Iterable[Json], most: int = 3) -> Table:
    rows = [[count(one["num_tasks"]), one["error"], one["reason"] or NONE, _some(one["tasks"], most)] for one in found]
    return Table("rlll", ["tasks", "error", "reason (of the first)", "which"], rows)


def _some(names: Sequence[str], most: int) -> str:
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def invalid(found: Iterable[Json]) -> Table:
    return Table("ll", ["task file", "why it was left out"], [[one["source"], one["reason"]] for one in found])


def extremes(tasks: Sequence[Json], most: int) -> list[tuple[str, Table]]:
    """Tasks of the largest gains and of the largest losses against the base."""
    found = sorted((one for one in tasks if gain_on_base(one) is not None), key=lambda one: -(gain_on_base(one) or 0.0))
    up = [one for one in found if (gain_on_base(one) or 0.0) > 0][:most]
    down = [one for one in reversed(found) if (gain_on_base(one) or 0.0) < 0][:most]
    heads = ["task", "category", "metric", "base", "SELF-GUIDE", "gain", "Holm p"]
    return [
        (name, Table("lllrrrr", heads, list(map(_extreme, some))))
        for name, some in (("gains", up), ("losses", down)) if some
    ]  # fmt: skip


def _extreme(task: Json) -> list[str]:
    metric, test = task["primary_metric"], base_test(task)
    found = {one["method"]: one["scores"][metric]["mean"] for one in task["methods"] if one["scores"][metric]}
    means = [f"{found[name]:.1f}" for name in ("base", "self_guide")]
    category, p = task["category"] or NONE, chance(test["holm_p"] if test else None)
    return [task["task"], category, metric_title(metric), *means, signed(gain_on_base(task) or 0.0), p]


def base_test(task: Json) -> Json | None:
    return next((one for one in task["tests"] if one["method"] == "base"), None)


def gain_on_base(task: Json) -> float | None:
    test = base_test(task)
    return float(test["gain"]) if test else None


# ---- cells


def count(number: float | None) -> str:
    return NONE if number is None else f"{number:,.0f}"


def decimal(number: float | None) -> str:
    return NONE if number is None else f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def chance(p: float | None) -> str:
    return NONE if p is None else f"{p:.0e}" if 0 < p < 0.0005 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """In the two largest units: 12.3 s, 4 min 10 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"
