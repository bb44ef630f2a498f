"""Starting the engine actors, and ending them; and the fleet as plain data, of which any process can make a client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.berth import differs
from cluster.engine_actor import EngineActor
from cluster.placement import ClusterSpec, Limits, Placement, engine_options
from engines.types import EngineSpec, EngineStats

_KNOCK_S = 1.0


class EnginesLost(Exception):
    """No engine is left, or engines died more often than `limits.max_deaths`. What was committed is safe."""


@dataclass(frozen=True)
class Fleet:
    """The engines, as they travel between processes. Engine i is number i % `per_actor` of actor i // `per_actor`.

    `slots` are the sequences that one engine decodes together. The last `num_set_aside` engines serve full weights
    alone. `nodes` are where the actors were started. `canary`: what the engines said of the canary when they started.
    """

    actors: tuple[Any, ...]
    nodes: tuple[str, ...]
    num_engines: int
    per_actor: int
    slots: int
    num_set_aside: int
    canary: tuple[float, ...]
    limits: Limits


async def start_engines(spec: EngineSpec, cluster: ClusterSpec, placement: Placement) -> Fleet:
    """Starts the engine actors one after another (together they can exhaust a node's memory) and waits for each.

    Simulated ones start together. Raises `EnginesLost` where one does not start, or answers unlike the others.
    """
    remote = ray.remote(
        max_restarts=-1, max_task_retries=0, max_concurrency=1000, concurrency_groups={"control": 8}
    )(EngineActor)  # fmt: skip
    count, per_actor = cluster.num_engines, spec.per_actor
    actors: list[Any] = []
    started: list[tuple[str, list[tuple[float, ...]]]] = []
    try:
        for first in range(0, count, per_actor):
            actor = remote.options(**engine_options(cluster, placement, first // per_actor))
            actors.append(actor.remote(spec, cluster.limits, first, min(per_actor, count - first)))
            if spec.kind != "simulated":
                started.append(await _started(actors[-1], first, cluster.limits))
        if spec.kind == "simulated":
            waits = [_started(actor, index * per_actor, cluster.limits) for index, actor in enumerate(actors)]
            started = list(await asyncio.gather(*waits))
        canary = _agreed([canary for _, canaries in started for canary in canaries])
    except EnginesLost:
        _kill(actors)
        raise
    # With full weights the tuned students would push the untuned one out of its engine again and again.
    num_set_aside = max(1, count // 8) if spec.max_loras == 0 and count > 1 else 0
    nodes = tuple(node for node, _ in started)
    return Fleet(tuple(actors), nodes, count, per_actor, spec.max_num_seqs, num_set_aside, canary, cluster.limits)


async def _started(actor: Any, number: int, limits: Limits) -> tuple[str, list[tuple[float, ...]]]:
    """The actor's node, and what its engines said of the canary."""
    try:
        return tuple(await asyncio.wait_for(as_future(actor.ready.remote()), limits.start_s))
    except (RayActorError, RayTaskError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[-1:] or [f"no answer within {limits.start_s:g} s"]
        raise EnginesLost(f"engine {number} did not start: {reason[0].strip()}") from error


def _agreed(canaries: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """What most engines say; they hold the same weights, so that one that says something else is broken."""
    said = [one for one in canaries if one]
    if not said:
        return ()
    middle = tuple(map(median, zip(*said, strict=True)))
    wrong = [number for number, one in enumerate(canaries) if differs(one, middle)]
    if wrong:
        raise EnginesLost(f"engines {wrong} give the canary other log-probabilities than most: look at their GPUs")
    return middle


def stop_engines(fleet: Fleet) -> None:
    """Ends the engines' processes; a Ray that others use goes on."""
    _kill(fleet.actors)


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


async def engine_stats(fleet: Fleet) -> list[EngineStats | None]:
    """Of each engine, in order; None for one whose actor does not answer now."""
    found = await asyncio.gather(
        *(asyncio.wait_for(as_future(actor.stats.remote()), 5.0) for actor in fleet.actors), return_exceptions=True
    )
    sizes = [min(fleet.per_actor, fleet.num_engines - i * fleet.per_actor) for i in range(len(fleet.actors))]
    pairs = zip(found, sizes, strict=True)
    return [one for stats, size in pairs for one in (stats if isinstance(stats, list) else [None] * size)]


async def as_future(reference: Any) -> Any:
    """What a Ray reference stands for, as a coroutine, which `asyncio.wait_for` and `gather` take."""
    return await reference


async def went_with_its_node(node: str) -> bool:
    """Whether it was the node's death; Ray may learn of that a moment later than of the process's."""
    for delay_s in (0.0, 0.2, 0.3):
        await asyncio.sleep(delay_s)
        if await asyncio.to_thread(_is_gone, node):
            return True
    return False


def _is_gone(node: str) -> bool:
    """Whether the node is no part of the cluster any more. Ray believes in a dead one for many seconds, but its daemon
    answers no more."""
    if not node:
        return False
    alive = next((one for one in ray.nodes() if one["NodeID"] == node and one["Alive"]), None)
    if alive is None:
        return True
    try:
        socket.create_connection((alive["NodeManagerAddress"], alive["NodeManagerPort"]), _KNOCK_S).close()
    except OSError:
        return True
    return False
