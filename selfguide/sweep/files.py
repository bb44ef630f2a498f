"""What a sweep writes beside `tasks/`: what it is of, what became of each job, and how it got on.

One process writes them, the driver. Nothing here decides what is done: an outcome that is lost is found again from the
task's finished stages, which no outcome can contradict.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfguide.errors import UserError
from selfguide.store import RunStore, write_whole
from selfguide.sweep.jobs import Outcome, outcome_of

FORMAT = 1
SUBJECT, OUTCOMES, EVENTS = "sweep.json", "outcomes.jsonl", "events.jsonl"


class SweepFiles:
    """The folder `sweep/` of a run folder."""

    def __init__(self, store: RunStore, *, create: bool = True) -> None:
        self.folder = store.root / "sweep"
        if create:
            self.folder.mkdir(exist_ok=True)

    def write_subject(self, subject: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, **subject}
        write_whole(self.folder / SUBJECT, json.dumps(content, indent=1, default=str).encode())

    def outcomes(self) -> dict[str, Outcome]:
        """The last one of each job, by its key; a torn line is passed over."""
        found = {}
        path = self.folder / OUTCOMES
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with suppress(ValueError, TypeError):
                outcome = outcome_of(line)
                found[outcome.job] = outcome
        return found

    def add_outcome(self, outcome: Outcome) -> None:
        """On disk when this returns."""
        _append(self.folder / OUTCOMES, outcome.as_line())

    def add_event(self, event: Mapping[str, Any]) -> None:
        _append(self.folder / EVENTS, json.dumps({"time": time.time(), **event}, default=str))


def _append(path: Path, line: str) -> None:
    try:
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                line = "\n" + line  # behind a torn line
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room, then run the same command again"
        ) from error


def read_lines(path: Path) -> Sequence[dict[str, Any]]:
    """All whole lines of a file of JSON lines."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
