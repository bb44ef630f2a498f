"""Intervals: how much of a difference a re-drawn test set would take back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from selfguide.store import Artifact

METRICS = ("exact_match", "rouge_l")


@dataclass(frozen=True)
class Difference:
    """Mean difference in points (x 100) over `n` paired rows, with the bounds of its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def paired_bootstrap(ours: Artifact, theirs: Artifact, resamples: int, seed: int) -> dict[str, Difference]:
    """`ours` minus `theirs` by metric, resampling instances (percentile interval); metrics that both have."""
    mine, other = ours.rows(), theirs.rows()
    if [row["id"] for row in mine] != [row["id"] for row in other]:
        raise AssertionError("the two evaluations are not on the same rows")
    found = {}
    for metric in METRICS:
        if mine[0][metric] is not None and other[0][metric] is not None:
            found[metric] = bootstrap(
                [a[metric] - b[metric] for a, b in zip(mine, other, strict=True)], resamples, seed
            )
    return found


def bootstrap_tasks(values: Sequence[Sequence[float]], resamples: int, seed: int) -> Difference:
    """The mean of the tasks' means, in points, each task counting the same; rows are resampled within their task."""
    rng, total, mean = np.random.default_rng(seed), np.zeros(resamples), 0.0
    for one in values:
        array: Any = np.asarray(one)
        total += array[rng.integers(0, len(array), (resamples, len(array)))].mean(axis=1) / len(values)
        mean += float(array.mean()) / len(values)
    low, high = np.percentile(total, [2.5, 97.5])
    mean, low, high = (round(100 * float(value), 2) for value in (mean, low, high))
    return Difference(mean, low, high, sum(map(len, values)))


def bootstrap(values: list[float], resamples: int, seed: int) -> Difference:
    """Percentile bootstrap of the mean of `values` (0 to 1 each), in points."""
    array: Any = np.asarray(values)
    draws = np.random.default_rng(seed).integers(0, len(array), (resamples, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    mean, low, high = (round(100 * float(value), 2) for value in (array.mean(), low, high))
    return Difference(mean, low, high, len(array))
