"""Labels by one forward pass: a student's preference for a label whatever the input is taken out of its scores.

A row's log-probabilities, normalised over the labels, are standardised per label over all rows of a set (mean 0,
standard deviation 1), and the label that stands out most is elected. Batch calibration (Zhou et al., 2309.17249)
subtracts the mean; dividing by the deviation too is ours. No gold label is used, but every row's label depends on the
whole set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LEAST = -100.0
"""Nats from the likeliest; no label counts as further away, so that one -inf does not spoil its label's mean."""
_FINITE = -1e6
_NO_SPREAD = 1e-9
"""Nats; below this a label's deviation is rounding, and its scores are all alike."""


@dataclass(frozen=True)
class Elected:
    """A row's label, and by how much it is ahead of the second, in standard units."""

    label: str
    margin: float


def calibrate(logprobs: Sequence[Sequence[float]], labels: Sequence[str]) -> list[Elected]:
    """One `Elected` for each row of `logprobs`, whose columns are `labels`, two at least; ties go to the first."""
    import numpy as np

    scores = standardise(np.array(logprobs, dtype=np.float64).reshape(-1, len(labels)))
    ordered = np.sort(scores, axis=1)
    margins = ordered[:, -1] - ordered[:, -2]
    best = scores.argmax(axis=1)
    return [Elected(labels[number], float(margin)) for number, margin in zip(best, margins, strict=True)]


def standardise(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows normalised over the labels (columns), then each label standardised over the rows; no spread gives zeros."""
    import numpy as np

    if not len(logprobs):
        return logprobs
    finite = np.maximum(logprobs, _FINITE)
    scores = np.maximum(finite - np.logaddexp.reduce(finite, axis=1, keepdims=True), _LEAST)
    spread = scores.std(axis=0)
    centred = scores - scores.mean(axis=0)
    return np.where(spread > _NO_SPREAD, centred / np.maximum(spread, _NO_SPREAD), 0.0)


def likeliest(logprobs: Sequence[float], labels: Sequence[str]) -> str:
    """The label of highest log-probability as it is; ties go to the earlier label."""
    return max(zip(logprobs, labels, strict=True), key=lambda pair: pair[0])[1]
