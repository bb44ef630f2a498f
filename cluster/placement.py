"""What the recipe asks for against what the cluster has. Light: the recipe embeds `ClusterSpec`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DATA_CPUS = 1.0
"""Logical CPUs that stay free for Ray Data, so that filters cannot hang behind engines and trainers."""


class PlacementError(ValueError):
    """The cluster can never hold what the recipe asks for. One line, with both numbers."""


class Limits(BaseModel):
    """When work counts as stalled, and how often engines may die. Seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    start_s: float = Field(default=900.0, gt=0)
    """An engine or a trainer that is not ready after this long is given up."""
    first_step_s: float = Field(default=600.0, gt=0)
    """The longest wait for an engine's first step, which may compile."""
    stall_s: float = Field(default=180.0, gt=0)
    """An engine with work that makes no step for this long dumps its stacks and is restarted."""
    canary_s: float = Field(default=60.0, ge=0)
    """How often each engine is asked something whose answer is known; a wrong answer ends it. 0 is never."""
    max_deaths: int = Field(default=40, ge=0)
    """After this many engine deaths in one run the run stops; the same command resumes it."""


class ClusterSpec(BaseModel):
    """How many engines and trainers, on what."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    address: str | None = None
    """Ray cluster to join: "auto", host:port or ray://…; empty starts Ray on this machine (or uses RAY_ADDRESS)."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where engines and trainers run; "auto" takes GPUs where the cluster has any."""
    num_engines: int = Field(default=1, ge=1)
    """Engine actors, each with its own copy of the student."""
    engine_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for each engine actor; on the CPU build also its threads."""
    num_trainers: int = Field(default=1, ge=1)
    """Trainers that may work side by side; each starts with the first job that finds the others busy."""
    trainer_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for each trainer; on a machine without GPUs also its threads."""
    gpus_per_trainer: float = Field(default=1.0, ge=0)
    """GPUs of one trainer; more than one shard the student over them (FSDP2), on one node. Not used on CPUs."""
    limits: Limits = Limits()
    """When work counts as stalled, and how often engines may die."""


def needed_cpus(spec: ClusterSpec) -> float:
    """Logical CPUs for all engines, all trainers and Ray Data side by side."""
    return spec.num_engines * spec.engine_cpus + spec.num_trainers * spec.trainer_cpus + DATA_CPUS


def local_cpus(spec: ClusterSpec) -> int:
    """Logical CPUs of a Ray that is started on this machine: a laptop with two cores still runs engine, trainer and
    filters, in turn."""
    return max(os.cpu_count() or 1, math.ceil(needed_cpus(spec)))


@dataclass(frozen=True)
class Placement:
    """What the cluster can do with the recipe. `gpus_*` are 0 on CPUs; `time_shared`: the engines sleep while a trainer
    works on their GPU."""

    gpus_per_engine: float
    gpus_per_trainer: float
    time_shared: bool


def place(spec: ClusterSpec, tensor_parallel: int, resources: dict[str, float]) -> Placement:
    """Raises `PlacementError` where the cluster can never hold what is asked for."""
    if resources.get("CPU", 0.0) < needed_cpus(spec):
        raise PlacementError(
            f"the recipe needs {needed_cpus(spec):g} CPUs (engines, trainers, {DATA_CPUS:g} for Ray Data), the cluster "
            f"has {resources.get('CPU', 0.0):g}; lower cluster.num_engines, cluster.engine_cpus or cluster.num_trainers"
        )
    gpus = resources.get("GPU", 0.0)
    if spec.device == "cpu" or (spec.device == "auto" and not gpus):
        return Placement(0, 0, time_shared=False)
    if spec.gpus_per_trainer > 1 and spec.gpus_per_trainer % 1:
        raise PlacementError(f"cluster.gpus_per_trainer {spec.gpus_per_trainer:g}: a part of one GPU, or whole ones")
    engines, trainers = spec.num_engines * tensor_parallel, spec.num_trainers * spec.gpus_per_trainer
    if gpus >= engines + trainers:
        return Placement(tensor_parallel, spec.gpus_per_trainer, time_shared=False)
    if gpus == engines == trainers == spec.num_trainers == 1:
        return Placement(0.5, 0.5, time_shared=True)  # halves of one GPU for Ray; each takes its turn at the whole
    remedy = "lower cluster.num_engines or engine.tensor_parallel" if gpus else "set cluster.device: cpu"
    raise PlacementError(
        f"the recipe needs {engines + trainers:g} GPUs ({spec.num_engines} engines x {tensor_parallel}, "
        f"{spec.num_trainers} trainers x {spec.gpus_per_trainer:g}), the cluster has {gpus:g}; {remedy}"
    )
