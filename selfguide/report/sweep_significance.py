"""Tests of paired differences, exact and without randomness, and what many of them at once are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_UNIT = 1e-3
"""Differences (0 to 1) are rounded to this, a tenth of a point, before their signs are flipped."""
_MOST_UNITS = 200_000
"""Of the sum of a test's differences: with thousands of rows they are rounded further. The test stays exact for what
is rounded."""


def sign_flip_p(differences: Any) -> float:
    """Two-sided p of the paired permutation test: the share of all assignments of signs that lie as far from zero.

    All of them are counted, none is drawn. For exact match, whose differences are -1, 0 and 1, this is McNemar's exact
    test, which is the sign test.
    """
    return _count_signs(np.rint(np.asarray(differences) / _UNIT).astype(int))


def _count_signs(signed: Any) -> float:
    """Of whole numbers: how often a sum with random signs is at least as far from zero as theirs."""
    signed = signed[signed != 0]
    if not len(signed):
        return 1.0
    signed = signed // np.gcd.reduce(signed)
    if (too_many := np.abs(signed).sum() / _MOST_UNITS) > 1:
        signed = np.rint(signed / too_many).astype(int)
    steps, total, end = np.sort(np.abs(signed)), int(np.abs(signed).sum()), 0
    chances = np.zeros(total + 1)  # of each sum of the numbers that are given a plus
    chances[0] = 1.0
    for step in steps:
        half = chances[: end + 1] / 2
        chances[: end + 1] = half
        chances[step : end + step + 1] += half
        end += int(step)
    far = np.abs(2 * np.arange(total + 1) - total) >= abs(int(signed.sum()))
    return min(1.0, float(chances[far].sum()))


def sign_p(differences: Any) -> float:
    """Two-sided p of the sign test; differences of zero do not count."""
    return _count_signs(np.sign(np.asarray(differences)).astype(int))


def wilcoxon_p(differences: Any) -> float:
    """Two-sided p of Wilcoxon's signed-rank test: mean ranks for ties, differences of zero left out.

    Exact up to some 600 differences, and of rounded ranks beyond that.
    """
    array: Any = np.asarray(differences, dtype=float)
    array = array[array != 0]
    _, position, counts = np.unique(np.abs(array), return_inverse=True, return_counts=True)
    twice = 2 * np.cumsum(counts) - counts + 1  # mean ranks may be halves
    return _count_signs((np.sign(array) * twice[position]).astype(int))


def holm(chances: Sequence[float]) -> list[float]:
    """Adjusted p: at most 0.05 for a set in which a single false one has a chance of 5% (Holm 1979)."""
    order, steps = np.argsort(chances, kind="stable"), len(chances) - np.arange(len(chances))
    return _restored(np.maximum.accumulate(np.asarray(chances)[order] * steps), order)


def benjamini_hochberg(chances: Sequence[float]) -> list[float]:
    """Adjusted p: at most 0.05 for a set of which some 5% are false (Benjamini and Hochberg 1995)."""
    order, ranks = np.argsort(chances, kind="stable"), np.arange(1, len(chances) + 1)
    scaled = np.asarray(chances)[order] * (len(chances) / ranks)
    return _restored(np.minimum.accumulate(scaled[::-1])[::-1], order)


def _restored(adjusted: Any, order: Any) -> list[float]:
    """In the order of the tests, none above 1."""
    found = np.empty(len(order))
    found[order] = np.minimum(adjusted, 1.0)
    return [float(one) for one in found]
