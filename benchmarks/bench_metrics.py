"""ROUGE-L of this project against the rouge-score package: equal on every pair, and how many times faster.

    python -m benchmarks.bench_metrics [NI_DIR] [--quick] > metrics.json

NI_DIR is a clone of natural-instructions; without it, the embedded student's tasks. Pairs are real references with the
kinds of answer that a model gives: another instance's reference, the reference with words dropped, swapped and added, a
wordy one, the input, the exact answer, nothing, symbols. All languages are compared; the timing is over tasks with
English output, as the metric is. Stems are cached, so two speeds are given: of the first rows that a process scores,
and after it has scored others. CPU time, interleaved. Exits with an error if any score differs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from benchmarks.ratio import emit, ratio, spread
from selfguide import metrics
from selfguide.nano import TASKS
from selfguide.progress import stderr_line
from selfguide.tasks import Instance, Task, find_tasks, load_task

Pair = tuple[str, tuple[str, ...]]
Contestant = Callable[[Sequence[Pair]], object]

KINDS = {"other": 35, "edited": 35, "wordy": 10, "input": 10, "exact": 5, "edge": 5}
EDGES = ("", " ", "?!", "25", "5", "İstanbul ﬁne ①", "हाँ", "日本語 answer", "a_b-c's", "\n\n", "y" * 600)
MAX_WORDS = 300
CHUNK_ROWS = 1000
FLOOR = 10.0


def main() -> None:
    args = parse_args()
    tasks = [load_task(path) for path in find_tasks([args.ni_dir])]
    pairs = draw_pairs(tasks, args.pairs, args.seed)
    num_different = compare(pairs)
    stderr_line(f"{num_different} of {len(pairs):,} scores differ from rouge-score")
    english = [task for task in tasks if task.output_language == "English"]
    timed = draw_pairs(english, args.timed_pairs, args.seed + 1)
    seconds = measure(timed, pairs, args.repeats)
    slow = seconds["rouge_score"]
    ratios = {
        name: ratio([their_s / our_s for their_s, our_s in zip(slow, values, strict=True)], floor=FLOOR)
        for name, values in seconds.items()
        if values is not slow
    }
    config = {**vars(args), "ni_dir": args.ni_dir.name, "kinds": KINDS, "num_tasks": len(tasks)}
    each = {name: spread([1e6 * one / len(timed) for one in values]) for name, values in seconds.items()}
    versions = {name: version(name) for name in ("rapidfuzz", "nltk", "rouge-score")}
    emit(
        "metrics", config, ratios, versions=versions, num_compared=len(pairs), num_different=num_different,
        microseconds_per_row=each,
    )  # fmt: skip
    if num_different:
        raise SystemExit(f"{num_different} of {len(pairs)} scores differ from rouge-score")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ni_dir", type=Path, nargs="?", default=TASKS, help="a clone of natural-instructions")
    parser.add_argument("--pairs", type=int, default=100_000, help="pairs that are compared")
    parser.add_argument("--timed-pairs", type=int, default=100_000, help="pairs that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10,000 pairs")
    args = parser.parse_args()
    if args.quick:
        args.pairs = args.timed_pairs = 10_000
    return args


def draw_pairs(tasks: Sequence[Task], num: int, seed: int) -> list[Pair]:
    """Tasks in turn, so that each weighs the same, as with the official 100 instances of each."""
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=num)
    pairs = []
    for index, kind in enumerate(kinds):
        instances = tasks[index % len(tasks)].instances
        row, other = rng.choice(instances), rng.choice(instances)
        pairs.append((answer(kind, row, other, rng), row.references))
    return pairs


def answer(kind: str, row: Instance, other: Instance, rng: random.Random) -> str:
    """What a model might answer to the row."""
    reference = rng.choice(row.references)
    match kind:
        case "other":
            return rng.choice(other.references)
        case "edited":
            return edit(reference, other.references[0], rng)
        case "wordy":
            return f"Sure! The answer is: {reference}. I hope that this helps."
        case "input":
            return " ".join(row.input.split()[:MAX_WORDS])
        case "exact":
            return reference
    return rng.choice(EDGES)


def edit(text: str, donor: str, rng: random.Random) -> str:
    """Drops, swaps, inserts or changes the case of about a fifth of the words."""
    words, spare = text.split(), donor.split() or ["the"]
    for _ in range(1 + len(words) // 5):
        place = rng.randrange(len(words) + 1)
        match rng.randrange(4):
            case 0:
                words[place : place + 1] = []
            case 1:
                words[place : place + 2] = words[place : place + 2][::-1]
            case 2:
                words.insert(place, rng.choice(spare))
            case _:
                words[place : place + 1] = [word.upper() + "," for word in words[place : place + 1]]
    return " ".join(words)


def theirs(pairs: Sequence[Pair]) -> list[float]:
    """The official script's way: rouge-score with the stemmer, the best of the references."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts) for answer, texts in pairs]


def ours(pairs: Sequence[Pair]) -> list[float]:
    return [metrics.rouge_l(answer, texts) for answer, texts in pairs]


def ours_with_em(pairs: Sequence[Pair]) -> list[float]:
    return metrics.score_rows([answer for answer, _ in pairs], [texts for _, texts in pairs])[1]


def compare(pairs: Sequence[Pair]) -> int:
    """How many scores are not the same float."""
    expected = theirs(pairs)
    single = sum(a != b for a, b in zip(ours(pairs), expected, strict=True))
    batch = sum(a != b for a, b in zip(ours_with_em(pairs), expected, strict=True))
    return max(single, batch)


def measure(pairs: Sequence[Pair], others: Sequence[Pair], repeats: int) -> dict[str, list[float]]:
    """CPU seconds that each contestant takes for `pairs` in each repeat; "first" begins with an empty cache."""
    runs: list[tuple[dict[str, Contestant], Sequence[Pair]]] = [
        ({"rouge_score": theirs, "rouge_l_first": ours}, []),
        ({"rouge_l": ours}, others),
        ({"score_rows_first": ours_with_em}, []),
        ({"score_rows": ours_with_em}, others),
    ]
    seconds: dict[str, list[float]] = {name: [] for together, _ in runs for name in together}
    for _ in range(repeats):
        for together, before in runs:
            metrics._stem.cache_clear()
            ours(before)
            for name, spent in time_in_turn(together, pairs).items():
                seconds[name].append(spent)
    return seconds


def time_in_turn(contestants: Mapping[str, Contestant], pairs: Sequence[Pair]) -> dict[str, float]:
    """CPU seconds, chunk by chunk in turn, so that what else the machine does falls on all alike."""
    seconds = dict.fromkeys(contestants, 0.0)
    for start in range(0, len(pairs), CHUNK_ROWS):
        for name, run in contestants.items():
            began = time.process_time()
            run(pairs[start : start + CHUNK_ROWS])
            seconds[name] += time.process_time() - began
    return seconds


if __name__ == "__main__":
    main()
