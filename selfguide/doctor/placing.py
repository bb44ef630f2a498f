"""Whether Ray works, whether its cluster answers, and what would be placed where."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cluster.placement import NODE_ID, NodeResources, Placement, PlacementError, count, local_cpus, needed_cpus, place
from selfguide.doctor.case import Case, Finding
from selfguide.doctor.machine import version
from selfguide.sizes import existing

_WAIT_S = 20.0
_NODE_GROUP = "ray.io/node-group"
"""The label that Ray's autoscaler gives to its nodes."""


def check_ray(case: Case) -> Iterator[Finding]:
    """Ray is imported, and a cluster with an address is joined for a moment, in a process of its own."""
    if case.ray is None:
        remedy = "start it there (ray start --head), correct cluster.address, or leave it empty to start Ray here"
        yield Finding("ray", "error", f"nothing listens at {case.address}", remedy)
        return
    yield from _check_home()
    try:
        nodes = [NodeResources(**node) for node in case.ray.answer(_WAIT_S)]
    except RuntimeError as error:
        what = f"no cluster at {case.address}" if case.address else "cannot be used"
        remedy = "correct cluster.address, or start Ray there" if case.address else "install it again (make install)"
        yield Finding("ray", "error", f"{what}: {error}", remedy)
        return
    if not case.address:
        case.nodes = [NodeResources("this machine", local_cpus(case.recipe.cluster), len(case.gpus))]
        yield Finding("ray", "ok", f"{version('ray')}, started on this machine for each run")
        return
    case.nodes = nodes
    scales = ", which an autoscaler may add to" if any(_NODE_GROUP in node.labels for node in nodes) else ""
    yield Finding(
        "ray", "ok", f"{version('ray')}, the cluster at {case.address} has {count(len(nodes), 'node')}{scales}"
    )
    yield from (Finding("nodes", "ok", line) for line in _describe(nodes))


def _describe(nodes: list[NodeResources]) -> Iterator[str]:
    """Nodes of a kind in one line, whatever their number."""
    kinds = Counter(
        (one.cpus, one.gpus, tuple(sorted(one.labels.items() - {(NODE_ID, one.labels.get(NODE_ID))}))) for one in nodes
    )
    for (cpus, gpus, labels), number in kinds.items():
        said = ", ".join(f"{key}={value}" for key, value in labels)
        yield f"{number} with {count(cpus, 'CPU')} and {count(gpus, 'GPU')}" + (f", {said}" if said else "")


def _check_home() -> Iterator[Finding]:
    """Ray writes the token by which its processes know each other into the home folder."""
    home = existing(Path.home())
    needed = os.environ.get("RAY_AUTH_MODE") != "disabled" and not os.environ.get("RAY_AUTH_TOKEN")
    if needed and not (home / ".ray" / "auth_token").is_file() and not os.access(home, os.W_OK):
        found = f"{home} cannot be written to, and Ray keeps its token there"
        yield Finding("home folder", "error", found, "set HOME to another folder, or RAY_AUTH_MODE=disabled")


def check_placement(case: Case) -> Iterator[Finding]:
    """What a run would do with the nodes that run now."""
    if case.nodes is None:
        return
    recipe = case.recipe
    try:
        placement = place(recipe.cluster, recipe.engine.tensor_parallel, case.nodes, recipe.engine.num_per_actor)
    except PlacementError as error:
        yield Finding("placement", "error", str(error))
        return
    if case.address:
        cpus = sum(node.cpus for node in case.nodes)
        needed = needed_cpus(recipe.cluster, recipe.engine.num_per_actor)
        yield Finding("needs", "ok", f"{needed:g} of {cpus:g} CPUs for engines, trainers and runners")
    yield Finding("placement", "ok", placement.describe(recipe.cluster))
    if placement.on_gpus and not placement.time_shared:
        yield from _check_ratio(case, placement, sum(node.gpus for node in case.nodes))


def _check_ratio(case: Case, placement: Placement, gpus: float) -> Iterator[Finding]:
    """Synthesis and evaluation take most of the time: GPUs belong to engines."""
    cluster = case.recipe.cluster
    engines, trainers = (
        cluster.num_engines * placement.gpus_per_engine,
        cluster.num_trainers * placement.gpus_per_trainer,
    )
    more = int((gpus - engines - trainers) // placement.gpus_per_engine)
    if more:
        remedy = f"--set cluster.num_engines={cluster.num_engines + more}"
        yield Finding("ratio", "warning", f"{gpus - engines - trainers:g} of {gpus:g} GPUs have nothing to do", remedy)
    elif trainers > engines:
        found = f"trainers take {trainers:g} GPUs, engines {engines:g}: most tasks will wait for engines"
        yield Finding("ratio", "warning", found, "lower cluster.num_trainers for more cluster.num_engines")
