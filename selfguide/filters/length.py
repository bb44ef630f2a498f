"""Texts much shorter or longer than the gold examples'."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from selfguide.filters.base import Context, FilterSpec

if TYPE_CHECKING:
    import polars as pl


class Length(FilterSpec):
    """Keeps texts within mean +- `sigmas` standard deviations of the gold examples' lengths, as SELF-GUIDE does.

    Two or three examples give a noisy deviation, and equal lengths give none: `floor` widens the interval to at least
    that share of the mean on either side. The authors' code has no floor, an exclusive upper bound, and bounds that are
    cut to whole numbers; `exclusive_upper` and `floor: 0` give that back.
    """

    name: Literal["length"] = "length"
    unit: Literal["characters", "tokens"] = "characters"
    """What is counted."""
    sigmas: float = Field(default=2.0, gt=0)
    """Half the interval's width in population standard deviations."""
    floor: float = Field(default=0.5, ge=0)
    """The least half-width, as a share of the mean."""
    exclusive_upper: bool = False
    """Turn away a text of exactly the upper bound too."""

    def bounds(self, context: Context) -> tuple[int, int]:
        """The shortest and the longest length that stays."""
        lengths = context.gold_tokens if self.unit == "tokens" else [len(text) for text in context.gold_texts]
        mean = fmean(lengths)
        half = max(self.sigmas * pstdev(lengths), self.floor * mean)
        return math.trunc(mean - half), math.trunc(mean + half) - self.exclusive_upper

    def reason(self, context: Context) -> pl.Expr:
        import polars as pl

        low, high = self.bounds(context)
        length = pl.col("tokens") if self.unit == "tokens" else pl.col("text").str.len_chars()
        allowed = pl.lit(f" {self.unit}, {max(low, 0)} to {high} allowed")
        return pl.when((length < low) | (length > high)).then(length.cast(pl.String) + allowed)
