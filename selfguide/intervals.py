"""Intervals: how much of a difference a re-drawn test set would take back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from selfguide.store import Artifact

METRICS = ("exact_match", "rouge_l")
AUTHORS_METRICS = ("authors_em", "authors_rouge_char")
"""Computed under the protocol "authors" alone: the first for classification, the second for generation."""
PRIMARY_METRICS = {
    "official": {"classification": "exact_match", "generation": "rouge_l"},
    "authors": {"classification": "authors_em", "generation": "authors_rouge_char"},
}
"""What a kind of task is usually judged by, under each protocol."""
_DRAWS = 2_000_000
"""Rows that are drawn at once: a task of 5,850 rows would fill a gigabyte otherwise."""


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
    for metric in (*METRICS, *AUTHORS_METRICS):
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
        total += _resampled_means(array, resamples, rng) / len(values)
        mean += float(array.mean()) / len(values)
    low, high = np.percentile(total, [2.5, 97.5])
    mean, low, high = (round(100 * float(value), 2) for value in (mean, low, high))
    return Difference(mean, low, high, sum(map(len, values)))


def resample_columns(rows: Any, resamples: int, rng: np.random.Generator) -> Any:
    """Means of so many resamples of `rows` (rows x columns), each of the same rows in every column."""
    size, found = len(rows), []
    step = max(1, _DRAWS // size)
    for count in [min(step, resamples - done) for done in range(0, resamples, step)]:
        drawn = rng.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
        found.append(np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size) @ rows / size)
    return np.concatenate(found)


def bootstrap_clusters(resampled: Any, resamples: int, seed: int) -> tuple[float, float]:
    """Bounds, in points, of the mean of the tasks' means, each task counting the same: tasks are drawn anew, and within
    each drawn task its rows. `resampled`: tasks x draws, means (0 to 1) of resamples of a task's rows.

    Rows count in both draws, so the interval is a little wide; with one task it is that task's own, not a point.
    """
    rng, (size, draws) = np.random.default_rng(seed), resampled.shape
    step = max(1, _DRAWS // size)
    shapes = [(min(step, resamples - done), size) for done in range(0, resamples, step)]
    drawn = [
        resampled[rng.integers(0, size, one, np.int32), rng.integers(0, draws, one, np.int32)].mean(axis=1)
        for one in shapes
    ]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return round(100 * float(low), 2), round(100 * float(high), 2)


def bootstrap_columns(columns: Sequence[Sequence[float]], resamples: int, seed: int) -> list[Difference]:
    """What `bootstrap` says of each column, all of one length, by one draw of rows for all of them."""
    if not columns:
        return []
    rows: Any = np.asarray(columns).T
    lows, highs = np.percentile(resample_columns(rows, resamples, np.random.default_rng(seed)), [2.5, 97.5], axis=0)
    triples = zip(rows.mean(axis=0), lows, highs, strict=True)
    in_points = (tuple(round(100 * float(one), 2) for one in triple) for triple in triples)
    return [Difference(mean, low, high, len(rows)) for mean, low, high in in_points]


def bootstrap(values: list[float], resamples: int, seed: int) -> Difference:
    """Percentile bootstrap of the mean of `values` (0 to 1 each), in points."""
    array: Any = np.asarray(values)
    low, high = np.percentile(_resampled_means(array, resamples, np.random.default_rng(seed)), [2.5, 97.5])
    mean, low, high = (round(100 * float(value), 2) for value in (array.mean(), low, high))
    return Difference(mean, low, high, len(array))


def _resampled_means(array: Any, resamples: int, rng: np.random.Generator) -> Any:
    """Means of so many resamples, drawn some at a time; the draws are those of one large array."""
    size, step = len(array), max(1, _DRAWS // len(array))
    counts = [min(step, resamples - done) for done in range(0, resamples, step)]
    return np.concatenate([array[rng.integers(0, size, (count, size))].mean(axis=1) for count in counts])
