"""Whether Ray works, whether its cluster answers, and what would be placed where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cluster.placement import Placement, PlacementError, local_cpus, place
from selfguide.doctor.case import Case, Finding
from selfguide.doctor.machine import version
from selfguide.sizes import existing

_WAIT_S = 20.0


def check_ray(case: Case) -> Iterator[Finding]:
    """Ray is imported, and a cluster with an address is joined for a moment, in a process of its own."""
    if case.ray is None:
        remedy = "start it there (ray start --head), correct cluster.address, or leave it empty to start Ray here"
        yield Finding("ray", "error", f"nothing listens at {case.address}", remedy)
        return
    yield from _check_home()
    try:
        resources = case.ray.answer(_WAIT_S)
    except RuntimeError as error:
        what = f"no cluster at {case.address}" if case.address else "cannot be used"
        remedy = "correct cluster.address, or start Ray there" if case.address else "install it again (make install)"
        yield Finding("ray", "error", f"{what}: {error}", remedy)
        return
    if case.address:
        case.resources = resources
        have = ", ".join(f"{resources[name]:g} {name}s" for name in ("CPU", "GPU") if name in resources)
        yield Finding("ray", "ok", f"{version('ray')}, the cluster at {case.address} has {have}")
    else:
        case.resources = {"CPU": local_cpus(case.recipe.cluster), "GPU": float(len(case.gpus))}
        yield Finding("ray", "ok", f"{version('ray')}, started on this machine for each run")


def _check_home() -> Iterator[Finding]:
    """Ray writes the token by which its processes know each other into the home folder."""
    home = existing(Path.home())
    needed = os.environ.get("RAY_AUTH_MODE") != "disabled" and not os.environ.get("RAY_AUTH_TOKEN")
    if needed and not (home / ".ray" / "auth_token").is_file() and not os.access(home, os.W_OK):
        found = f"{home} cannot be written to, and Ray keeps its token there"
        yield Finding("home folder", "error", found, "set HOME to another folder, or RAY_AUTH_MODE=disabled")


def check_placement(case: Case) -> Iterator[Finding]:
    """What a run would do with the resources that are there."""
    if case.resources is None:
        return
    recipe = case.recipe
    try:
        placement = place(recipe.cluster, recipe.engine.tensor_parallel, case.resources)
    except PlacementError as error:
        yield Finding("placement", "error", str(error))
        return
    yield Finding("placement", "ok", _describe(case, placement))


def _describe(case: Case, placement: Placement) -> str:
    cluster = case.recipe.cluster
    engines = f"{cluster.num_engines} engine{'s' if cluster.num_engines > 1 else ''}"
    trainers = f"{cluster.num_trainers} trainer{'s' if cluster.num_trainers > 1 else ''}"
    if placement.time_shared:
        return f"{engines} and the trainer take turns on one GPU: the engine sleeps while the trainer works"
    if placement.gpus_per_engine:
        each = f"{placement.gpus_per_engine:g} GPU each, {trainers} on {placement.gpus_per_trainer:g} GPU each"
        return f"{engines} on {each}"
    return f"{engines} with {cluster.engine_cpus:g} CPU each, {trainers} with {cluster.trainer_cpus:g} CPU each"
