"""Who holds a stage: what a lease says of its holder, whether that one lives, and the heartbeat of all leases."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from engines.files import AnyPath, Place
from selfguide.errors import UserError
from selfguide.store.whole import last_written

_BEAT_S, SILENT_S = 15.0, 120.0
"""A lease is touched this often, and taken over from another host after this much silence. Seconds."""


def describe_me() -> bytes:
    """A process number is used again; together with its start it is not."""
    pid = os.getpid()
    me = {"host": socket.gethostname(), "pid": pid, "started": _process_start(pid), "since": time.time()}
    return json.dumps(me).encode()


def is_alive(holder: bytes, silence_s: float) -> bool:
    """On this machine the process is looked for; on another one its heartbeat is all there is.

    A holder in this very process is taken for dead: whoever asks is its successor.
    """
    told: object = None
    with suppress(ValueError, RecursionError):  # who holds a lease that cannot be read is told by its heartbeat alone
        told = json.loads(holder)
    if not isinstance(told, dict) or told.get("host") != socket.gethostname():
        return silence_s < SILENT_S
    pid = told.get("pid", 0)
    started = _process_start(pid)
    return bool(pid != os.getpid() and started is not None and started == told.get("started"))


def leases(root: AnyPath) -> list[tuple[Place, bool]]:
    """The leases in a run folder that nobody has given back, and whether their holders are at work."""
    found: list[Place] = sorted(root.glob("tasks/*/*/*/work/lease-*"))
    return [(path, lease_alive(path)) for path in found]


def lease_alive(lease: AnyPath) -> bool:
    """As far as this machine's clock tells, where the holder is on another one."""
    written = last_written(lease)
    return written is not None and is_alive(lease.read_bytes(), time.time() - written[0] / 1e9)


def _process_start(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process, or None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


class _Heart:
    """One thread that beats for every lease of this process."""

    def __init__(self) -> None:
        self._beats: dict[str, Callable[[], None]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def start(self, lease: str, beat: Callable[[], None]) -> None:
        with self._lock:
            self._beats[lease] = beat

    def stop(self, lease: str) -> None:
        with self._lock:
            self._beats.pop(lease, None)

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            with self._lock:
                beats = list(self._beats.values())
            for beat in beats:
                with suppress(OSError, UserError):  # a lease that has been taken, a store that does not answer now
                    beat()


@cache
def heart() -> _Heart:
    return _Heart()
