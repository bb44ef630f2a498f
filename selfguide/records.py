"""The rows that travel between stages: their identity, their randomness, the states that they end in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engines.types import ChoiceScores, Completion, Outcome

ACCEPTED, REJECTED, FAILED = "accepted", "rejected", "failed"
"""Every candidate ends in one of these. Rejected rows name the filter and its reason, failed ones the error."""


def row_id(task: str, stage: str, fingerprint: str, row: int) -> str:
    """The row's name in requests and events, unique over tasks and stages."""
    return f"{_hash(task, stage, fingerprint)[:12]}-{row}"


def row_seed(run_seed: int, task: str, stage: str, row: int, attempt: int = 0) -> int:
    """The row's own randomness, 62 bits: a function of what the row is, never of time, order or batch.

    `attempt` counts decisions of the method to ask again, never retries of the infrastructure. Hashed seeds are far
    apart: with n samples vLLM gives child k the seed s + k, so neighbouring seeds would share samples.
    """
    return int(_hash(run_seed, task, stage, row, attempt)[:16], 16) >> 2


def _hash(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def spent(outcome: Outcome) -> dict[str, int]:
    """Output and cached tokens of an answer; weighed choices cost one token, which is thrown away."""
    if isinstance(outcome, Completion):
        output_tokens = sum(len(sample.token_ids) for sample in outcome.samples)
        return {"output_tokens": output_tokens, "cached_tokens": outcome.cached_tokens}
    if isinstance(outcome, ChoiceScores):
        return {"output_tokens": 1, "cached_tokens": outcome.cached_tokens}
    return {}


@dataclass(frozen=True)
class Ledger:
    """What became of a stage's rows. `rejected` counts by filter and reason, `failed` by error."""

    candidates: int
    accepted: int
    rejected: Mapping[str, int]
    failed: Mapping[str, int]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Ledger:
        """Counts rows with the columns `state`, `filter` and `reason`."""
        states: Counter[str] = Counter()
        why: dict[str, Counter[str]] = {REJECTED: Counter(), FAILED: Counter()}
        for row in rows:
            states[row["state"]] += 1
            if row["state"] in why:
                why[row["state"]][row["filter"]] += 1
        return cls(states.total(), states[ACCEPTED], dict(why[REJECTED].most_common()), dict(why[FAILED].most_common()))

    def reconcile(self, expected: int) -> None:
        """Raises `AssertionError` (a bug, no user's mistake) unless each of `expected` rows has exactly one end."""
        ends = self.accepted + sum(self.rejected.values()) + sum(self.failed.values())
        if not expected == self.candidates == ends:
            raise AssertionError(f"{expected} rows went in, {self.candidates} came out, {ends} have an end: {self}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
