"""Words of an assistant that talks about the task instead of doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from selfguide.filters.base import Context, FilterSpec

if TYPE_CHECKING:
    import polars as pl

PLEASANTRIES = (
    "Sure,", "Sure!", "Of course!", "Of course,", "Certainly!", "Absolutely!", "Great question", "Great choice",
    "I agree", "You are right", "You're right", "Thank you for", "Thanks for", "Let me ", "Let's ", "Here is a new",
    "Here's a new", "As an AI", "I'm sorry, but", "I hope this helps",
)  # fmt: skip


class Noise(FilterSpec):
    """Turns away texts that hold any of the words, case-sensitive (SELF-GUIDE's noise list).

    The authors' list grew from task to task within a process; this one cannot. A word that occurs in a gold example is
    part of the task, not noise.
    """

    name: Literal["noise"] = "noise"
    words: tuple[str, ...] = PLEASANTRIES
    """Substrings that no text may hold."""
    extra: tuple[str, ...] = ()
    """More of them, beside the list above."""
    exempt_gold: bool = True
    """Let words pass that a gold example holds. The authors did not."""

    def reason(self, context: Context) -> pl.Expr:
        import polars as pl

        gold = "\0".join((*context.gold_texts, *context.gold_inputs))
        words = [word for word in (*self.words, *self.extra) if not (self.exempt_gold and word in gold)]
        if not words:
            return pl.lit(None, dtype=pl.String)
        found = pl.col("text").str.extract_many(words).list.first()
        return pl.when(found.is_not_null()).then(pl.lit("holds ") + found)
