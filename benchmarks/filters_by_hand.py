"""What `bench_filters` compares with: the recipe `default`'s filters as one would write them in polars for one task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import polars as pl

from selfguide.filters import Context, normalise
from selfguide.filters.noise import PLEASANTRIES

MIN_SHARE, RATIO = 0.3, 2.0
OUTER = " \t\r\n.,;:!?\"'`()[]*"


def inputs(table: pl.DataFrame, context: Context, bounds: tuple[int, int]) -> list[int]:
    return _unique(_passing(_keyed(table), context, bounds))["row"].to_list()


def streaming(lists: Sequence[Sequence[Any]], context: Context, bounds: tuple[int, int], batch: int) -> list[int]:
    """Batch by batch, with a set of what was seen."""
    seen: set[str] = set()
    rows: list[int] = []
    for start in range(0, len(lists[0]), batch):
        text, tokens, finish = (values[start : start + batch] for values in lists)
        table = pl.DataFrame({"text": text, "tokens": tokens, "finish_reason": finish}).with_row_index("row", start)
        for row, key in _passing(_keyed(table), context, bounds).select("row", "key").iter_rows():
            if key not in seen:
                seen.add(key)
                rows.append(row)
    return rows


def _keyed(table: pl.DataFrame) -> pl.DataFrame:
    text = pl.col("text").str.normalize("NFKC").str.to_lowercase()
    return table.with_columns(text.str.replace_all(r"\s+", " ").str.strip_chars().alias("key"))


def _passing(table: pl.DataFrame, context: Context, bounds: tuple[int, int]) -> pl.DataFrame:
    gold = pl.Series(normalise(list(context.gold_inputs))).implode()
    held_out = pl.Series(normalise(list(context.evaluation_inputs))).implode()
    return table.filter(
        pl.col("text").str.strip_chars() != "",
        pl.col("finish_reason") == "stop",
        ~pl.col("text").str.contains_any(list(PLEASANTRIES)),
        pl.col("text").str.len_chars().is_between(*bounds),
        ~pl.col("key").is_in(gold),
        ~pl.col("key").is_in(held_out),
    )


def _unique(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("key").is_first_distinct())


def generation(table: pl.DataFrame, context: Context) -> list[int]:
    return _elected(_samples(table))["row"].to_list()


def classification(table: pl.DataFrame, context: Context) -> list[int]:
    labels = list(context.labels)
    bare = pl.col("text").str.strip_chars(OUTER).str.to_lowercase()
    read = bare.replace_strict(labels, labels, default=None, return_dtype=pl.String)
    samples = _samples(table).with_columns(read.alias("text")).filter(pl.col("text").is_not_null())
    pairs = _elected(samples).join(table.select("row", "label"), on="row", how="left", maintain_order="left")
    agreeing = pairs.filter(pl.col("label").is_null() | (pl.col("label") == pl.col("text")))
    groups = {str(text): rows["row"].to_list() for (text,), rows in agreeing.group_by("text")}
    quota = int(min(map(len, groups.values())) * RATIO)
    gone = set()
    for label, rows in sorted(groups.items()):
        gone.update(random.Random(f"{context.seed} {label}").sample(rows, max(0, len(rows) - quota)))
    return [row for row in agreeing["row"] if row not in gone]


def _samples(table: pl.DataFrame) -> pl.DataFrame:
    samples = table.select("row", "samples").explode("samples").unnest("samples")
    return samples.with_columns(pl.col("text").str.strip_chars()).filter(
        pl.col("text") != "",
        pl.col("finish_reason") == "stop",
        ~pl.col("text").str.contains_any(list(PLEASANTRIES)),
    )


def _elected(samples: pl.DataFrame) -> pl.DataFrame:
    counted = samples.group_by("row", "text").agg(pl.len().alias("votes"))
    ranked = counted.with_columns(pl.col("text").str.len_chars().alias("length")).sort(
        "row", "votes", "length", "text", descending=[False, True, False, False]
    )
    best = ranked.group_by("row", maintain_order=True).first()
    return best.filter(pl.col("votes") / 10 >= MIN_SHARE)
