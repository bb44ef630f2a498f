"""What filters are: pure expressions over a table of rows, each with a reason for every row that it turns away.

A row filter sees one row at a time (as a Polars expression over whole columns), a set filter needs all of them. Both
read the columns `text`, `tokens`, `finish_reason` and `label`; pairs also have `input`, `votes`, `share` and `margin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import polars as pl


class FilterSpec(BaseModel):
    """A filter's entry in the recipe: its `name`, and parameters with documented defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Context:
    """What a task's filters may know. Immutable and per task, so that nothing leaks from one task to the next.

    `gold_texts` and `gold_tokens` are the examples' inputs where inputs are judged, their outputs where outputs are.
    """

    gold_texts: tuple[str, ...]
    gold_tokens: tuple[int, ...]
    gold_inputs: tuple[str, ...]
    evaluation_inputs: tuple[str, ...]
    labels: tuple[str, ...]
    seed: int
    label_tokens: tuple[int, ...] = ()
    """Of each label, where answers are read off log-probabilities and no sample says how long it was."""


class RowFilter(Protocol):
    """`reason` gives null for a row that stays, and why for one that goes."""

    @property
    def name(self) -> str: ...

    def reason(self, context: Context) -> pl.Expr: ...


class SetFilter(Protocol):
    """`reasons` gives one entry per row of the table: null, or why the row goes."""

    @property
    def name(self) -> str: ...

    def reasons(self, rows: pl.DataFrame, context: Context) -> pl.Series: ...


def normalised(column: str) -> pl.Expr:
    """The text as duplicates are compared: Unicode NFKC, lower case, runs of white space as one space."""
    import polars as pl

    return pl.col(column).str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def normalise(texts: list[str]) -> list[str]:
    """The same for a list of texts."""
    import polars as pl

    return pl.DataFrame({"text": pl.Series(texts, dtype=pl.String)}).select(normalised("text")).to_series().to_list()
