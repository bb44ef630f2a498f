"""The report as a document: plain JSON values with stable keys, described in `docs/report.md`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import selfguide
from engines.files import AnyPath, is_file, is_folder
from selfguide.errors import UserError
from selfguide.records import Ledger
from selfguide.report.conclusion import METRIC_TITLES, conclude
from selfguide.report.replication import collect_replication
from selfguide.store import TOKEN_COUNTS, Artifact, RunStore, Stage, TaskStore

SCHEMA_VERSION = 1
TRAINED_FROM = ("synthesis", "curation", "finetuning")
"""The stages behind an adapter, in order."""
FUNNEL_STEPS = ("candidates", "inputs_accepted", "pairs_kept", "rows_trained")
_STAGES = (*TRAINED_FROM, "evaluation")
_GENERATION_METRICS = ("authors_rouge_char", "rouge_l", "exact_match")

Artifacts = Mapping[str, Artifact]
"""Finished stages by `stage/fingerprint`."""


def collect(folder: AnyPath) -> dict[str, Any]:
    """Reads every marker of the run folder, and the shards of what is unfinished."""
    store = open_run(folder)
    tasks = [task for task in map(_collect_task, store.tasks()) if task["stages"] or task["unfinished"]]
    replication = collect_replication(folder, tasks)
    if not tasks and not replication:
        raise UserError(f"{folder}: no stage has begun here; start one with: selfguide run TASK --out {folder}")
    lines = [line for task in tasks for line in task["lines"]]
    document = {
        "schema_version": SCHEMA_VERSION, "selfguide": selfguide.__version__, "tasks": tasks,
        "recipes": lift(lines, "recipe"), "environments": lift(lines, "environment"),
        "replication": replication, "sweep": None,
    }  # fmt: skip
    return dict(finite(document))


def open_run(folder: AnyPath) -> RunStore:
    """Raises `UserError` where `folder` is no run folder."""
    if not is_file(folder / "run.json"):
        what = "is no run folder (it has no run.json)" if is_folder(folder) else "there is no such folder"
        raise UserError(f"{folder}: {what}; name the --out folder of a `selfguide run`")
    return RunStore(folder, create=False)


def lift(lines: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Replaces what many lines share by an id, and returns it once."""
    found = {}
    for line in lines:
        content = json.dumps(line[key], sort_keys=True)
        identity = hashlib.sha256(content.encode()).hexdigest()[:12]
        found[identity] = {"id": identity, **line[key]}
        line[key] = identity
    return list(found.values())


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- tasks


def _collect_task(task: TaskStore) -> dict[str, Any]:
    artifacts = {id_of(one): one for one in task.artifacts()}
    intact = {name: one for name, one in artifacts.items() if is_intact(task, artifacts, one)}
    comparisons = [one for one in intact.values() if one.stage == "comparison"]
    num_comparisons = sum(one.stage == "comparison" for one in artifacts.values())
    facts = comparisons[-1].marker["task"] if comparisons else {}
    kinds = [one.marker["kind"] for one in artifacts.values() if one.stage == "evaluation"]
    stages = sorted((one for one in artifacts.values() if one.stage in _STAGES), key=_pipeline_order)
    return {
        "name": facts.get("name", task.root.name),
        "folder": f"tasks/{task.root.name}",
        "kind": facts.get("kind", kinds[-1] if kinds else None),
        **{key: facts.get(key) for key in ("category", "output_language", "labels_from", "num_labels")},
        **{key: facts.get(key) for key in ("num_examples", "num_instances")},
        "remarks": facts.get("remarks", []),
        "lines": [_line(intact, one) for one in comparisons],
        "num_outdated_lines": num_comparisons - len(comparisons),
        "stages": [_stage(one, intact=id_of(one) in intact) for one in stages],
        "unfinished": _unfinished(task),
    }


def id_of(artifact: Artifact) -> str:
    return f"{artifact.stage}/{artifact.path.name}"


def _pipeline_order(artifact: Artifact) -> tuple[int, float]:
    return _STAGES.index(artifact.stage), artifact.marker["finished"]


def is_intact(task: TaskStore, artifacts: Artifacts, one: Artifact) -> bool:
    """Whether its inputs are still those that it was made from: `--force` may have put others in their place.

    A fingerprint covers the inputs' digests, so it is worked out again from what lies there now.
    """
    inputs = [artifacts.get(name) for name in one.marker["inputs"]]
    present = [found for found in inputs if found is not None and is_intact(task, artifacts, found)]
    same = task.stage(one.stage, one.marker["made_by"], present).fingerprint == one.path.name
    return same and len(present) == len(inputs)


# ---- lines


def _line(artifacts: Artifacts, comparison: Artifact) -> dict[str, Any]:
    """One comparison with everything behind it."""
    marker = comparison.marker
    adapter = next(name for name in marker["inputs"] if name.startswith("finetuning/"))
    behind = _ancestors(artifacts, artifacts[adapter])
    methods = methods_of(artifacts, comparison)
    tuned = next((artifacts[one["evaluation"]] for one in methods if one["method"] == "self_guide"), None)
    line = {
        "id": id_of(comparison),
        "finished": moment(marker["finished"]),
        "task_digest": marker["made_by"]["task"],
        "recipe_name": marker["recipe"]["name"],
        "seed": marker["recipe"]["seed"],
        "recipe": {"name": marker["recipe"]["name"], "settings": marker["recipe"]},
        "environment": marker["environment"],
        "engine": marker["recipe"]["engine"]["kind"],
        "protocol": marker["recipe"]["evaluation"]["protocol"],
        "labels_from": marker["task"]["labels_from"],
        "student": {"name": marker["recipe"]["model"]["path"], "digest": marker["made_by"]["model"]},
        "lineage": {stage: id_of(behind[stage]) for stage in TRAINED_FROM},
        "funnel": funnel(behind),
        "finetuning": _finetuning(behind["finetuning"]),
        "proof": _proof(tuned.marker["proof"]) if tuned else None,
        "primary_metric": primary_metric(marker["task"]["kind"], methods),
        "methods": methods,
    }
    return line | {"conclusion": conclude(line)}


def _ancestors(artifacts: Artifacts, one: Artifact) -> dict[str, Artifact]:
    """The artifact itself and all that it was made from, by stage."""
    found = {one.stage: one}
    for name in one.marker["inputs"]:
        found |= _ancestors(artifacts, artifacts[name])
    return found


def funnel(behind: Artifacts) -> list[dict[str, Any]]:
    """From candidates to trained rows; each step's rows are the next one's candidates."""
    ledgers = [behind[stage].marker["ledger"] for stage in TRAINED_FROM]
    counts = [ledgers[0]["candidates"], *(ledger["accepted"] for ledger in ledgers)]
    whole = max(counts[0], 1)
    return [
        {"step": step, "rows": rows, "share": round(rows / whole, 4)}
        for step, rows in zip(FUNNEL_STEPS, counts, strict=True)
    ]


def _finetuning(artifact: Artifact) -> dict[str, Any]:
    train, config = artifact.marker["train"], artifact.marker["made_by"]["finetuning"]
    losses = [step["loss"] for step in train["loss_curve"]] or [None]
    return {
        "method": config["method"],
        "lora_rank": config["lora_rank"] if config["method"] == "lora" else None,
        **{key: train[key] for key in ("rows", "steps", "epochs", "tokens", "completion_tokens")},
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "train_s": round(train["train_s"], 3),
    }


def _proof(proof: Mapping[str, Any]) -> dict[str, Any]:
    return {key: proof[key] for key in ("status", "engine_difference", "training_difference", "noise")}


def methods_of(artifacts: Artifacts, comparison: Artifact) -> list[dict[str, Any]]:
    """In the order in which they were compared, the tuned student last."""
    found: dict[str, dict[str, Any]] = {}
    for row in comparison.rows():
        evaluation = f"evaluation/{row['evaluation']}"
        ledger = artifacts[evaluation].marker["ledger"]
        blank = {"method": row["method"], "evaluation": evaluation, "num_failed": sum(ledger["failed"].values())}
        entry = found.setdefault(row["method"], {**blank, "scores": {}, "differences": {}})
        bounds = (row["score"], row["low"], row["high"])
        entry["scores"][row["metric"]] = _estimate(row["n"], *bounds)
        bounds = (row["difference"], row["difference_low"], row["difference_high"])
        entry["differences"][row["metric"]] = _estimate(row["n"], *bounds)
    return list(found.values())


def _estimate(n: int, mean: float | None, low: float | None, high: float | None) -> dict[str, Any] | None:
    return None if mean is None else {"mean": mean, "low": low, "high": high, "n": n}


def primary_metric(kind: str, methods: Sequence[Mapping[str, Any]]) -> str | None:
    """As published: exact match for classification, ROUGE-L for generation where available; the authors' own of these
    under their protocol, which alone computes them."""
    order = ("authors_em", "exact_match") if kind == "classification" else _GENERATION_METRICS
    return next((metric for metric in order if methods and methods[-1]["scores"][metric]), None)


# ---- stages


def _stage(artifact: Artifact, *, intact: bool) -> dict[str, Any]:
    marker = artifact.marker
    stage = Stage(artifact.stage, artifact.path, {}, [])
    seconds, output_tokens = marker["seconds"], marker.get("output_tokens")
    scores = marker.get("scores", {})
    return {
        "id": id_of(artifact),
        "stage": artifact.stage,
        "inputs": marker["inputs"],
        "inputs_replaced": not intact,
        "finished": moment(marker["finished"]),
        "seconds": seconds,
        "ledger": marker["ledger"],
        **{key: marker.get(key) for key in TOKEN_COUNTS},
        "output_tokens_per_s": round(output_tokens / seconds, 1) if output_tokens is not None and seconds else None,
        "num_engine_deaths": _count_deaths(stage.events()),
        "surplus_rows": marker.get("surplus"),
        "scores": {key: scores.get(key) for key in METRIC_TITLES} if scores else None,
    }


def _unfinished(task: TaskStore) -> list[dict[str, Any]]:
    """Stages with a work folder and no marker: stopped, failed, or still being made."""
    folders = [path.parent for path in sorted(task.root.glob("*/*/work")) if "." not in path.parent.name]
    return [_unfinished_stage(path) for path in folders if not (path / "done.json").is_file()]


def _unfinished_stage(path: AnyPath) -> dict[str, Any]:
    stage = Stage(path.parent.name, path, {}, [])
    events, rows = stage.events(), stage.committed()
    checkpoints = stage.work.glob("trainer/checkpoint-*/trainer_state.json")  # the last file that one gets
    return {
        "id": f"{stage.name}/{stage.fingerprint}",
        "stage": stage.name,
        "last_event": moment(events[-1]["time"]) if events else None,
        "num_committed_rows": len(rows),
        "ledger": Ledger.of(rows).as_dict(),
        **stage.tokens(),
        "num_engine_deaths": _count_deaths(events),
        "checkpoint_step": max((int(one.parent.name.split("-")[1]) for one in checkpoints), default=None),
    }


def _count_deaths(events: Sequence[Mapping[str, Any]]) -> int:
    """A death leaves one event for each call that was in flight; processes count an engine's lives from 1 again."""
    process, deaths = 0, set[tuple[int, str, int]]()
    for event in events:
        process += event["event"] == "begin"
        if event["event"] == "engine_died":
            deaths.add((process, event["engine"], event["life"]))
    return len(deaths)


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
