"""Self-consistency: of several annotations of one input, the one that the samples agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from selfguide.filters.base import FilterSpec

if TYPE_CHECKING:
    import polars as pl


class Vote(FilterSpec):
    """Takes the most frequent surviving answer; ties go to the shortest, then the first in the alphabet.

    The authors ask for a share of the *survivors*, so that one survivor of ten is unanimous; here the
    share is of all samples unless `of` says otherwise. "medoid" suits free text, where no two answers are equal: the
    answer with the highest mean ROUGE-L to the others, which is then its share.
    """

    name: Literal["consistency"] = "consistency"
    choose: Literal["frequent", "medoid"] = "frequent"
    """How the answer is chosen."""
    min_share: float = Field(default=0.3, ge=0, le=1)
    """The least share of samples behind the chosen answer."""
    of: Literal["samples", "survivors"] = "samples"
    """What the share is a share of."""

    def elect(self, answers: pl.DataFrame) -> pl.DataFrame:
        """From surviving answers (`row`, `text`, `tokens`, `num_samples`) to one line a row: `row`, `text`, `votes`,
        `share`, and `tokens` of the first such answer."""
        import polars as pl

        if self.choose == "medoid":
            return _medoids(answers)
        counted = answers.group_by("row", "text").agg(
            pl.len().alias("votes"), pl.col("num_samples").first(), pl.col("tokens").first()
        )
        survivors = pl.col("votes").sum().over("row")
        share = pl.col("votes") / (survivors if self.of == "survivors" else pl.col("num_samples"))
        ranked = counted.with_columns(share.alias("share"), pl.col("text").str.len_chars().alias("length"))
        ranked = ranked.sort("row", "votes", "length", "text", descending=[False, True, False, False])
        return ranked.group_by("row", maintain_order=True).first().select("row", "text", "votes", "share", "tokens")

    def reason(self) -> pl.Expr:
        """Null where enough samples stand behind the answer."""
        import polars as pl

        share = (pl.col("share") * 100).round(0).cast(pl.Int64).cast(pl.String)
        few = pl.col("share") < self.min_share
        return pl.when(few).then(share + pl.lit(f"% agree, {self.min_share:.0%} asked for"))


def _medoids(answers: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    elected = []
    for (row,), group in answers.group_by("row", maintain_order=True):
        text, votes, share = _medoid(group["text"].to_list())
        tokens = group["tokens"][group["text"].to_list().index(text)]
        elected.append({"row": row, "text": text, "votes": votes, "share": share, "tokens": tokens})
    schema = {"row": pl.Int32, "text": pl.String, "votes": pl.UInt32, "share": pl.Float64, "tokens": pl.Int32}
    return pl.DataFrame(elected, schema=schema)


def _medoid(texts: Sequence[str]) -> tuple[str, int, float]:
    from selfguide.metrics import rouge_l

    if len(texts) == 1:
        return texts[0], 1, 1.0
    # fsum is exact: the order of the answers cannot break a tie.
    sums = [math.fsum(rouge_l(one, [other]) for j, other in enumerate(texts) if j != i) for i, one in enumerate(texts)]
    best = min(range(len(texts)), key=lambda i: (-sums[i], len(texts[i]), texts[i]))
    return texts[best], texts.count(texts[best]), sums[best] / (len(texts) - 1)
