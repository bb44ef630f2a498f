"""One task alone: the synthesis of a single run against an engine that has all its requests at once, by lag.

    python -m benchmarks.bench_lag [--quick] [--lags 10 32 128] [--model nano] [--tasks FILE ...] > lag.json

Row i of synthesis waits for all inputs up to i - lag. In each repeat, for each lag: the synthesis of a fresh run, then
the very requests that it sent, all at once, by the same pool to the same engine, and the ratio of their tokens/s. Their
first token is another one, a different one each time, so that the prefix cache knows none of them; what they share
among themselves stays. Twice: with simulated engines (256 slots, ten samples an input, no model in the way), and with
the embedded student and vLLM on two held-in tasks, whose accepted inputs also say what a lag does to diversity:
distinct-n, different n-grams of words over all, and duplicates, the share of candidates that were there before.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from benchmarks.ratio import emit, ratio, spread
from engines.types import ChoiceRequest, Completion, Outcome, Request, Work
from selfguide import Recipe, Task, load_recipe, load_task
from selfguide.api import Session, open_session
from selfguide.nano import TASKS
from selfguide.preview.tap import Tap
from selfguide.progress import stderr_line
from selfguide.records import REJECTED
from selfguide.store import RunStore
from selfguide.synthesis import synthesize

HELD_IN = ("nano002_food_classification", "nano024_drop_first_then_plural")
SIMULATED = {
    "engine.max_num_seqs": 256, "engine.tokens_per_s": 60, "engine.simulation.answer_tokens": 24,
    "engine.simulation.start_s": 0, "synthesis.num_candidates": 600, "annotation.num_samples": 10,
    "cluster.num_engines": 1,
}  # fmt: skip
FIRST_TOKEN = 100
"""Beyond the special tokens; each comparison takes the next."""
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lags", type=int, nargs="+", default=[10, 32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--recipe", default="nano", help="of the runs with vLLM")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[TASKS / f"{name}.json" for name in HELD_IN])
    parser.add_argument("--quick", action="store_true", help="one repeat, and one task with vLLM")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.tasks = 1, args.tasks[:1]
    tasks = [load_task(path) for path in args.tasks]
    simulated = load_recipe("simulated", {**SIMULATED, "model.path": "random"})
    real = load_recipe(args.recipe, {"model.path": args.model})
    repeats = {
        "simulated": asyncio.run(measure(simulated, tasks[:1], args.lags, args.repeats)),
        "vllm": asyncio.run(measure(real, tasks, args.lags, args.repeats)),
    }
    emit("lag", vars(args), ratios_by_lag(repeats), diversity=diversity_by_lag(repeats["vllm"]), repeats=repeats)


def ratios_by_lag(repeats: Mapping[str, Sequence[Json]]) -> Json:
    pairs: dict[str, list[float]] = {}
    for engine, found in repeats.items():
        for one in found:
            key = f"{engine}_{one['kind']}_lag_{one['lag']}"
            pairs.setdefault(key, []).append(one["tokens_per_s"] / one["tokens_per_s_at_once"])
    return {key: ratio(values) for key, values in pairs.items()}


async def measure(recipe: Recipe, tasks: Sequence[Task], lags: Sequence[int], repeats: int) -> list[Json]:
    turns = [(task, lag) for _ in range(repeats) for task in tasks for lag in lags]
    found = []
    async with open_session(recipe, trains=False) as session:
        for number, (task, lag) in enumerate([(tasks[0], max(lags)), *turns]):
            change = {"synthesis": recipe.synthesis.model_copy(update={"lag": lag}), "seed": number}
            one = await compare(session, task, recipe.model_copy(update=change))
            if number:  # the first loads what is loaded once
                stderr_line(f"{recipe.engine.kind} {one}")
                found.append(one)
    return found


async def compare(session: Session, task: Task, recipe: Recipe) -> Json:
    """One synthesis, then its requests at once."""
    clock, tap = asyncio.get_running_loop().time, Tap(session.pool)
    folder = Path(tempfile.mkdtemp(prefix="selfguide-lag-"))
    try:
        whole = session.task_run(task, RunStore(folder), lambda task, stage, counts: None)
        run = replace(whole, recipe=recipe, pool=cast(Any, tap))
        began = clock()
        candidates = (await synthesize(run)).rows(["state", "filter", "input"])
        synthesis_s = clock() - began
    finally:
        shutil.rmtree(folder)
    requests = [unknown(work, FIRST_TOKEN + recipe.seed) for work in tap.sent.values()]
    began = clock()
    at_once = [outcome async for outcome in session.pool.generate(requests)]
    at_once_s = clock() - began
    speeds = {
        "tokens_per_s": num_tokens(tap.received.values()) / synthesis_s,
        "tokens_per_s_at_once": num_tokens(at_once) / at_once_s,
    }
    times = {"task": task.name, "kind": task.kind, "lag": recipe.synthesis.lag, "synthesis_s": synthesis_s}
    return {**times, "at_once_s": at_once_s, "requests": len(requests), **speeds, **diversity(candidates)}


def unknown(work: Work, token: int) -> Work:
    """The same work for a prefix cache that has not seen it: a block's key is made of all tokens up to its end."""
    if isinstance(work, Request):
        return replace(work, prompt_ids=[token, *work.prompt_ids[1:]])
    assert isinstance(work, ChoiceRequest)
    return replace(work, prefix_ids=[token, *work.prefix_ids[1:]])


def num_tokens(outcomes: Iterable[Outcome]) -> int:
    return sum(len(sample.token_ids) for one in outcomes if isinstance(one, Completion) for sample in one.samples)


def diversity(candidates: Sequence[Mapping[str, Any]]) -> Json:
    accepted = [row["input"].split() for row in candidates if row["state"] != REJECTED and row["input"]]
    again = sum(row["filter"] == "duplicate" for row in candidates)
    distinct = {f"distinct_{n}": round(distinct_n(accepted, n), 4) for n in (1, 2, 3)}
    return {"accepted": len(accepted), "duplicates": round(again / len(candidates), 4), **distinct}


def distinct_n(texts: Sequence[Sequence[str]], n: int) -> float:
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def diversity_by_lag(found: Sequence[Json]) -> Json:
    names = ("accepted", "duplicates", "distinct_1", "distinct_2", "distinct_3")
    groups: dict[str, list[Json]] = {}
    for one in found:
        groups.setdefault(f"{one['task']} lag {one['lag']}", []).append(one)
    return {key: {name: spread([one[name] for one in group]) for name in names} for key, group in groups.items()}


if __name__ == "__main__":
    main()
