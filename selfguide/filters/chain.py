"""The chains that a recipe lists: inputs as they are committed, pairs in curation. The first reason wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from selfguide.calibration import calibrate
from selfguide.filters.base import Context, RowFilter, SetFilter, normalise, normalised
from selfguide.filters.duplicates import Duplicate
from selfguide.filters.labels import ValidLabel
from selfguide.records import ACCEPTED, REJECTED

if TYPE_CHECKING:
    from selfguide.config import Filters

SAMPLES = pl.List(pl.Struct({"text": pl.String, "finish_reason": pl.String, "tokens": pl.Int32, "logprob": pl.Float64}))
INPUTS = {"text": pl.String(), "tokens": pl.Int32(), "finish_reason": pl.String()}
PAIRS = {
    "row": pl.Int32(), "input": pl.String(), "label": pl.String(), "samples": SAMPLES,
    "label_logprobs": pl.List(pl.Float64),
}  # fmt: skip


class Chain:
    """Row filters in order. Each reason is worked out once, as a column of its own."""

    def __init__(self, filters: Sequence[RowFilter], context: Context) -> None:
        names = [f"_{number}" for number in range(len(filters))]
        named = list(zip(names, filters, strict=True))
        self._reasons = [one.reason(context).alias(name) for name, one in named]
        first = [pl.when(pl.col(name).is_not_null()).then(pl.lit(one.name)) for name, one in named]
        nothing = pl.lit(None, dtype=pl.String)
        self._verdict = [
            pl.coalesce([*first, nothing]).alias("filter"), pl.coalesce([*names, nothing]).alias("reason"),
        ]  # fmt: skip
        self._names = names

    def apply(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Adds `filter` and `reason`: of the first filter that turns a row away, null where none does."""
        return self.plan(rows.lazy()).collect()

    def plan(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        return rows.with_columns(self._reasons).with_columns(self._verdict).drop(self._names)


class InputJudge:
    """Judges inputs in index order, batch by batch: the result does not depend on how rows fall into batches."""

    def __init__(self, filters: Filters, context: Context) -> None:
        self._chain = Chain([one for one in filters.inputs if not isinstance(one, Duplicate)], context)
        names = [one.name for one in filters.inputs]
        self._distinct = Duplicate().name in names
        self._before = frozenset(names[: names.index(Duplicate().name)] if self._distinct else names)
        self._seen: set[str] = set()

    def judge(self, texts: Sequence[str], tokens: Sequence[int], finish: Sequence[str]) -> list[tuple[str, str] | None]:
        """Filter and reason for each text that is turned away, None for one that stays."""
        columns = {"text": list(texts), "tokens": list(tokens), "finish_reason": list(finish)}
        # In one plan: batches are of few rows, and each plan costs as much as hundreds of them.
        keyed = pl.LazyFrame(columns, schema=INPUTS).with_columns(normalised("text").alias("key"))
        rows = self._chain.plan(keyed).select("key", "filter", "reason").collect(engine="in-memory")
        verdicts: list[tuple[str, str] | None] = []
        for key, name, reason in rows.iter_rows():
            if self._distinct and key in self._seen and name not in self._before:
                name, reason = "duplicate", "seen before"
            verdicts.append((name, reason) if name is not None else None)
            if name is None:
                self._seen.add(key)
        return verdicts

    def recall(self, texts: Sequence[str]) -> None:
        """Accepted inputs of an earlier process."""
        self._seen.update(normalise(list(texts)))


def pairs_table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows with `row`, `input`, `label`, and `samples` or `label_logprobs`, as the table that `PairJudge` reads."""
    return pl.DataFrame([{key: row.get(key) for key in PAIRS} for row in rows], schema=PAIRS)


class PairJudge:
    """Judges inputs with their sampled outputs: one line for each input, row by row, without the set filters."""

    def __init__(self, filters: Filters, context: Context) -> None:
        self._samples = Chain(filters.samples, context)
        self._pairs = Chain(filters.pairs, context)
        self._context = context
        self._vote = filters.vote
        label = next((one for one in filters.samples if isinstance(one, ValidLabel)), None)
        self._read = pl.col("text") if label is None else label.read(context)

    def judge(self, rows: pl.DataFrame) -> pl.DataFrame:
        """From `pairs_table` to row, input, label, text (the output), votes, share, margin, tokens, filter, reason.

        Where no sample survives, the reason is the most frequent one among the samples.
        """
        table = rows.select([name for name in PAIRS if name != "label_logprobs"])
        samples = self.judge_samples(table)
        alive = samples.filter(pl.col("filter").is_null())
        elected = self._vote.elect(alive)
        pairs = table.drop("samples").join(elected, on="row", how="left", maintain_order="left")
        pairs = pairs.with_columns(
            pl.lit("stop").alias("finish_reason"),
            pl.col("text").fill_null(""),
            pl.lit(None, pl.Float64).alias("margin"),
        )
        return _explain_silent(self._judge_elected(pairs), samples).drop("finish_reason")

    def judge_calibrated(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The same from `label_logprobs`, over all rows at once: there are no samples to filter and no vote."""
        labels, table = self._context.labels, rows.select(list(PAIRS))
        elected = calibrate(table["label_logprobs"].to_list(), labels)
        tokens = dict(zip(labels, self._context.label_tokens, strict=True))
        pairs = table.drop("samples", "label_logprobs").with_columns(
            pl.Series("text", [one.label for one in elected], dtype=pl.String),
            pl.lit(None, pl.UInt32).alias("votes"),
            pl.lit(None, pl.Float64).alias("share"),
            pl.Series("margin", [one.margin for one in elected], dtype=pl.Float64),
            pl.Series("tokens", [tokens[one.label] for one in elected], dtype=pl.Int32),
            pl.lit("stop").alias("finish_reason"),
        )
        return self._pairs.apply(pairs).drop("finish_reason")

    def judge_samples(self, table: pl.DataFrame) -> pl.DataFrame:
        """One line for each sample, with its verdict; where labels are read, a survivor's text is its label."""
        counted = table.with_columns(pl.col("samples").list.len().alias("num_samples"))
        samples = counted.explode("samples").unnest("samples").filter(pl.col("text").is_not_null())
        judged = self._samples.apply(samples.with_columns(pl.col("text").str.strip_chars()))
        read = pl.when(pl.col("filter").is_null()).then(self._read).otherwise(pl.col("text"))
        return judged.with_columns(read.alias("text"))

    def _judge_elected(self, pairs: pl.DataFrame) -> pl.DataFrame:
        unsure = self._vote.reason()
        name = pl.when(unsure.is_not_null()).then(pl.lit(self._vote.name)).otherwise(pl.col("filter"))
        judged = self._pairs.apply(pairs)
        return judged.with_columns(name.alias("filter"), pl.coalesce(unsure, pl.col("reason")).alias("reason"))


def _explain_silent(pairs: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """Rows without a surviving sample get the commonest reason of their samples."""
    none_left = pairs.filter(pl.col("votes").is_null()).select("row")
    lost = samples.select("row", "filter", "reason").join(none_left, on="row", how="semi", maintain_order="left")
    why = lost.group_by("row", "filter").agg(pl.len().alias("count"), pl.col("reason").first())
    why = why.sort("count", "filter", descending=[True, False])
    why = why.group_by("row", maintain_order=True).first().select("row", pl.col("filter", "reason").name.suffix("_all"))
    pairs = pairs.join(why, on="row", how="left", maintain_order="left")
    silent = pl.col("votes").is_null()
    name, reason = pl.coalesce("filter_all", pl.lit("empty")), pl.coalesce("reason_all", pl.lit("no samples"))
    pairs = pairs.with_columns(
        pl.when(silent).then(name).otherwise(pl.col("filter")).alias("filter"),
        pl.when(silent).then(pl.lit("no sample left: ") + reason).otherwise(pl.col("reason")).alias("reason"),
    )
    return pairs.drop("filter_all", "reason_all")


def judge_set(pairs: pl.DataFrame, filters: Sequence[SetFilter], context: Context) -> pl.DataFrame:
    """Applies the set filters, each to the rows that are left, and states every row's end."""
    for one in filters:
        kept = pairs.filter(pl.col("filter").is_null())
        if kept.height:
            verdict = pl.DataFrame({"row": kept["row"], "why": one.reasons(kept, context)})
            pairs = pairs.join(verdict, on="row", how="left", maintain_order="left")
            gone = pl.col("why").is_not_null()
            name = pl.when(gone).then(pl.lit(one.name)).otherwise(pl.col("filter"))
            pairs = pairs.with_columns(name.alias("filter"), pl.coalesce("why", "reason").alias("reason")).drop("why")
    state = pl.when(pl.col("filter").is_null()).then(pl.lit(ACCEPTED)).otherwise(pl.lit(REJECTED))
    return pairs.with_columns(state.alias("state"))
