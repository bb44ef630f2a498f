"""What a client knows of each engine, and to which of them a row goes."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engines.types import AdapterRef, Work, num_sequences

if TYPE_CHECKING:
    from cluster.channel import Channel

_ROUNDS = 4
"""So many times an engine's slots are filled with rows of one adapter before a busy engine more has to load it."""
_AHEAD = 1.75
"""An engine's window, in multiples of its slots: while rows that end are on their way, others are there already."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A row on its way: who waits for it, and whether it has been in flight at a death."""

    work: Work
    channel: Channel
    wire_id: str = ""
    deaths_alone: int = 0
    alone: bool = False
    begun: bool = False

    @property
    def sequences(self) -> int:
        return num_sequences(self.work)

    @property
    def adapter(self) -> AdapterRef | None:
        return self.work.adapter


@dataclass(eq=False, slots=True)
class Host:
    """An actor: one process, and the engines in it. `node` is where it was started, `life` the process's name."""

    actor: Any
    node: str
    life: str = ""
    lanes: list[Lane] = field(default_factory=list)
    collecting: bool = False

    @property
    def num_in_flight(self) -> int:
        return sum(len(lane.in_flight) for lane in self.lanes)


@dataclass(eq=False, slots=True)
class Lane:
    """One engine as this client sees it. `others` are sequences of other clients, `clients` how many share it."""

    name: str
    host: Host
    slot: int
    slots: int
    set_aside: bool = False
    state: str = "ready"  # ready | down | lost
    in_flight: dict[str, Ticket] = field(default_factory=dict)
    sequences: int = 0
    others: int = 0
    clients: int = 1
    life: int = 1
    busy_alone: bool = False

    @property
    def window(self) -> int:
        """Sequences that this client may have in the engine: its share of what keeps it full."""
        return max(1, int(_AHEAD * self.slots) // self.clients)

    @property
    def has_room(self) -> bool:
        return self.state == "ready" and self.sequences < self.window

    @property
    def load(self) -> float:
        """1 is an engine whose slots are all taken."""
        return (self.sequences + self.others) / self.slots

    def take(self, ticket: Ticket, wire_id: str) -> None:
        ticket.wire_id = wire_id
        self.in_flight[wire_id] = ticket
        self.sequences += ticket.sequences

    def drop(self, wire_id: str) -> Ticket | None:
        """The row is not in this engine any more; None where it was given up before."""
        ticket = self.in_flight.pop(wire_id, None)
        if ticket is not None:
            self.sequences -= ticket.sequences
            if ticket.alone:
                self.busy_alone = any(one.alone for one in self.in_flight.values())
            if not self.in_flight:
                self.others, self.clients = 0, 1  # from here on nobody tells
        return ticket

    def revive(self) -> None:
        self.state, self.busy_alone = "ready", False
        self.life += 1


class Router:
    """Rows of one affinity go to the same engine while it has a free slot, then to the least loaded.

    Every engine that gets an adapter has to load it, and to read its prompts anew: rows with one stay where it is, and
    go to a further engine only where many wait, or it is idle. Full weights go to the engines set aside for them, where
    there are any, and nothing else does.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = [lane for lane in lanes if not lane.set_aside]
        self._set_aside = [lane for lane in lanes if lane.set_aside] or self._lanes
        self._orders: dict[tuple[str, bool], list[Lane]] = {}
        self._serving: dict[str, dict[str, list[Lane]]] = {}  # by affinity and adapter, the engines that got it
        self._free: list[tuple[float, int]] = []  # a heap of (load when looked at, number of the lane)

    def look(self) -> None:
        """Which engines have room, before rows are routed: until the next look they only fill up."""
        self._free = [(lane.load, number) for number, lane in enumerate(self._lanes) if lane.has_room]
        heapq.heapify(self._free)

    def _least_loaded(self) -> Lane | None:
        while self._free:
            load, number = self._free[0]
            lane = self._lanes[number]
            if not lane.has_room:
                heapq.heappop(self._free)
            elif lane.load > load:
                heapq.heapreplace(self._free, (lane.load, number))
            else:
                return lane
        return None

    def route(self, affinity: str, adapter: AdapterRef | None, num_waiting: int = 1) -> Lane | None:
        """Where the next of `num_waiting` rows goes. None: wait."""
        if adapter is not None:
            return self._route_adapter(affinity or adapter.digest, adapter, num_waiting)
        if affinity:
            home = next((lane for lane in self._order(affinity, False) if lane.state == "ready"), None)
            if home is not None and home.has_room and home.load < 1:
                return home
        return self._least_loaded()

    def _route_adapter(self, affinity: str, adapter: AdapterRef, num_waiting: int) -> Lane | None:
        serving = self._serving.setdefault(affinity, {}).setdefault(adapter.digest, [])
        if found := next((lane for lane in serving if lane.has_room), None):
            return found
        order = self._order(affinity, adapter.kind == "full")
        further = next((lane for lane in order if lane.has_room and lane not in serving), None)
        num_serving = sum(lane.state == "ready" for lane in serving)
        if further is None or (further.load and num_waiting <= _ROUNDS * further.slots * num_serving):
            return None
        serving.append(further)
        return further

    def free_of_suspects(self, adapter: AdapterRef | None) -> Lane | None:
        """An engine in which rows can run by themselves, once the others have left."""
        lanes = self._set_aside if adapter is not None and adapter.kind == "full" else self._lanes
        return next((lane for lane in lanes if lane.state == "ready" and not lane.busy_alone), None)

    def forget(self, affinity: str) -> None:
        self._orders.pop((affinity, False), None)
        self._orders.pop((affinity, True), None)
        self._serving.pop(affinity, None)

    def _order(self, affinity: str, whole: bool) -> list[Lane]:
        """The same in every client, and nearly the same with one engine more or less (rendezvous hashing)."""
        key = (affinity, whole)
        if key not in self._orders:
            lanes = self._set_aside if whole else self._lanes
            self._orders[key] = sorted(lanes, key=lambda lane: _weight(affinity, lane.name), reverse=True)
        return self._orders[key]


def _weight(affinity: str, lane: str) -> bytes:
    return hashlib.blake2b(f"{affinity}\0{lane}".encode(), digest_size=8).digest()
