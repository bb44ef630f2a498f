"""Starting the engine actors, and ending them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.engine_actor import EngineActor
from cluster.placement import ClusterSpec, Placement
from cluster.pool import EnginesLost, as_future
from engines.types import EngineSpec


async def start_engines(spec: EngineSpec, cluster: ClusterSpec, placement: Placement) -> list[Any]:
    """Starts the engine actors one after another (together they can exhaust a node's memory) and waits for each.

    Raises `EnginesLost` where one does not start.
    """
    remote = ray.remote(
        num_cpus=cluster.engine_cpus, num_gpus=placement.gpus_per_engine, max_restarts=-1, max_task_retries=0,
        max_concurrency=1000, concurrency_groups={"control": 8},
    )(EngineActor)  # fmt: skip
    actors: list[Any] = []
    for number in range(cluster.num_engines):
        actors.append(remote.remote(spec, cluster.limits))
        try:
            await asyncio.wait_for(as_future(actors[-1].stats.remote()), cluster.limits.start_s)
        except (RayActorError, TimeoutError) as error:
            stop_engines(actors)
            reason = str(error).strip().splitlines()[-1:] or [f"no answer within {cluster.limits.start_s:g} s"]
            raise EnginesLost(f"engine {number} did not start: {reason[0].strip()}") from error
    return actors


def stop_engines(actors: Sequence[Any]) -> None:
    """Ends the engines' processes; a Ray that others use goes on."""
    for actor in actors:
        ray.kill(actor)
