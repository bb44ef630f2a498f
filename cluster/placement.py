"""What the recipe asks for against what the cluster has. Light: the recipe embeds `ClusterSpec`, and Ray stays out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

DATA_CPUS = 1.0
"""Logical CPUs that stay free for Ray Data, so that filters cannot hang behind engines and trainers."""
MARKET = "ray.io/market-type"
"""The label by which Ray's autoscaler tells preemptible nodes ("spot") from others ("on-demand")."""
NODE_ID = "ray.io/node-id"
_ENGINE_SHARE, _TRAINER_SHARE = 0.6, 0.4
"""What engine and trainer claim of a GPU that they take turns at: Ray then puts no two engines on one."""
_WORD = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"!?{_WORD}|!?in\({_WORD}(, ?{_WORD})*\)")


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
    """After this many engine deaths, and one more for every thousand rows that were answered, the run stops; the same
    command resumes it. Nodes that are lost do not count, nor how many engines share a process."""
    max_crashes: int = Field(default=3, ge=1)
    """A finetuning job whose process has died this often without a new checkpoint between has failed, and its task."""


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
    engine_labels: dict[str, str] = {}
    """Engines run on nodes with these Ray labels only (`ray start --labels`); "!a" and "in(a, b)" are understood."""
    num_trainers: int = Field(default=1, ge=1)
    """Trainers that may work side by side; each starts with the first job that finds the others busy."""
    trainer_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for each trainer; on a machine without GPUs also its threads."""
    trainer_labels: dict[str, str] = {}
    """The same for trainers."""
    gpus_per_trainer: float = Field(default=1.0, ge=0)
    """GPUs of one trainer; more than one shard the student over them (FSDP2), on one node. Not used on CPUs."""
    num_runners: int = Field(default=1, ge=1)
    """Processes that drive the tasks of a sweep: prompts, filters, files."""
    runner_cpus: float = Field(default=0.5, ge=0)
    """CPUs reserved for each of them."""
    tasks_in_flight: int | None = Field(default=None, ge=1)
    """Tasks of a sweep that are under way at once; empty: as many as keep the engines full."""
    spot: Literal["allow", "prefer", "never"] = "allow"
    """Engines on preemptible nodes, those labelled ray.io/market-type=spot. Trainers keep to others where they can."""
    share: Literal["auto", "split", "turns"] = "auto"
    """"split": engines and trainers work side by side. "turns": engines sleep (on CPUs they hold their rows) while
    trainers work for a group of tasks. "auto": turns where one GPU must serve both."""
    turn_tasks: int = Field(default=8, ge=1)
    """Tasks that wait for a trainer before its turn begins, while the engines have work left."""
    limits: Limits = Limits()
    """When work counts as stalled, and how often engines may die."""

    @field_validator("engine_labels", "trainer_labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for key, wanted in labels.items():
            if not _SELECTOR.fullmatch(wanted):
                raise ValueError(f'{key}: {wanted!r} selects no label; write a value, "!value" or "in(a, b)"')
        return labels


@dataclass(frozen=True)
class NodeResources:
    """A node of the cluster: all that it has, whoever uses it now."""

    name: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """What the cluster can do with the recipe. `gpus_*` are what each claims of Ray, 0 on CPUs."""

    gpus_per_engine: float
    gpus_per_trainer: float
    time_shared: bool
    """Engines sleep while trainers work."""
    engine_nodes: tuple[str, ...] = ()
    """The node ids for which the engines' actors were counted, one each; empty where there is one node."""
    trainer_nodes: tuple[str, ...] = ()

    @property
    def on_gpus(self) -> bool:
        return self.gpus_per_engine > 0

    def describe(self, spec: ClusterSpec) -> str:
        """What will happen, in words."""
        engines, trainers = count(spec.num_engines, "engine"), count(spec.num_trainers, "trainer")
        if self.time_shared:
            where = f" on {count(spec.num_engines, 'GPU')}" if self.on_gpus else ""
            means = "sleep" if self.on_gpus else "hold their rows"
            after = f"from {count(spec.turn_tasks, 'waiting task')} on, or once engines are idle"
            said = f"{engines} and {trainers} take turns{where}: engines {means} while trainers work, {after}"
        elif self.on_gpus:
            said = f"{engines} on {self.gpus_per_engine:g} GPU each, {trainers} on {self.gpus_per_trainer:g} GPU each"
        else:
            said = f"{engines} with {spec.engine_cpus:g} CPU each, {trainers} with {spec.trainer_cpus:g} CPU each"
        if num_nodes := len({*self.engine_nodes, *self.trainer_nodes}):
            said += f", on {count(num_nodes, 'node')}"
        wishes = [
            f"{what} where {_in_words(labels)}"
            for what, labels in (("engines", spec.engine_labels), ("trainers", spec.trainer_labels))
            if labels
        ]
        wishes += {"allow": [], "prefer": ["engines on spot nodes first"], "never": ["no engine on spot"]}[spec.spot]
        return "; ".join([said, *wishes])


def needed_cpus(spec: ClusterSpec, per_actor: int = 1) -> float:
    """Logical CPUs for all engines, trainers and runners and Ray Data side by side."""
    return sum(need.count * need.cpus for need in _needs(spec, Placement(0, 0, time_shared=False), per_actor))


def local_cpus(spec: ClusterSpec) -> int:
    """Logical CPUs of a Ray that is started on this machine: a laptop with two cores still runs engine, trainer and
    filters, in turn."""
    return max(os.cpu_count() or 1, math.ceil(needed_cpus(spec)))


def place(spec: ClusterSpec, tensor_parallel: int, nodes: Sequence[NodeResources], per_actor: int = 1) -> Placement:
    """Raises `PlacementError` where these nodes can never hold what is asked for. So many engines share an actor, and
    what it reserves."""
    placement = _choose(spec, tensor_parallel, sum(node.gpus for node in nodes))
    needs = _needs(spec, placement, per_actor)
    for need in needs:
        _check_one(need, nodes)
    _check_totals(spec, tensor_parallel, placement, nodes, per_actor)
    found = _pack(needs, nodes, spread=True) or _pack(needs, nodes, spread=False)
    if found is None:
        each = ", ".join(f"{count(need.count, need.what)} of {need.size}" for need in needs[:2])
        raise PlacementError(
            f"{each} do not fit together: each takes its part of one node, and the largest node "
            f"has {_largest(nodes)}; lower cluster.num_engines or cluster.num_trainers"
        )
    if len(nodes) == 1:
        return placement
    return replace(placement, engine_nodes=found["engine"], trainer_nodes=found["trainer"])


def engine_options(spec: ClusterSpec, placement: Placement, number: int) -> dict[str, Any]:
    """Ray's options for the engines' actor `number`."""
    where = _where(_engine_labels(spec), placement.engine_nodes, number)
    return {"num_cpus": spec.engine_cpus, "num_gpus": placement.gpus_per_engine, **where}


def trainer_options(spec: ClusterSpec, placement: Placement, number: int) -> dict[str, Any]:
    """Ray's options for trainer `number`: CPUs and GPUs are those of its processes together."""
    # A group of processes has no second choice in Ray: tied to one node, it would be lost with it.
    nodes = placement.trainer_nodes if placement.gpus_per_trainer <= 1 else ()
    where = _where(spec.trainer_labels, nodes, number)
    return {"num_cpus": spec.trainer_cpus, "num_gpus": placement.gpus_per_trainer, **where}


def _where(labels: Mapping[str, str], nodes: Sequence[str], number: int) -> dict[str, Any]:
    """The node that was counted on; once that one is lost, any that the recipe allows."""
    if number < len(nodes):
        return {"label_selector": {NODE_ID: nodes[number]}, "fallback_strategy": [{"label_selector": dict(labels)}]}
    return {"label_selector": dict(labels)} if labels else {}


def _engine_labels(spec: ClusterSpec) -> dict[str, str]:
    return ({MARKET: "!spot"} if spec.spot == "never" else {}) | spec.engine_labels


def _choose(spec: ClusterSpec, tensor_parallel: int, gpus: float) -> Placement:
    """CPUs or GPUs, side by side or in turn."""
    if spec.device == "cpu" or (spec.device == "auto" and not gpus):
        return Placement(0, 0, time_shared=spec.share == "turns")
    if not gpus:
        raise PlacementError("cluster.device is gpu, the cluster has 0 GPUs; set cluster.device: cpu")
    if spec.gpus_per_trainer > 1 and spec.gpus_per_trainer % 1:
        raise PlacementError(f"cluster.gpus_per_trainer {spec.gpus_per_trainer:g}: a part of one GPU, or whole ones")
    can_turn = tensor_parallel == 1 and 0 < spec.gpus_per_trainer <= 1 and spec.num_trainers <= spec.num_engines
    if spec.share == "turns" and not can_turn:
        raise PlacementError(
            "cluster.share: turns takes engine.tensor_parallel 1, cluster.gpus_per_trainer of at most 1, and no more "
            "trainers than engines; lower them, or set cluster.share: split"
        )
    if spec.share == "turns" or (spec.share == "auto" and can_turn and gpus == spec.num_engines == 1):
        return Placement(_ENGINE_SHARE, _TRAINER_SHARE, time_shared=True)
    return Placement(tensor_parallel, spec.gpus_per_trainer, time_shared=False)


def count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


# ---- packing


@dataclass(frozen=True)
class _Need:
    """What each of `count` alike takes, all of it on one node."""

    what: str
    count: int
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    prefers: Mapping[str, str] = field(default_factory=dict)
    remedy: str = "lower its share"

    @property
    def size(self) -> str:
        return _size(self.cpus, self.gpus)


def _needs(spec: ClusterSpec, placement: Placement, per_actor: int) -> list[_Need]:
    gpus_per_engine, gpus_per_trainer = placement.gpus_per_engine, placement.gpus_per_trainer
    return [
        _Need(
            "engine", math.ceil(spec.num_engines / per_actor), spec.engine_cpus, gpus_per_engine, _engine_labels(spec),
            {MARKET: "spot"} if spec.spot == "prefer" else {}, "engine.tensor_parallel or cluster.engine_cpus",
        ),
        _Need(
            "trainer", spec.num_trainers, spec.trainer_cpus, gpus_per_trainer, spec.trainer_labels, {MARKET: "!spot"},
            "cluster.gpus_per_trainer or cluster.trainer_cpus",
        ),
        _Need("runner", spec.num_runners, spec.runner_cpus, remedy="cluster.runner_cpus"),
        _Need("run of Ray Data", 1, DATA_CPUS),
    ]  # fmt: skip


@dataclass
class _Room:
    """What is left of a node; of each GPU the free part."""

    node: NodeResources
    cpus: float
    gpus: list[float]

    @classmethod
    def of(cls, node: NodeResources) -> _Room:
        return cls(node, node.cpus, [1.0] * int(node.gpus))

    def holds(self, need: _Need) -> bool:
        """Several GPUs are whole ones, a part is of one."""
        part = min(need.gpus, 1.0)
        free = sum(one >= part for one in self.gpus) >= max(1.0, need.gpus) if need.gpus else True
        return free and self.cpus >= need.cpus and _matches(need.labels, self.node.labels)

    def take(self, need: _Need) -> None:
        self.cpus = round(self.cpus - need.cpus, 4)
        part = min(need.gpus, 1.0)
        for _ in range(math.ceil(need.gpus)):
            fullest = min(one for one in self.gpus if one >= part)
            self.gpus[self.gpus.index(fullest)] = round(fullest - part, 4)


def _pack(needs: Sequence[_Need], nodes: Sequence[NodeResources], *, spread: bool) -> dict[str, tuple[str, ...]] | None:
    """Node ids by what was placed: the pickiest first, then by size. `spread` takes the emptiest node that will do,
    which is kind to its memory, else the fullest, which leaves large holes. None where something found no room."""
    rooms = [_Room.of(node) for node in nodes]
    found: dict[str, tuple[str, ...]] = {}
    for need in sorted(needs, key=lambda one: (sum(_Room.of(node).holds(one) for node in nodes), -one.gpus, -one.cpus)):
        ids = []
        for _ in range(need.count):
            fit = [room for room in rooms if room.holds(need)]
            if not fit:
                return None
            liked = [room for room in fit if _matches(need.prefers, room.node.labels)] or fit
            best = (max if spread else min)(liked, key=lambda room: (sum(room.gpus), room.cpus))
            best.take(need)
            ids.append(best.node.labels.get(NODE_ID, best.node.name))
        found[need.what] = tuple(ids)
    return found


def _check_one(need: _Need, nodes: Sequence[NodeResources]) -> None:
    """One of them, alone in the cluster."""
    allowed = [node for node in nodes if _matches(need.labels, node.labels)]
    if not allowed:
        raise PlacementError(
            f"no node for {need.what}s where {_in_words(need.labels)}; label nodes (ray start --labels), or correct "
            f"cluster.{need.what}_labels" + (" and cluster.spot" if MARKET in need.labels else "")
        )
    if not any(_Room.of(node).holds(need) for node in allowed):
        where = f" where {_in_words(need.labels)}" if need.labels else ""
        raise PlacementError(
            f"one {need.what} needs {need.size} on one node, the largest{where} has {_largest(allowed)}; "
            f"lower {need.remedy}, or join larger nodes"
        )


def _check_totals(
    spec: ClusterSpec, tensor_parallel: int, placement: Placement, nodes: Sequence[NodeResources], per_actor: int
) -> None:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    if cpus < (reserved := needed_cpus(spec, per_actor)):
        raise PlacementError(
            f"the recipe needs {reserved:g} CPUs (engines, trainers, runners, {DATA_CPUS:g} for Ray Data), "
            f"the cluster has {cpus:g}; lower cluster.num_engines, cluster.engine_cpus or cluster.num_trainers"
        )
    engines = math.ceil(spec.num_engines / per_actor) * tensor_parallel
    trainers = spec.num_trainers * spec.gpus_per_trainer
    wanted = 0.0 if not placement.on_gpus else engines if placement.time_shared else engines + trainers
    if gpus < wanted:
        raise PlacementError(
            f"the recipe needs {wanted:g} GPUs ({spec.num_engines} engines x {tensor_parallel}, {spec.num_trainers} "
            f"trainers x {spec.gpus_per_trainer:g}), the cluster has {gpus:g}; "
            "lower cluster.num_engines or engine.tensor_parallel"
        )


def _matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """As Ray matches: a node without the label is none of "a", and one of "!a"."""
    for key, wanted in selector.items():
        values = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").replace(" ", "").split(",")
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True


def _largest(nodes: Sequence[NodeResources]) -> str:
    node = max(nodes, key=lambda one: (one.gpus, one.cpus))
    return _size(node.cpus, node.gpus)


def _size(cpus: float, gpus: float) -> str:
    return (f"{count(gpus, 'GPU')} and " if gpus else "") + count(cpus, "CPU")


def _in_words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key} is {wanted.replace('!', 'not ')}" for key, wanted in labels.items())
