"""Folders of sweeps, as a sweep would leave them: every artifact is made by the store and the comparison itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from selfguide import comparison, config, evaluation, finetuning, synthesis
from selfguide.environment import environment
from selfguide.finetuning import Adapter
from selfguide.records import ACCEPTED, REJECTED, Ledger
from selfguide.store import Artifact, RunStore, TaskStore
from selfguide.taskrun import Student, TaskRun
from selfguide.tasks import Instance, Task

CATEGORIES = {
    "Textual Entailment": "classification", "Cause Effect Classification": "classification",
    "Coreference Resolution": "classification", "Title Generation": "generation", "Data to Text": "generation",
    "Question Rewriting": "generation", "Overlap Extraction": "generation",
}  # fmt: skip
RECIPE = config.Recipe(
    name="paper", model=config.Model(path="org/student"), evaluation=config.Evaluation(bootstrap_samples=100)
)
BEGAN = 1_700_000_000.0
_CURATION = pa.schema([("row", pa.int32()), *((name, pa.string()) for name in ("state", "filter", "reason"))])
_TOKENS = {"prompt_tokens": 10_000, "output_tokens": 1_000, "cached_tokens": 8_000}


def write_sweep(root: Path, num_tasks: int = 30, *, rows: int = 60, seed: int = 0, recipe: Any = RECIPE) -> RunStore:
    """A sweep that was stopped and resumed: of 30 tasks 26 are done, 2 have failed, 2 are waiting."""
    store, rng = RunStore(root), np.random.default_rng(seed)
    listed = [_listed(i) for i in range(num_tasks)]
    outcomes = []
    for i, one in enumerate(listed):
        if i % 30 < 28:
            outcomes.append(_work(store, one, i, rng, rows, recipe))
    facts = {
        "format": 1, "recipe": comparison.recipe_facts(recipe), "tasks": listed, "absent": ["task9999_gone"],
        "invalid": [{"source": "task8888_bad.json", "reason": "no Definition"}],
    }  # fmt: skip
    (root / "sweep").mkdir()
    (root / "sweep" / "sweep.json").write_text(json.dumps(facts))
    write_lines(root / "sweep" / "outcomes.jsonl", outcomes)
    write_lines(root / "sweep" / "events.jsonl", _events(num_tasks, len(outcomes)))
    return store


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _listed(i: int) -> dict[str, Any]:
    category = list(CATEGORIES)[i % len(CATEGORIES)]
    name = f"task{i:04d}_{'_'.join(category.lower().split())}"
    return {
        "task": name, "job": f"{i:016x}", "source": f"{name}.json", "kind": CATEGORIES[category],
        "category": category, "categories": [category], "domains": ["News"], "in_official_test": i % 3 == 0,
    }  # fmt: skip


def _work(
    store: RunStore, listed: Mapping[str, Any], i: int, rng: np.random.Generator, rows: int, recipe: Any
) -> dict[str, Any]:
    """The outcome of one task, its artifacts being written."""
    task, name = store.task(listed["task"]), listed["task"]
    outcome = {"job": listed["job"], "task": name, "recipe": recipe.name, "method": "self_guide", "attempts": 1}
    outcome |= {"began": BEGAN + i, "ended": BEGAN + 10 + i, "error": None, "reason": None, "result": None}
    if i % 10 == 9:
        candidates = _finish(task, "synthesis", {}, [], _rows(3, duplicate=17), synthesis.SCHEMA, **_TOKENS)
        reason = f"{name}: {i} of 20 candidates are left, finetuning.min_rows is 5; lost to duplicate 17"
        stages = {_id(candidates): 1.0}
        return outcome | {"state": "failed", "error": "TaskFailed", "reason": reason, "stages": stages}
    made = write_task(task, listed, i, rng, rows, recipe)
    where = f"tasks/{task.root.name}/{_id(made)}"
    return outcome | {"state": "done", "result": {"comparison": where}, "stages": {_id(made): 1.0}}


def write_task(
    store: TaskStore, listed: Mapping[str, Any], i: int, rng: np.random.Generator, rows: int, recipe: Any
) -> Artifact:
    """All stages of a task, and its comparison by `comparison.record`."""
    run = _task_run(store, listed, rows, recipe)
    common = {"task": run.task.digest, "seed": recipe.seed}
    candidates = _finish(store, "synthesis", common, [], _rows(40, duplicate=8, copy=2), synthesis.SCHEMA, **_TOKENS)
    kept = _finish(store, "curation", common, [candidates], _rows(30, consistency=10), _CURATION)
    lora = {"finetuning": {"method": "lora"}}
    adapter = _finish(store, "finetuning", common | lora, [kept], _rows(29, max_length=1), finetuning.SCHEMA)
    skill = rng.uniform(0.2, 0.8)
    gains = {"base": 0.0, "few_shot_icl": 0.03, "filtered_decoding": 0.05}
    gains |= {"calibrated_labels": 0.08} if run.task.kind == "classification" else {}
    gains |= {"self_guide": rng.normal(0.1, 0.15)}
    evaluations = {
        name: _evaluate(store, run.task.kind, name, np.clip(skill + gain, 0.02, 0.98), rng, rows, adapter)
        for name, gain in gains.items()
    }
    return asyncio.run(comparison.record(run, Adapter(cast(Any, None), (), adapter), evaluations))


def _task_run(store: TaskStore, listed: Mapping[str, Any], rows: int, recipe: Any) -> TaskRun:
    kind = listed["kind"]
    task = Task(
        name=listed["task"], instruction="Say it.", examples=(), kind=kind, labels=(),
        instances=tuple(Instance(f"i-{row}", f"in {row}", ("yes",)) for row in range(rows)),
        labels_from="examples" if kind == "classification" else None, category=listed["category"],
        input_language="English", output_language="English", source=listed["source"], digest=listed["job"] * 4,
        remarks=(),
    )  # fmt: skip
    nothing = cast(Any, None)
    return TaskRun(task, recipe, Student("student", "e" * 64, nothing, False, 512), nothing, nothing, store)


def _evaluate(
    store: TaskStore, kind: str, method: str, skill: float, rng: np.random.Generator, rows: int, adapter: Artifact
) -> Artifact:
    exact = (rng.uniform(size=rows) < skill).astype(float)
    rouge = exact if kind == "classification" else np.round(rng.beta(4 * skill, 4 * (1 - skill), rows), 6)
    table = [
        row | {"exact_match": float(e), "rouge_l": float(r)}
        for row, e, r in zip(_rows(rows, evaluation.SCHEMA.names), exact, rouge, strict=True)
    ]
    proof = {"status": "proven"} if method == "self_guide" else None
    facts = {"proof": proof, "kind": kind, **_TOKENS}
    inputs = [adapter] if proof else []
    return _finish(store, "evaluation", {"method": method, "rows": rows}, inputs, table, evaluation.SCHEMA, **facts)


def _finish(
    store: TaskStore, name: str, made_by: Mapping[str, Any], inputs: Sequence[Artifact], rows: list[dict[str, Any]],
    schema: pa.Schema, **facts: Any,
) -> Artifact:  # fmt: skip
    stage = store.stage(name, made_by, inputs)
    with stage.writing():
        return stage.finish(rows, schema, Ledger.of(rows), **facts)


def _rows(accepted: int, names: Sequence[str] = (), **rejected: int) -> list[dict[str, Any]]:
    """Accepted rows, and by filter so many rejected ones."""
    ends: list[tuple[str, str | None]] = [(ACCEPTED, None)] * accepted
    ends += [(REJECTED, name) for name, count in rejected.items() for _ in range(count)]
    return [
        dict.fromkeys(names) | {"row": row, "state": state, "filter": name, "reason": name}
        for row, (state, name) in enumerate(ends)
    ]


def _id(artifact: Artifact) -> str:
    return f"{artifact.stage}/{artifact.path.name}"


def _events(num_tasks: int, ended: int) -> list[dict[str, Any]]:
    """A session of 60 s that was killed, and one of 40 s that came to the end."""
    return [
        *_session(0.0, num_tasks, ended // 2, 60.0), *_session(ended // 2 + 5.0, num_tasks, ended, 40.0),
        {"time": BEGAN + 1e6, "event": "session_ended", "seconds": 40.0, "stopped": False},
    ]  # fmt: skip


def _session(after: float, num_tasks: int, done: int, seconds: float) -> list[dict[str, Any]]:
    began = {"event": "session_began", "engines": 4, "runners": 2, "trainers": 1, "start_s": 3.5}
    totals = {
        "event": "totals", "tasks": num_tasks, "done": done, "failed": 0, "running": 0, "waiting": num_tasks - done,
        "rows": 500, "output_tokens": 60_000, "prompt_tokens": 600_000, "cached_tokens": 500_000,
        "engine_deaths": 1, "stale": 3, "poisoned": 0, "engine_busy_s": 3 * seconds, "engine_awake_s": 4 * seconds,
        "engine_sequence_s": 100.0, "engine_starved_s": 2.0, "seconds": seconds,
        "driver_rss_bytes": 2**27, "runner_rss_bytes": [2**28, 2**28 + 5],
    }  # fmt: skip
    return [
        {"time": BEGAN + after, **began, "environment": environment()},
        {"time": BEGAN + after + 0.5, **totals},
    ]
