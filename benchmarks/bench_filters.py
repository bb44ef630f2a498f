"""The columnar filters over a million rows against the same expressions in polars by hand, on one core.

    python -m benchmarks.bench_filters [--quick] [--rows 1000000] [--repeats 5] > filters.json

Four pieces of work, without near-duplicates: the chain for inputs with duplicates; sampled outputs with their vote, for
generation and for classification (labels, agreement, balance), where a row is a sample and ten share an input; and a
tenth of the inputs as synthesis judges them, from lists, 64 at a time. By hand there are no reasons for what goes. Both
must keep the same rows: exits with an error where they do not. CPU time, in turn; polars has one thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.ratio import emit, ratio, spread
from selfguide.filters import Context
from selfguide.progress import stderr_line
from selfguide.recipefile import load_recipe

if TYPE_CHECKING:
    import polars as pl

CEILING = 3.0
SAMPLES, BATCH = 10, 64
WORDS = "river stone house child boat market paper engine winter garden number letter window music doctor field".split()
LABELS = ("positive", "negative", "neutral")
Work = Callable[[Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100,000 rows, three repeats")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats = 100_000, 3
    os.environ["POLARS_MAX_THREADS"] = "1"  # read when polars is imported
    import polars as pl

    ratios, seconds = {}, {}
    for name, (table, ours, by_hand) in pieces(args.rows).items():
        spent = measure(name, table, ours, by_hand, args.repeats)
        ratios[name] = ratio([a / b for a, b in zip(*spent.values(), strict=True)], ceiling=CEILING)
        seconds[name] = {who: spread(values) for who, values in spent.items()}
    emit("filters", vars(args), ratios, versions={"polars": pl.__version__}, seconds=seconds)


def pieces(rows: int) -> dict[str, tuple[Any, Work, Work]]:
    """Of each piece of work: what it works on, ours, and by hand."""
    from benchmarks import filters_by_hand as hand
    from selfguide.filters.chain import Chain, InputJudge, PairJudge, judge_set
    from selfguide.filters.duplicates import Duplicate

    filters, context, rng = load_recipe("default").filters, make_context(), random.Random(0)
    both = {name: (*getattr(filters, name), *getattr(filters.classification, name)) for name in ("samples", "pairs")}
    labelled = filters.model_copy(update=both)
    chain = Chain([one for one in filters.inputs if not isinstance(one, Duplicate)], context)
    bounds = next(one for one in filters.inputs if one.name == "length").bounds(context)

    def inputs(table: pl.DataFrame) -> list[int]:
        return kept(judge_set(chain.apply(table), [Duplicate()], context))

    def generation(table: pl.DataFrame) -> list[int]:
        return kept(judge_set(PairJudge(filters, context).judge(table), [], context))

    def classification(table: pl.DataFrame) -> list[int]:
        sets = filters.classification.sets
        return kept(judge_set(PairJudge(labelled, context).judge(table), sets, context))

    def streaming(lists: Sequence[Sequence[Any]]) -> list[int]:
        judge = InputJudge(filters, context)
        batches = range(0, len(lists[0]), BATCH)
        verdicts = [one for i in batches for one in judge.judge(*(values[i : i + BATCH] for values in lists))]
        return [row for row, verdict in enumerate(verdicts) if verdict is None]

    table = inputs_table(rows, rng)
    some = table.head(rows // 10)
    lists = [some[name].to_list() for name in ("text", "tokens", "finish_reason")]
    return {
        "inputs": (table, inputs, lambda one: hand.inputs(one, context, bounds)),
        "samples_generation": (pairs_table(rows, rng, ()), generation, lambda one: hand.generation(one, context)),
        "samples_classification": (
            pairs_table(rows, rng, LABELS), classification, lambda one: hand.classification(one, context),
        ),
        "inputs_in_batches": (lists, streaming, lambda one: hand.streaming(one, context, bounds, BATCH)),
    }  # fmt: skip


def kept(judged: pl.DataFrame) -> list[int]:
    import polars as pl

    return judged.filter(pl.col("filter").is_null())["row"].to_list()


def measure(name: str, table: Any, ours: Work, by_hand: Work, repeats: int) -> dict[str, list[float]]:
    """CPU seconds; the first, untimed lap checks that both keep the same rows."""
    mine, theirs = ours(table), by_hand(table)
    if mine != theirs:
        raise SystemExit(f"{name}: {len(mine)} rows kept, {len(theirs)} by hand, and not the same ones")
    seconds: dict[str, list[float]] = {"ours": [], "by_hand": []}
    for _ in range(repeats):
        for who, work in (("ours", ours), ("by_hand", by_hand)):
            gc.collect()
            began = time.process_time()
            work(table)
            seconds[who].append(time.process_time() - began)
    stderr_line(f"{name}: {len(mine):,} rows kept; {seconds}")
    return seconds


def make_context() -> Context:
    rng = random.Random(1)
    gold = tuple(sentence(rng) for _ in range(3))
    return Context(
        gold_texts=gold, gold_tokens=(8, 9, 10), gold_inputs=gold, evaluation_inputs=tuple(sentence(rng) for _ in
        range(1000)), labels=LABELS, seed=0,
    )  # fmt: skip


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(4, 14)))


def inputs_table(rows: int, rng: random.Random) -> pl.DataFrame:
    """Of ten rows, three or so fall to one of the filters."""
    import polars as pl

    texts: list[str] = []
    for _ in range(rows):
        text, kind = sentence(rng), rng.random()
        if kind < 0.1 and texts:
            text = f" {rng.choice(texts).title()} "
        elif kind < 0.15:
            text = f"Sure! {text}"
        texts.append("   " if kind > 0.99 else text)
    finish = rng.choices(("stop", "length"), weights=(9, 1), k=rows)
    columns = {"text": texts, "tokens": [len(text) // 4 for text in texts], "finish_reason": finish}
    return pl.DataFrame({"row": range(rows), **columns}, schema_overrides={"row": pl.Int32, "tokens": pl.Int32})


def pairs_table(rows: int, rng: random.Random, labels: Sequence[str]) -> pl.DataFrame:
    """Ten samples an input, of few different answers; of those to a classification one is no label now and then."""
    import polars as pl

    from selfguide.filters.chain import PAIRS

    def sample(likely: str) -> dict[str, Any]:
        text = likely if rng.random() < 0.6 else rng.choice(labels) if labels else sentence(rng)
        text = rng.choice((text, f" {text}.", text.upper(), "none of them")) if labels and rng.random() < 0.2 else text
        finish = "stop" if rng.random() < 0.95 else "length"
        return {"text": text, "finish_reason": finish, "tokens": 4, "logprob": -1.0}

    made = []
    for row in range(rows // SAMPLES):
        likely = rng.choice(labels) if labels else sentence(rng)
        label = (likely if rng.random() < 0.7 else rng.choice(labels)) if labels else None
        samples = [sample(likely) for _ in range(SAMPLES)]
        made.append({"row": row, "input": sentence(rng), "label": label, "samples": samples, "label_logprobs": None})
    return pl.DataFrame(made, schema=PAIRS)


if __name__ == "__main__":
    main()
