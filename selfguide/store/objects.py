"""The work folder of a stage in an object store, where nothing can be linked, appended to or written on a condition.

All that is asked of the store is that a listing shows every object that was written before it. A claimant writes an
object of its own, then lists: of any two, at least one sees the other, and whoever sees another's claim does not begin.
Objects carry the epoch of their writer, and each epoch's first event names the shards that it found, so that nothing
counts which a writer that was taken for dead has written since.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from engines.files import Url, remove_folder
from selfguide.errors import StageBusy, UserError
from selfguide.store.lease import describe_me, heart, is_alive
from selfguide.store.whole import Journal

_LOOKS, _PAUSE_S = 20, 0.25
"""How often, and how long apart, the first of two claimants looks whether the other one has stepped back."""


class ObjectWork:
    """`lease-<epoch>-<id>.json`, `events/<epoch>-<number>.jsonl` and `rows-<first row>-<epoch>.parquet`."""

    def __init__(self, stage: Url) -> None:
        self._stage = stage
        self._folder = stage / "work"
        self._epoch = 0
        self._claim = self._folder
        self._cleared = False
        self._journal = Journal(self._folder / "events")
        self._earlier: list[dict[str, Any]] = []  # while held: the events of earlier epochs
        self._shards: dict[int, str] | None = None
        """Names of the shards that count, by first row; None until they are looked up."""

    def take(self) -> int:
        """Claims the stage; returns the epoch. Raises `UserError` where another process holds it or is first."""
        self._epoch = max((_epoch_of(name) for name in self._listing()), default=0) + 1
        self._claim = self._folder / f"lease-{self._epoch:06d}-{uuid.uuid4().hex}.json"
        self._claim.write_bytes(describe_me())
        try:
            listing = self._settle()
            self._earlier = self._journal.read() if any(map(_is_event, listing)) else []
        except BaseException:
            self._claim.unlink(missing_ok=True)
            raise
        self._shards = _counting(listing, self._earlier)
        self._journal = Journal(self._folder / "events", f"{self._epoch:06d}")
        heart().start(str(self._claim), self._beat)
        return self._epoch

    def _settle(self) -> dict[str, float]:
        """The listing in which no living process but this one claims the stage."""
        mine, holder = self._claim.name, b""
        for look in range(_LOOKS):
            listing = self._listing()
            if mine not in listing:
                raise StageBusy(f"{self._stage}: another process has taken this stage over; this one stops")
            others = {
                name: self._living(name, listing[mine] - at)
                for name, at in listing.items()
                if _is_claim(name) and name != mine
            }
            rivals = {name: holder for name, holder in others.items() if holder is not None}
            if not rivals:
                for name in others:
                    (self._folder / name).unlink(missing_ok=True)
                return listing
            holder = next(iter(rivals.values()))
            if min(rivals) < mine:
                break
            if look + 1 < _LOOKS:
                time.sleep(_PAUSE_S)
        who = holder.decode(errors="replace")
        raise StageBusy(f"{self._stage}: another process is at work here ({who}); wait for it or end it")

    def _living(self, claim: str, silence_s: float) -> bytes | None:
        """The claim's content where its holder lives. Silence is told by the store's clock alone."""
        try:
            content = (self._folder / claim).read_bytes()
        except FileNotFoundError:  # given back meanwhile
            return None
        except UserError:  # what Arrow says where it is given back between the look at its size and its content
            if (self._folder / claim).is_file():
                raise
            return None
        return content if is_alive(content, silence_s) else None

    def check_free(self) -> None:
        """Raises `UserError` where another process is at work."""
        listing = self._listing()
        for claim in filter(_is_claim, listing):
            if holder := self._living(claim, time.time() - listing[claim]):
                who = holder.decode(errors="replace")
                raise StageBusy(f"{self._stage}: another process is at work here ({who}); wait for it or end it")

    def check(self) -> None:
        """Raises `UserError` where another process has taken the stage over."""
        listing = self._listing()
        epoch = max((_epoch_of(name) for name in listing if not _is_claim(name)), default=0)
        if self._claim.name not in listing or epoch > self._epoch:
            raise StageBusy(f"{self._stage}: another process has taken this stage over; this one stops")

    def _beat(self) -> None:
        self.check()
        self._claim.write_bytes(describe_me())

    def leave(self) -> None:
        """Gives the claim back, once the events that wait are written."""
        heart().stop(str(self._claim))
        with suppress(UserError):  # a claim that stays is succeeded, once its holder is dead
            if not self._cleared and self._claim.is_file():
                self._journal.flush()
                self._claim.unlink(missing_ok=True)

    def append(self, event: dict[str, Any], *, durable: bool) -> None:
        """Where earlier writers have left shards, what this epoch found counts from its first event on."""
        if event["event"] == "begin":
            event["shards"] = sorted((self._shards or {}).values())
            durable = durable or self._epoch > 1
        self._journal.append(event, durable=durable)

    def events(self) -> list[dict[str, Any]]:
        """While held: those of earlier epochs."""
        return self._earlier if self._epoch else self._journal.read()

    def write_shard(self, first_row: int, content: bytes) -> None:
        """Raises `UserError` where this process has written it already."""
        assert self._shards is not None
        name = f"rows-{first_row:08d}-{self._epoch:06d}.parquet"
        if first_row in self._shards:
            raise UserError(f"{self._stage}: {self._shards[first_row]} is written already; this process stops")
        self.check()
        self._journal.flush()
        (self._folder / name).write_bytes(content)
        self._shards[first_row] = name

    def read_shard(self, first_row: int) -> bytes | None:
        if self._shards is None:
            self._shards = _counting(self._listing(), self._journal.read())
        name = self._shards.get(first_row)
        return None if name is None else (self._folder / name).read_bytes()

    def shard(self, first_row: int) -> Url:
        return self._folder / (self._shards or {}).get(first_row, f"rows-{first_row:08d}")

    def publish(self, first_row: int, content: bytes) -> None:
        """Makes one shard the stage's rows."""
        (self._stage / "rows.parquet").write_bytes(content)

    def clear(self) -> None:
        """Removes the work folder, the claim with it."""
        heart().stop(str(self._claim))
        remove_folder(self._folder)
        self._cleared = True

    def _listing(self) -> dict[str, float]:
        """When each object below the work folder was written (seconds, the store's clock), by its path there."""
        cut = len(self._folder.path) + 1
        return {one.path[cut:]: one.mtime_ns / 1e9 for one in self._folder.infos() if one.is_file}


def _counting(listing: Iterable[str], events: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Names of the shards that count, by first row: those that the last epoch which wrote an event had found, and its
    own."""
    last = max(filter(_is_event, listing), key=_epoch_of, default="")
    begins = [event for event in events if event.get("event") == "begin" and event.get("epoch") == _epoch_of(last)]
    found = {name for event in begins for name in event.get("shards", ())}
    shards = [name for name in listing if name.startswith("rows-") and _epoch_of(name)]
    return {int(name[5:13]): name for name in shards if name in found or _epoch_of(name) == _epoch_of(last)}


def _is_event(name: str) -> bool:
    return name.startswith("events/")


def _is_claim(name: str) -> bool:
    return name.startswith("lease-")


def _epoch_of(name: str) -> int:
    """Of a claim, an event or a shard; 0 for what is none of them."""
    found = re.match(r"(?:lease-|events/|rows-\d{8}-)(\d{6})\b", name)
    return int(found[1]) if found else 0
