"""Connect to Ray or start it, once, and put everything back."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.placement import ClusterSpec, NodeResources, local_cpus

_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # the default, 15, costs engines up to a third of their speed on a busy machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_OBJECT_STORE_BYTES = 256 << 20
_STARTS, _TIMED_OUT = 3, "timed out during startup"


@contextmanager
def ray_session(spec: ClusterSpec) -> Iterator[list[NodeResources]]:
    """Yields the nodes that run now. A Ray that was already up in this process is used and left alone."""
    if ray.is_initialized():
        yield _nodes()
        return
    _quieten()
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        _connect(spec)
        if callable(on_term) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # Ray's own prints stacks and aborts
        yield _nodes()
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _nodes() -> list[NodeResources]:
    alive = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [
        NodeResources(node["NodeManagerHostname"], has.get("CPU", 0.0), has.get("GPU", 0.0), node["Labels"])
        for node, has in alive
    ]


def _quieten() -> None:
    """Deaths of workers are events that we report ourselves, in one line; Ray has no switch for its own paragraph."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None
    for name in ("ray", "ray.data", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _connect(spec: ClusterSpec) -> None:
    address = spec.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        return
    for left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local", num_cpus=local_cpus(spec), include_dashboard=False, log_to_driver=False,
                logging_level="ERROR", configure_logging=False, object_store_memory=_OBJECT_STORE_BYTES,
            )  # fmt: skip
            return
        except Exception as error:  # Ray gives its own node 30 seconds, which a busy machine may need more of
            if not left or _TIMED_OUT not in str(error):
                raise
            ray.shutdown()
