"""Nothing but white space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from selfguide.filters.base import Context, FilterSpec

if TYPE_CHECKING:
    import polars as pl


class Empty(FilterSpec):
    """Turns away texts without a visible character (SELF-GUIDE's code, filter 1)."""

    name: Literal["empty"] = "empty"

    def reason(self, context: Context) -> pl.Expr:
        import polars as pl

        return pl.when(pl.col("text").str.strip_chars() == "").then(pl.lit("no text"))
