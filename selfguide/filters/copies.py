"""Inputs that are there already: in the gold examples, or in the evaluation data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from selfguide.filters.base import Context, FilterSpec, normalise, normalised

if TYPE_CHECKING:
    import polars as pl


class GoldCopy(FilterSpec):
    """Turns away copies of a gold example's input, compared without case and spacing."""

    name: Literal["gold_copy"] = "gold_copy"

    def reason(self, context: Context) -> pl.Expr:
        return _held(context.gold_inputs, "copy of a gold example")


class EvaluationCopy(FilterSpec):
    """Turns away copies of an evaluation input, so that no score is helped by a row that was trained on."""

    name: Literal["evaluation_copy"] = "evaluation_copy"

    def reason(self, context: Context) -> pl.Expr:
        return _held(context.evaluation_inputs, "copy of an evaluation input")


def _held(texts: tuple[str, ...], reason: str) -> pl.Expr:
    import polars as pl

    known = pl.Series(sorted(set(normalise(list(texts)))), dtype=pl.String)
    return pl.when(normalised("text").is_in(known.implode())).then(pl.lit(reason))
