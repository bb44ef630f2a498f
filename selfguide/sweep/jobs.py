"""The nouns of a sweep: a job, and what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from selfguide.config import Recipe
from selfguide.taskfile import Kind
from selfguide.tasks import LabelsFrom

SELF_GUIDE = "selfguide.methods:sweep_self_guide"

_NO_ROW = {
    "cluster": True,
    "engine": {
        "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_gib", "max_loras", "block_size",
        "tensor_parallel", "per_actor", "tokens_per_s", "faults", "adapter_cache_gib",
    },
    "finetuning": {"simulated_tokens_per_s"},
}  # fmt: skip
"""What changes no row: where it runs, and how fast."""


@dataclass(frozen=True)
class Job:
    """One task under one recipe by one method: what a sweep does once, whatever dies.

    `source` is the task's file, `task_digest` what it said when the sweep began; `student` is the digest of the model's
    files. `method` names a coroutine function,
    "module:function", that takes the `TaskRun` and `options` as keywords and returns JSON values, no rows. `cost` is
    the work that is expected of it, in tokens: the longest begin first.
    """

    source: str
    task: str
    task_digest: str
    recipe: Recipe
    student: str = ""
    method: str = SELF_GUIDE
    kind: Kind | None = None
    labels_from: LabelsFrom | None = None
    cost: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Jobs of equal keys make the same rows. 16 hex digits."""
        recipe = self.recipe.model_dump(mode="json", exclude=_NO_ROW)  # type: ignore[arg-type]
        content = [self.task, self.task_digest, self.student, self.method, self.options, self.labels_from, recipe]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


State = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `stopped`: not its own fault (a full disk, no engine left), so that nobody writes it down.

    `error` is the class of what failed, `reason` one line; a bug leaves its `traceback`. `result` is what the method
    returned. `stages` has the seconds of each "stage/fingerprint" that was made now, not found done. Times are Unix.
    """

    job: str
    task: str
    recipe: str
    method: str
    state: State
    error: str | None = None
    reason: str | None = None
    result: Mapping[str, Any] | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0
    traceback: str | None = None


def outcome_of(fields: Mapping[str, Any]) -> Outcome:
    """Raises `TypeError` where the record is none."""
    known = {name: fields[name] for name in Outcome.__dataclass_fields__ if name in fields}
    return Outcome(**known)
