"""Adapters of an object store, on this node: fetched once, checked whenever they are used, oldest out first.

A folder is named by the sha256 of its weights and appears whole, so that any number of engines may share it.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engines.adapters import BadAdapter
from engines.files import Url, cache_folder, fetch_folder, folder_bytes, locate
from engines.models import weights_digest
from engines.types import AdapterRef, UserError

_TRIES = 2
_IN_USE_S, _FETCH_S = 600.0, 86400.0
"""A folder that was used so lately is not removed, an engine may be reading it; one that is being fetched never within
a day."""


def bring_near(ref: AdapterRef, limit_gib: float) -> AdapterRef:
    """The adapter in a local folder: where it is, or for a URL in the cache. Raises `BadAdapter` where it cannot be
    fetched, or is not what its digest says."""
    source = locate(ref.url)
    if not isinstance(source, Url):
        return ref
    folder = _cache() / ref.digest
    for left in reversed(range(_TRIES + 1)):
        if folder.is_dir() and weights_digest(folder) == ref.digest:
            touch(folder)
            return replace(ref, url=str(folder))
        _discard(folder)  # cut off when its node went down
        if left:
            _fetch(source, folder, ref.digest)
            _make_room(limit_gib * 2**30)
    raise BadAdapter(f"{source}: its weights are not those that were trained; move its stage away and train again")


def touch(folder: Path) -> bool:
    """Notes that an adapter in the cache is in use; False where it was removed. Folders elsewhere are left alone."""
    if folder.parent != _cache():
        return True
    with suppress(FileNotFoundError):
        os.utime(folder)
        return True
    return False


def _cache() -> Path:
    return cache_folder() / "adapters"


def _fetch(source: Url, folder: Path, digest: str) -> None:
    """Whoever is first puts the folder in place. What arrives damaged is thrown away."""
    part = folder.with_name(f".{digest}.{uuid.uuid4().hex}.part")
    try:
        fetch_folder(source, part)
        if weights_digest(part) == digest:
            with suppress(OSError):  # not empty: another engine of this node was faster
                part.rename(folder)
    except (OSError, UserError) as error:
        raise BadAdapter(f"{source}: cannot be fetched ({' '.join(str(error).split())})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make_room(limit_bytes: float) -> None:
    """Removes what was used longest ago until the rest fits, and what a killed process has left half fetched."""
    found = []
    for folder in _cache().iterdir():
        with suppress(FileNotFoundError):  # removed by another engine
            found.append((folder.stat().st_mtime, folder_bytes(folder), folder))
    total = sum(size for _, size, _ in found)
    for used, size, folder in sorted(found):
        half = folder.suffix == ".part"
        if time.time() - used > (_FETCH_S if half else _IN_USE_S) and (half or total > limit_bytes):
            _discard(folder)
            total -= size


def _discard(folder: Path) -> None:
    """At once for whoever looks for it."""
    part = folder.with_name(f".{uuid.uuid4().hex}.part")
    with suppress(FileNotFoundError):
        folder.rename(part)
        shutil.rmtree(part, ignore_errors=True)
