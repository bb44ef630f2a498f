"""Texts that did not come to their own end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from selfguide.filters.base import Context, FilterSpec

if TYPE_CHECKING:
    import polars as pl


class Finished(FilterSpec):
    """Turns away texts whose generation ended for another reason than a stop (a cut text is half a text)."""

    name: Literal["finished"] = "finished"

    def reason(self, context: Context) -> pl.Expr:
        import polars as pl

        reason = pl.col("finish_reason")
        return pl.when(reason != "stop").then(pl.lit("finish_reason ") + reason)
