"""Cores, memory, GPUs, disk, and what earlier runs left lying."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from cluster.placement import needed_cpus
from engines.files import Url
from selfguide.doctor.case import Case, Finding
from selfguide.doctor.machine import memory, num_cores
from selfguide.errors import UserError
from selfguide.sizes import MIN_FREE_BYTES, checkpoint_bytes, existing, readable_bytes

_SHARED_BYTES = 256 << 20
"""Ray's object store, as `cluster.session` asks for it; where there is less Ray uses the disk, which is slow."""
_FULL_SHARE = 0.95
"""Ray refuses new objects when the disk of its temporary folder is fuller than this."""


def check_hardware(case: Case) -> Iterator[Finding]:
    yield _check_cores(case)
    total, available = memory()
    yield Finding("memory", "ok", f"{readable_bytes(total)}, of which {readable_bytes(available)} are available")
    gpus = [f"{one.name} ({readable_bytes(one.memory_bytes)})" for one in case.gpus]
    yield Finding("gpus", "ok", ", ".join(gpus) or "none visible")
    if not case.address:
        yield _check_shared_memory()


def _check_cores(case: Case) -> Finding:
    wanted, cores = needed_cpus(case.recipe.cluster, case.recipe.engine.num_per_actor), num_cores()
    found = f"{cores} usable, the recipe reserves {wanted:g} for engines, trainers, runners and filters"
    if case.address or wanted <= cores:
        return Finding("cores", "ok", found)
    if wanted <= 2 * cores:
        return Finding("cores", "ok", f"{found}, which take turns")
    return Finding("cores", "warning", found, "lower cluster.num_engines or cluster.engine_cpus")


def _check_shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free
    if free >= _SHARED_BYTES:
        return Finding("shared memory", "ok", f"{readable_bytes(free)} free in /dev/shm")
    found = f"{readable_bytes(free)} free in /dev/shm, Ray wants {readable_bytes(_SHARED_BYTES)}"
    return Finding("shared memory", "warning", found, "make it larger (in a container: --shm-size=1g)")


def check_disk(case: Case) -> Iterator[Finding]:
    """Room for what training lays down at its worst moment, and for Ray's temporary folder."""
    place = existing(case.out)
    free = shutil.disk_usage(place).free
    size = case.size
    if isinstance(case.out, Url):
        yield _check_store(case.out)
    wanted = MIN_FREE_BYTES + (checkpoint_bytes(size, case.recipe.finetuning) if size else 0)
    found = f"{readable_bytes(free)} free for {case.out}, a run wants {readable_bytes(wanted)}"
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding("disk", "error", f"{place} cannot be written to", "choose another --out")
    elif free < wanted:
        yield Finding("disk", "error", found, "make room, or choose another --out")
    else:
        yield Finding("disk", "ok", found)
    if not case.address:
        yield from _check_temporary()


def _check_store(out: Url) -> Finding:
    """What a run does to it: list, write, read, remove."""
    probe = out / f"probe-{uuid.uuid4().hex}"
    try:
        out.is_dir()
        probe.write_bytes(b"selfguide doctor")
        probe.read_bytes()
        probe.unlink()
    except UserError as error:
        found, _, remedy = str(error).replace(str(probe), str(out)).partition("; ")
        return Finding("storage", "error", found, remedy)
    return Finding("storage", "ok", f"{out} can be listed, written, read and removed from")


def _check_temporary() -> Iterator[Finding]:
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    usage = shutil.disk_usage(existing(place))
    if usage.used > _FULL_SHARE * usage.total:
        found = f"the disk of {place} is {usage.used / usage.total:.0%} full, Ray wants {1 - _FULL_SHARE:.0%} free"
        yield Finding("temporary files", "error", found, "make room, or set RAY_TMPDIR to a folder on another disk")


def check_locks(case: Case) -> Iterator[Finding]:
    """Who works in the run folder, and who died there."""
    from selfguide.store import RunStore, leases

    try:
        RunStore(case.out, create=False)
    except UserError as error:
        yield Finding("run folder", "error", str(error))
        return
    held = leases(case.out)
    busy = [path.parents[1] for path, alive in held if alive]
    if busy:
        found = f"another process is at work in {busy[0]}" + (f" and {len(busy) - 1} more" if busy[1:] else "")
        yield Finding("run folder", "warning", found, "wait for it, end it, or choose another --out")
    elif held:
        yield Finding("run folder", "ok", f"{case.out}: {len(held)} stages of a run that was killed; run goes on there")
    elif case.out.is_dir():
        yield Finding("run folder", "ok", f"{case.out}: run goes on there; nobody is at work in it")
