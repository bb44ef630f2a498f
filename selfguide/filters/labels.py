"""Classification: reading a label off an answer, its agreement with the condition, margin and balance."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from selfguide.filters.base import Context, FilterSpec

if TYPE_CHECKING:
    import polars as pl

_OUTER = " \t\r\n.,;:!?\"'`()[]*"


class ValidLabel(FilterSpec):
    """Turns away answers that name no label; `read` is the label as it stands in the answer.

    "exact" wants the whole answer to be a label, apart from case, outer punctuation and spacing. "first" and "last"
    take that occurrence of any label (case-sensitive). The authors meant "first" and, by a bug, got "exact".
    """

    name: Literal["valid_label"] = "valid_label"
    match: Literal["exact", "first", "last"] = "exact"
    """Which part of the answer counts."""

    def read(self, context: Context) -> pl.Expr:
        """The label that the column `text` names, or null."""
        import polars as pl

        if not context.labels:
            return pl.lit(None, dtype=pl.String)
        if self.match == "exact":
            whole = pl.col("text").str.strip_chars()
            bare = whole.str.strip_chars(_OUTER).str.to_lowercase()
            spellings = {_bare(label): label for label in reversed(context.labels) if _bare(label)}
            known = bare.replace_strict(list(spellings), list(spellings.values()), default=None, return_dtype=pl.String)
            return pl.when(whole.is_in(context.labels)).then(whole).otherwise(known)  # labels may differ in case alone
        # Longest first: of "entails" and "entails not" the longer one is meant where it stands.
        pattern = "|".join(re.escape(label) for label in sorted(context.labels, key=len, reverse=True))
        found = pl.col("text").str.extract_all(pattern)
        return found.list.first() if self.match == "first" else found.list.last()

    def reason(self, context: Context) -> pl.Expr:
        import polars as pl

        return pl.when(self.read(context).is_null()).then(pl.lit("names no label"))


class Agreement(FilterSpec):
    """Keeps rows whose annotated label is the one that the input was written for (the authors do not check)."""

    name: Literal["agreement"] = "agreement"

    def reason(self, context: Context) -> pl.Expr:
        import polars as pl

        differs = pl.col("label").is_not_null() & (pl.col("label") != pl.col("text"))
        return pl.when(differs).then(pl.lit("written for ") + pl.col("label") + pl.lit(", annotated ") + pl.col("text"))


class Balance(FilterSpec):
    """Draws equally many rows of each label that occurs, without replacement (SELF-GUIDE).

    `ratio` allows more: a label keeps at most `ratio` times the rows of the rarest.
    """

    name: Literal["balance"] = "balance"
    ratio: float = Field(default=1.0, ge=1)
    """The most common label's rows over the rarest's."""

    def reasons(self, rows: pl.DataFrame, context: Context) -> pl.Series:
        import polars as pl

        groups: dict[str, list[int]] = defaultdict(list)
        for number, label in enumerate(rows["text"]):
            groups[label].append(number)
        quota = int(min(map(len, groups.values()), default=0) * self.ratio)
        reasons: list[str | None] = [None] * rows.height
        for label, numbers in sorted(groups.items()):
            for number in random.Random(f"{context.seed} {label}").sample(numbers, max(0, len(numbers) - quota)):
                reasons[number] = f"more than {quota} rows of {label}"
        return pl.Series("reason", reasons, dtype=pl.String)


class Margin(FilterSpec):
    """Keeps, of each label, the rows where calibrated annotation put it furthest ahead of the second label.

    The margin is in standard units (annotation.mode calibrated). Rows without one, as generation tasks have, stay.
    """

    name: Literal["margin"] = "margin"
    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of a label's rows that stays, rounded up; of equal margins the earlier rows."""

    def reasons(self, rows: pl.DataFrame, context: Context) -> pl.Series:
        import polars as pl

        place = pl.col("margin").rank("ordinal", descending=True).over("text")
        count = pl.col("margin").count().over("text")
        far = place > (self.keep * count - 1e-9).ceil()
        why = pl.format(
            "margin {}, below the highest " + f"{self.keep:.0%} of " + "{}", pl.col("margin").round(3), "text"
        )
        return rows.select(pl.when(far).then(why).alias("reason"))["reason"]


def _bare(label: str) -> str:
    return label.strip(_OUTER).lower()
