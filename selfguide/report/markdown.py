"""The report for a person: it reads well as Markdown and on a terminal. Text from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfguide.report import cells
from selfguide.report.cells import escape, points, table
from selfguide.report.conclusion import METRIC_TITLES, title
from selfguide.report.replication_markdown import render_replication

NONE = "–"
_ALWAYS_SHOWN = ("exact_match", "rouge_l")
_STEPS = {"candidates": "candidates", "inputs_accepted": "accepted inputs", "pairs_kept": "kept pairs"}
_LABELS_FROM = {
    "task": "declared in the task file", "examples": "read off the examples", "instances": "read off the test answers",
}  # fmt: skip
_SCORES_NOTE = (
    "Points from 0 to 100 over the held-out rows, with 95% bootstrap intervals; differences are paired row by row. "
    "Failed rows count as misses."
)
_UNFINISHED_NOTE = (
    "These were stopped, failed, or are still being made. The same command goes on from the committed rows, and "
    "finetuning from its checkpoint."
)

Json = Mapping[str, Any]


def render(document: Json) -> str:
    """Markdown of the document that `docs/report.md` describes."""
    blocks = ["# SELF-GUIDE report", *_overview(document["tasks"])]
    if document["replication"]:
        blocks += render_replication(document["replication"], document["tasks"])
    for task in document["tasks"]:
        blocks += _task(task)
    return "\n\n".join([*blocks, *_environments(document["environments"])]) + "\n"


def _overview(tasks: Sequence[Json]) -> list[str]:
    """What is there; and where lines can be compared, one row for each."""
    lines = [(task, line) for task in tasks for line in task["lines"]]
    unfinished = sum(len(task["unfinished"]) for task in tasks)
    counts = [_plural(len(tasks), "task"), _plural(len(lines), "comparison"), _plural(unfinished, "unfinished stage")]
    blocks = [", ".join(counts) + "."]
    if len(lines) > 1:
        heads = ["task", "recipe", "seed", "metric", "n", "untuned", "SELF-GUIDE", "difference"]
        blocks.append(table("llrlrrrr", heads, (_overview_row(task, line) for task, line in lines)))
    return blocks


def _overview_row(task: Json, line: Json) -> list[str]:
    row = [escape(task["name"]), escape(line["recipe_name"]), str(line["seed"])]
    metric, scores = line["primary_metric"], {one["method"]: one for one in line["methods"]}
    if metric is None:
        return [*row, "no held-out data", *[NONE] * 4]
    base, ours = scores["base"], scores["self_guide"]
    means = [points(one["scores"][metric]["mean"]) for one in (base, ours)]
    return [*row, _metric(metric), _count(ours["scores"][metric]["n"]), *means, _gain(base, metric)]


# ---- a task


def _task(task: Json) -> list[str]:
    blocks = [f"## {escape(task['name'])}", *_facts(task)]
    for line in task["lines"]:
        blocks += _line(task, line)
    if task["num_outdated_lines"]:
        left_out = _plural(task["num_outdated_lines"], "earlier comparison")
        blocks.append(f"Left out: {left_out} of stages that have been replaced since.")
    by_id = {one["id"]: one for one in task["stages"]}
    used = {name for line in task["lines"] for name in _stage_names(line, by_id)}
    others = {f"`{one['id']}`" + _replaced(one): one for one in task["stages"] if one["id"] not in used}
    if others:
        blocks += ["### Finished stages outside a comparison", _ledger(others), _work(others)]
    if task["unfinished"]:
        blocks += ["### Unfinished stages", _UNFINISHED_NOTE, _unfinished(task["unfinished"])]
    return blocks


def _facts(task: Json) -> list[str]:
    kind = escape(task["kind"] or "kind not recorded").capitalize()
    if task["num_labels"]:
        kind += f", {_plural(task['num_labels'], 'label')} {_LABELS_FROM[task['labels_from']]}"
    facts = [kind]
    if task["num_examples"] is not None:
        facts += [_plural(task["num_examples"], "example"), _plural(task["num_instances"], "held-out instance")]
        facts.append(f"output in {escape(task['output_language'])}")
    remarks = [f"- {escape(remark)}" for remark in task["remarks"]]
    blocks = ["; ".join(facts) + "."] + ["\n".join(["Remarks on the task file:", "", *remarks])] * bool(remarks)
    return blocks + ["Nothing has been compared yet."] * (not task["lines"])


def _line(task: Json, line: Json) -> list[str]:
    stages = {one["id"]: one for one in task["stages"]}
    mine = {_stage_title(line, name, stages): stages[name] for name in _stage_names(line, stages)}
    student = f"{escape(line['student']['name'])} ({line['student']['digest'][:12]})"
    made = f"`{line['id']}`, {line['finished']}; student {student}, {escape(line['engine'])} engine, "
    made += f"{escape(line['protocol'])} protocol, "
    blocks = [f"### Recipe {escape(line['recipe_name'])}, seed {line['seed']}"]
    blocks += [" ".join(map(escape, line["conclusion"])), *(_scores(line) if line["methods"] else [])]
    blocks += [_funnel(line, stages), _ledger(mine), _training(line), _work(mine)]
    if line["task_digest"] != task["lines"][-1]["task_digest"]:
        blocks.append("The task file has changed since: these numbers are of an earlier version.")
    return [*blocks, made + f"environment {line['environment']}, recipe {line['recipe']} (in full in report.json)."]


def _stage_names(line: Json, stages: Mapping[str, Json]) -> list[str]:
    """The student's own stages, then each method's, behind the training of its own that it may have."""
    names = list(line["lineage"].values())
    for method in line["methods"]:
        names += [*stages[method["evaluation"]]["inputs"], method["evaluation"]]
    return list(dict.fromkeys(names))


def _stage_title(line: Json, name: str, stages: Mapping[str, Json]) -> str:
    """Its kind, and whose it is where that is not the tuned student's alone."""
    mine = [one for one in line["methods"] if name in (one["evaluation"], *stages[one["evaluation"]]["inputs"])]
    kind = name.split("/")[0]
    if name in line["lineage"].values():
        return kind
    return f"{kind}: {', '.join(_method(one['method']) for one in mine)}"


def _replaced(stage: Json) -> str:
    return " (made from inputs that were replaced)" if stage["inputs_replaced"] else ""


# ---- a line


def _scores(line: Json) -> list[str]:
    metrics = [metric for metric in METRIC_TITLES if metric in _ALWAYS_SHOWN or line["methods"][-1]["scores"][metric]]
    heads, align = list(map(_metric, metrics)), "r" * len(metrics)
    scores = ([_method(one["method"]), *_score_cells(one, metrics)] for one in line["methods"])
    others = [one for one in line["methods"] if one["method"] != "self_guide"]
    gains = ([_method(one["method"]), *(_gain(one, metric) for metric in metrics)] for one in others)
    return [
        table(f"l{align}rr", ["method", *heads, "n", "failed"], scores),
        table(f"l{align}", ["SELF-GUIDE minus", *heads], gains),
        " ".join([_SCORES_NOTE, *_shared(line["methods"])]),
    ]


def _shared(methods: Sequence[Json]) -> Iterable[str]:
    for name in dict.fromkeys(one["evaluation"] for one in methods):
        same = [escape(title(one["method"])) for one in methods if one["evaluation"] == name]
        if len(same) > 1:
            yield f"The prompts are the same for {' and '.join(same)}: they share one evaluation."


def _method(name: str) -> str:
    return escape(title(name).removeprefix("the "))


def _metric(name: str) -> str:
    return METRIC_TITLES[name].removeprefix("the ")


def _score_cells(method: Json, metrics: Sequence[str]) -> list[str]:
    rows = next(one["n"] for one in method["scores"].values() if one)
    return [*(_score(method["scores"][metric]) for metric in metrics), _count(rows), _count(method["num_failed"])]


def _score(estimate: Json | None) -> str:
    return cells.score(estimate, "unavailable (not English)")


def _gain(method: Json, metric: str) -> str:
    return cells.gain(method["differences"][metric], NONE)


def _funnel(line: Json, stages: Mapping[str, Json]) -> str:
    first, *rest = [f"{_count(one['rows'])} {_STEPS.get(one['step'], 'trained rows')}" for one in line["funnel"]]
    shares = [f" ({one['share']:.0%})" for one in line["funnel"][1:]]
    surplus = stages[line["lineage"]["synthesis"]]["surplus_rows"]
    steps = " → ".join([first, *(step + share for step, share in zip(rest, shares, strict=True))])
    return f"Rows, and shares of the candidates: {steps}." + (
        f" Dropped as surplus while under way: {_count(surplus)}." if surplus else ""
    )


def _ledger(stages: Mapping[str, Json]) -> str:
    heads = ["stage", "rows in", "accepted", "rejected", "failed", "lost to"]
    return table("lrrrrl", heads, ([name, *_ledger_cells(one["ledger"])] for name, one in stages.items()))


def _ledger_cells(ledger: Json) -> list[str]:
    lost = [f"{escape(why)} {_count(rows)}" for side in ("rejected", "failed") for why, rows in ledger[side].items()]
    ends = [_count(sum(ledger[side].values())) for side in ("rejected", "failed")]
    return [_count(ledger["candidates"]), _count(ledger["accepted"]), *ends, ", ".join(lost) or NONE]


def _work(stages: Mapping[str, Json]) -> str:
    heads = ["stage", "seconds", "tokens in", "cached", "tokens out", "out/s", "engine deaths"]
    keys = ("prompt_tokens", "cached_tokens", "output_tokens")
    rows = (
        [
            name,
            f"{one['seconds']:.1f}",
            *(_count(one[key]) for key in keys),
            _rate(one),
            _count(one["num_engine_deaths"]),
        ]
        for name, one in stages.items()
    )
    return table("lrrrrrr", heads, rows)


def _rate(stage: Json) -> str:
    return NONE if stage["output_tokens_per_s"] is None else f"{stage['output_tokens_per_s']:,.0f}"


def _training(line: Json) -> str:
    train, proof = line["finetuning"], line["proof"]
    rank = f" of rank {train['lora_rank']}" if train["lora_rank"] else ""
    said = (
        f"Finetuning ({escape(train['method'])}{rank}): {_plural(train['rows'], 'row')}, "
        f"{_plural(train['epochs'], 'epoch')}, {_plural(train['steps'], 'step')}, {_count(train['tokens'])} tokens "
        f"({_count(train['completion_tokens'])} of answers), loss {_small(train['first_loss'], '.3f')} to "
        f"{_small(train['last_loss'], '.3f')}, {train['train_s']:.1f} s."
    )
    if proof:
        said += (
            f" The adapter in the engine: {escape(proof['status'])}. Mean differences of log-probabilities, in nats a "
            f"token: engine from trainer {_small(proof['engine_difference'])}, trained from untrained "
            f"{_small(proof['training_difference'])}, noise {_small(proof['noise'])}."
        )
    return said


def _unfinished(stages: Sequence[Json]) -> str:
    ends = ["accepted", "rejected", "failed", "lost to"]
    heads = ["stage", "committed rows", *ends, "checkpoint", "engine deaths", "last event"]
    return table("lrrrrlrrl", heads, map(_unfinished_row, stages))


def _unfinished_row(stage: Json) -> list[str]:
    step, deaths = stage["checkpoint_step"], _count(stage["num_engine_deaths"])
    cells = _ledger_cells(stage["ledger"])
    return [f"`{stage['id']}`", *cells, NONE if step is None else f"step {step}", deaths, stage["last_event"] or NONE]


# ---- the rest


def _environments(environments: Sequence[Json]) -> list[str]:
    blocks = ["## Environment"] * bool(environments)
    for one in environments:
        rows = [[escape(key), escape(_plain(value))] for key, value in one.items() if value not in (None, [])]
        blocks.append(table("ll", ["what", "value"], rows))
    return blocks


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plural(count: int, noun: str) -> str:
    return f"{_count(count)} {noun}{'' if count == 1 else 's'}"


def _count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def _small(number: float | None, spec: str = ".3g") -> str:
    return "not finite" if number is None else format(number, spec)
