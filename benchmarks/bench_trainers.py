"""One adapter after another: on a warm trainer, and on a trainer whose process ends with each job.

    python -m benchmarks.bench_trainers [--quick] [--rows 200] [--epochs 3] [--model FOLDER] > trainers.json

The two take turns within a repeat. Seconds are the client's, from the call to the adapter; `train_s` are the job's own,
from reading the rows to the exported weights. All adapters must be the same: exits with an error where they are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ratio import emit, ratio, spread
from cluster.placement import ClusterSpec
from cluster.session import ray_session
from cluster.trainers import Trainers, TrainerShape
from engines.types import TrainSpec
from selfguide import load_recipe
from selfguide.api import load_student
from selfguide.progress import stderr_line
from selfguide.taskrun import Student

FLOOR = 2.0
PROMPT_TOKENS = 80
TEXT = "the river moved slowly past old stone houses while children counted boats "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", default="random")
    parser.add_argument("--quick", action="store_true", help="two repeats")
    args = parser.parse_args()
    args.repeats = min(args.repeats, 2) if args.quick else args.repeats
    student = load_student(load_recipe("smoke", {"model.path": args.model}))
    with tempfile.TemporaryDirectory(prefix="selfguide-trainers-") as folder, ray_session(ClusterSpec()):
        repeats, digests = asyncio.run(measure(args, student, Path(folder)))
    ratios = {"fresh_over_warm": ratio([one["fresh_s"] / one["warm_s"] for one in repeats], floor=FLOOR)}
    names = ("fresh_s", "warm_s", "fresh_train_s", "warm_train_s")
    seconds = {name: spread([one[name] for one in repeats]) for name in names}
    emit("trainers", vars(args), ratios, seconds=seconds, num_different_adapters=len(digests) - 1, repeats=repeats)
    if len(digests) > 1:
        raise SystemExit("the adapters of warm and fresh trainers differ")


async def measure(args: argparse.Namespace, student: Student, folder: Path) -> tuple[list[dict[str, float]], set[str]]:
    """Seconds of each repeat, and the digests of all adapters."""
    rows = write_rows(folder / "rows.parquet", student, [PROMPT_TOKENS] * args.rows)
    spec = TrainSpec(student.folder, student.digest, epochs=args.epochs)
    one = {"num_cpus": 1}
    kinds = {"warm": Trainers([TrainerShape(one)]), "fresh": Trainers([TrainerShape(one, stays=False)])}
    for name, trainers in kinds.items():  # the queues start, and one trainer gets warm
        await run(trainers, spec, rows, folder / f"{name}-first")
    repeats: list[dict[str, float]] = []
    digests = set()
    for number in range(args.repeats):
        seconds: dict[str, float] = {}
        for name, trainers in kinds.items():
            took, result = await run(trainers, spec, rows, folder / f"{name}-{number}")
            digests.add(result.checkpoints[-1].digest)
            seconds |= {f"{name}_s": round(took, 2), f"{name}_train_s": round(result.train_s, 2)}
        stderr_line(json.dumps(seconds))
        repeats.append(seconds)
    return repeats, digests


def write_rows(path: Path, student: Student, prompt_tokens: Sequence[int], completion_tokens: int = 20) -> Path:
    """A row for each prompt's length, each a different window of the text."""
    lengths = [cut + completion_tokens for cut in prompt_tokens]
    ids = student.tokenizer.encode(TEXT * (1 + (len(lengths) + max(lengths)) // 10))
    rows = [ids[i : i + length] for i, length in enumerate(lengths)]
    pq.write_table(pa.table({"input_ids": rows, "prompt_tokens": prompt_tokens}), path)
    return path


async def run(trainers: Trainers, spec: TrainSpec, rows: Path, work: Path) -> tuple[float, Any]:
    clock = asyncio.get_running_loop().time
    work.mkdir()
    began = clock()
    result = await trainers.train(spec, rows, work)
    return clock() - began, result


if __name__ == "__main__":
    main()
