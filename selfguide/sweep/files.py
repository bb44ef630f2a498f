"""What a sweep writes beside `tasks/`: what it is of, what became of each job, and how it got on.

One process writes them, the driver. Nothing here decides what is done: an outcome that is lost is found again from the
task's finished stages, which no outcome can contradict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from selfguide.store import Journal, RunStore, write_whole
from selfguide.sweep.jobs import Outcome, outcome_of

FORMAT = 1
SUBJECT, OUTCOMES, EVENTS = "sweep.json", "outcomes.jsonl", "events.jsonl"


class SweepFiles:
    """The folder `sweep/` of a run folder."""

    def __init__(self, store: RunStore, *, create: bool = True) -> None:
        self.folder = store.root / "sweep"
        self._outcomes, self._events = Journal(self.folder / OUTCOMES), Journal(self.folder / EVENTS)
        if create:
            self.folder.mkdir(exist_ok=True)

    def write_subject(self, subject: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, **subject}
        write_whole(self.folder / SUBJECT, json.dumps(content, indent=1, default=str).encode())

    def outcomes(self) -> dict[str, Outcome]:
        """The last one of each job, by its key; a torn line is passed over."""
        found = {}
        for record in self._outcomes.read():
            with suppress(TypeError):
                outcome = outcome_of(record)
                found[outcome.job] = outcome
        return found

    def add_outcome(self, outcome: Outcome) -> None:
        """On disk when this returns."""
        self._outcomes.append(asdict(outcome))

    def add_event(self, event: Mapping[str, Any]) -> None:
        self._events.append({"time": time.time(), **event})
